"""The played jsrun, blaunch and lsrun: what they set, refuse, lose and end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcsngd.launch.rehearse import cluster, life
from hpcsngd.launch.rehearse.book import Book
from hpcsngd.launch.rehearse.cluster import Cluster

SUMMIT = Cluster(
    "lsf",
    ("c1", "c2", "c3"),
    flavor="csm",
    batch_host="batch1",
    slots=42,
    gpus=6,
    launchers=("jsrun", "blaunch", "lsrun"),
    grace_s=0.5,
)


class Allocation:
    """A job on two hosts that waits, in whose place commands are run."""

    def __init__(self, folder: Path) -> None:
        self.environment = {**os.environ, **cluster.install(folder, SUMMIT)}
        self.book = Book(folder)
        script = folder / "wait.sh"
        script.write_text("#!/bin/sh\nenv > seen\nexec sleep 300\n")
        script.chmod(0o755)
        words = ["bsub", "-P", "abc", "-W", "5", "-nnodes", "2", "-o", "lsf.out", str(script)]
        done = subprocess.run(
            words, env=self.environment, cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.stdout == "Job <101> is submitted to default queue <normal>.\n", done.stderr
        self.key = "101"
        _until((folder / "seen").exists)
        _until(lambda: "LSB_JOBID" in (folder / "seen").read_text())
        lines = (folder / "seen").read_text().splitlines()
        self.inside = dict(line.split("=", 1) for line in lines if "=" in line)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, env=self.inside, capture_output=True, text=True, timeout=60, check=False)

    def jsrun(self, options: str, shell: str) -> subprocess.CompletedProcess[str]:
        return self.run("jsrun", *options.split(), "bash", "-c", shell)


def _until(condition: object, timeout_s: float = 60.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def allocation(tmp_path: Path) -> Iterator[Allocation]:
    made = Allocation(tmp_path / "cluster")
    yield made
    made.book.ask(made.key, "kill")
    _until(lambda: (job := made.book.read(made.key)) is not None and job.has_ended)
    assert life.processes(made.book.folder, made.key) == []


SHOW = 'echo "$HPCSNGD_PLAYED_HOST $JSM_NAMESPACE_RANK/$JSM_NAMESPACE_SIZE $JSM_NAMESPACE_LOCAL_RANK"'
DEVICES = 'echo "$JSM_NAMESPACE_RANK $CUDA_VISIBLE_DEVICES $OMPI_COMM_WORLD_RANK"'


def test_jsrun_starts_ranks_on_compute_hosts_only(allocation: Allocation) -> None:
    done = allocation.jsrun("-n 2 -r 1 -a 2 -g 6 -c 42 -b packed:21 -d packed --smpiargs=off", SHOW)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["c1 0/4 0", "c1 1/4 1", "c2 2/4 0", "c2 3/4 1"]


def test_jsrun_shows_a_task_the_gpus_of_its_set(allocation: Allocation) -> None:
    own = allocation.jsrun("-n 4 -r 2 -a 1 -g 1 -c 7 -b packed:7 --smpiargs=off", DEVICES)
    lines = own.stdout.splitlines()
    assert sorted(line.strip() for line in lines) == ["0 0", "1 0", "2 0", "3 0"]
    shared = allocation.jsrun("-n 1 -r 1 -a 1 -g 3 -c 7 -b none", DEVICES)
    assert shared.stdout == "0 0,1,2 0\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("-n 12 -r 6 -a 1 -g 1 -c 8 -b packed:8", "6 sets of 8 cores do not fit"),
        ("-n 2 -r 1 -a 1 -g 7 -c 42 -b none", "do not fit the 6 GPUs"),
        ("-n 3 -r 1 -a 1 -g 1 -c 42 -b none", "3 resource sets asked, 2 hosts hold 1 each"),
        ("-n 2 -r 1 -a 1 -g 1 -c 42 -b none --frobnicate", "unrecognized arguments"),
        ("-n 2 -r 1 -a 1 -g 1 -c 42 -b none -l GPU-CPU", "invalid choice"),
    ],
)
def test_jsrun_enforces_its_rules(allocation: Allocation, options: str, words: str) -> None:
    done = allocation.jsrun(options, "true")
    assert done.returncode == 255
    assert words in done.stderr


def test_jsrun_outside_a_job_is_refused(allocation: Allocation) -> None:
    done = subprocess.run(
        ["jsrun", "-n", "1", "true"],
        env=allocation.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (255, "jsrun: not inside a job\n")


def test_a_failed_task_ends_its_step(allocation: Allocation) -> None:
    fail = "[ $JSM_NAMESPACE_RANK = 1 ] && exit 5; exec sleep 300"
    assert allocation.jsrun("-n 2 -r 1 -a 2 -c 2 -b none", fail).returncode == 5


def test_blaunch_keeps_to_the_allocation_and_returns_the_status(allocation: Allocation) -> None:
    assert "c3 is not allocated" in allocation.run("blaunch", "c3", "true").stderr
    done = allocation.run("blaunch", "-no-shell", "c2", "sh", "-c", "echo $HPCSNGD_PLAYED_HOST; exit 3")
    assert (done.returncode, done.stdout) == (3, "c2\n")
    split = allocation.run("blaunch", "c1", "echo", "'a", "  b'")
    assert split.stdout == "a   b\n"


def test_lsrun_loses_the_status_and_permutes_options(allocation: Allocation) -> None:
    assert allocation.run("lsrun", "-m", "c3", "--", "false").returncode == 0
    done = allocation.run("lsrun", "-m", "c1", "sh", "-c", "true")
    assert (done.returncode, done.stderr) == (255, "lsrun: invalid option -- 'c'\n")
    assert allocation.run("lsrun", "-m", "c1", "--", "echo", "'a   b'").stdout == "a   b\n"


def test_usr2_ends_lsrun_with_its_task(allocation: Allocation) -> None:
    client = subprocess.Popen(["lsrun", "-m", "c1", "--", "sleep", "300"], env=allocation.inside)
    _until(lambda: len(life.processes(allocation.book.folder, allocation.key, "c1")) == 1)
    client.send_signal(12)
    assert client.wait(timeout=30) == -12
    _until(lambda: not life.processes(allocation.book.folder, allocation.key, "c1"))
