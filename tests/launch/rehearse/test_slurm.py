"""The played Slurm: its commands' forms, its refusals, and our parsers reading its answers."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from hpcsngd.launch import ownjob, partitions, slurm
from hpcsngd.launch.rehearse import cluster, life, slurm_commands, slurm_listing
from hpcsngd.launch.rehearse.book import Book
from hpcsngd.launch.rehearse.cluster import Cluster, Row

LIMITS = (Row(2, 60, queue="short"), Row(4, 600, min_nodes=2, queue="long"))


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Book:
    """A played Slurm in PATH."""
    played = Cluster(
        "slurm",
        ("n1", "n2", "n3", "n4"),
        queues=("short", "long"),
        limits=LIMITS,
        is_project_needed=True,
        refused=("mem",),
        grace_s=0.5,
        minute_s=60.0,
    )
    for name, value in cluster.install(tmp_path / "cluster", played).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return Book(tmp_path / "cluster")


def sbatch(*options: str, body: str = "true", **directives: str) -> subprocess.CompletedProcess[str]:
    asked = {"account": "abc", "time": "5", **directives}
    lines = [f"#SBATCH --{name.replace('_', '-')}={value}" for name, value in asked.items() if value]
    Path("job.sh").write_text("\n".join(["#!/bin/bash", *lines, body]) + "\n")
    words = ["sbatch", *options, "job.sh"]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def wait_for(book: Book, key: str, *states: str) -> None:
    deadline = time.monotonic() + 60
    while (job := book.read(key)) is None or job.state not in states:
        assert time.monotonic() < deadline, job
        time.sleep(0.05)


def test_tasks_know_their_place(book: Book) -> None:
    show = "echo $SLURM_PROCID $SLURM_LOCALID $SLURM_NODEID $HPCSNGD_PLAYED_HOST"
    done = sbatch(
        body=f"srun --output={Path.cwd()}/%j_%t.out bash -c '{show}'", nodes="2", ntasks_per_node="2"
    )
    assert done.stdout == "Submitted batch job 101\n", done.stderr
    wait_for(book, "101", "done", "exit")
    written = [Path(f"101_{rank}.out").read_text() for rank in range(4)]
    assert written == ["0 0 0 n1\n", "1 1 0 n1\n", "2 0 1 n2\n", "3 1 1 n2\n"]


@pytest.mark.parametrize(
    ("directives", "words"),
    [
        ({"time": "61"}, "1 node(s) for 61 min in short fit no row"),
        ({"partition": "long", "nodes": "5", "time": "1:00:00"}, "fit no row"),
        ({"partition": "gpu"}, "gpu: no such queue"),
        ({"account": ""}, "Invalid account"),
        ({"mem": "4G"}, "--mem is refused by this site"),
        ({"frobnicate": "1"}, "unrecognized option"),
    ],
)
def test_the_sites_rules_are_enforced(book: Book, directives: dict[str, str], words: str) -> None:
    done = sbatch(**directives)
    assert done.returncode == 1
    assert words in done.stderr
    assert book.jobs() == []


def test_our_parsers_read_its_answers(book: Book) -> None:
    assert sbatch("--hold").returncode == 0
    assert sbatch(body="exec sleep 300", nodes="2").returncode == 0
    wait_for(book, "102", "running")
    told = slurm.ask(["101", "102", "999"], timeout_s=30)
    assert told.is_complete
    assert (told.jobs["101"].phase, told.jobs["101"].detail) == (slurm.PENDING, "JobHeldUser")
    assert told.jobs["102"].phase == slurm.RUNNING
    own = ownjob.ask("102", timeout_s=30)
    assert own is not None
    assert own.fate(0) == "running"
    assert 200 < (own.left_s or 0) <= 300
    assert slurm.job_record("102")["NumNodes"] == "2"
    listed = "\n".join(slurm_listing.partition_lines(cluster.load(book.folder)))
    known = partitions.parse_partitions(listed)
    assert [(one.name, one.is_default, one.max_minutes) for one in known.values()] == [
        ("short", True, 60),
        ("long", False, 600),
    ]
    slurm.cancel(["101", "102"], timeout_s=30)
    for key in ("101", "102"):
        wait_for(book, key, "exit")
        assert slurm.ask([key], timeout_s=30).jobs[key].state == "CANCELLED"


def test_a_requeued_job_counts_its_restarts(book: Book) -> None:
    body = '[ "$SLURM_RESTART_COUNT" = 1 ] && exit 7; exec sleep 300'
    assert sbatch(body=body).returncode == 0
    wait_for(book, "101", "running")
    slurm.requeue("101", timeout_s=30)
    wait_for(book, "101", "exit")
    job = book.read("101")
    assert job is not None
    deadline = time.monotonic() + 60
    while job.exit_code != 7:
        assert time.monotonic() < deadline, job
        time.sleep(0.05)
        job = book.read("101") or job
    assert job.restarts == 1


def test_a_lost_node_restarts_the_job_and_can_be_kept_off(book: Book) -> None:
    body = '[ "$SLURM_RESTART_COUNT" = 1 ] && exit 0; srun sleep 300'
    assert sbatch(body=body, nodes="2", exclude="n1,n3").returncode == 0
    wait_for(book, "101", "running")
    started = book.read("101")
    assert started is not None
    assert started.hosts == ["n2", "n4"]
    deadline = time.monotonic() + 60
    while not life.processes(book.folder, "101", "n4"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    book.ask("101", "lose")
    while (job := book.read("101")) is None or not (job.restarts and job.has_ended):
        assert time.monotonic() < deadline, job
        time.sleep(0.05)
    assert (job.state, job.hosts) == ("done", ["n2", "n4"])
    assert [words for _, words in job.history].count("requeued") == 1


def test_a_suspended_job_stands_still(book: Book) -> None:
    assert sbatch(body="touch begun; exec sleep 300").returncode == 0
    deadline = time.monotonic() + 60
    while not Path("begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    book.ask("101", "suspend")
    wait_for(book, "101", "suspended")
    (pid,) = life.processes(book.folder, "101")
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    book.ask("101", "resume")
    wait_for(book, "101", "running")
    slurm.cancel(["101"], timeout_s=30)
    wait_for(book, "101", "exit")
    assert life.processes(book.folder, "101") == []


def test_dependencies_arrays_and_the_time_limit(book: Book) -> None:
    assert sbatch(array="0-2%2", body="exit $SLURM_ARRAY_TASK_ID").returncode == 0
    for key, state in (("101_0", "done"), ("101_1", "exit"), ("101_2", "exit")):
        wait_for(book, key, state)
    assert sbatch(dependency="afterok:101").returncode == 0
    assert sbatch(dependency="afterany:101").returncode == 0
    wait_for(book, "103", "done")
    waiting = slurm.ask(["102"], timeout_s=30).jobs["102"]
    assert (waiting.phase, waiting.detail) == (slurm.PENDING, "DependencyNeverSatisfied")
    slurm.cancel(["102"], timeout_s=30)
    assert sbatch(body="trap '' USR2; sleep 300", time="1", signal="USR2@50").returncode == 0
    wait_for(book, "104", "running")
    with book.changing("104") as job:
        job.ends_at = time.time() + 1
    wait_for(book, "104", "exit")
    assert slurm.ask(["104"], timeout_s=30).jobs["104"].state == "TIMEOUT"


@pytest.mark.parametrize(
    ("text", "minutes"), [("90", 90), ("5:30", 6), ("1:00:00", 60), ("1-0", 1440), ("1-02:30:00", 1590)]
)
def test_time_limits_as_sbatch_reads_them(text: str, minutes: int) -> None:
    assert slurm_commands.minutes_of(text) == minutes
