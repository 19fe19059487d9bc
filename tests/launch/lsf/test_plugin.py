"""submitit on a played LSF, as anybody who installs us would use it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import submitit
from submitit.core import plugins, utils
from submitit.helpers import Checkpointable

from hpcsngd.errors import SchedulerError
from hpcsngd.launch import processes
from hpcsngd.launch.lsf import control, jobs, node, plugin, watching
from hpcsngd.launch.queued import Answer
from hpcsngd.launch.rehearse import lsf_commands, lsf_listing
from hpcsngd.launch.rehearse.book import Book

from .conftest import Play, left_over, wait_until


@pytest.fixture
def executor(tmp_path: Path) -> submitit.AutoExecutor:
    """submitit's executor for the LSF that the test has put in PATH, made when it is first needed."""
    made = submitit.AutoExecutor(tmp_path / "logs", cluster="lsf")
    made.update_parameters(timeout_min=30, name="odd name[1]")
    return made


def place(value: int) -> dict[str, Any]:
    """Returns where it runs; prints to both streams."""
    here = submitit.JobEnvironment()
    print("out of", here.global_rank)
    print("err of", here.global_rank, file=sys.stderr)
    return {
        "value": value,
        "job": here.job_id,
        "rank": here.global_rank,
        "local": here.local_rank,
        "node": here.node,
        "tasks": here.num_tasks,
        "hosts": list(here.hostnames),
        "host": os.environ["HPCSNGD_PLAYED_HOST"],
    }


def fail() -> None:
    raise ValueError("bad luck")


def sleep(seconds: float = 600.0) -> None:
    """Sleeps, and so does a child that it starts."""
    subprocess.run(["sleep", str(seconds)], check=False)


class Counter(Checkpointable):
    """Counts its starts in its own pickle; ends at the second."""

    def __init__(self, folder: Path) -> None:
        self.starts = 0
        self.folder = folder

    def __call__(self) -> int:
        self.starts += 1
        (self.folder / f"start{self.starts}").touch()
        if self.starts == 1:
            time.sleep(600)
        return self.starts

    def checkpoint(self) -> utils.DelayedSubmission:
        return utils.DelayedSubmission(self)


def test_the_entry_points_are_registered() -> None:
    """A fresh installation is needed for this; an editable one made before the plugin has none."""
    found = {point.name: point.value for point in entry_points(group="submitit")}
    assert found["executor"] == "hpcsngd.launch.lsf.plugin:LsfExecutor"
    assert found["job_environment"] == "hpcsngd.launch.lsf.plugin:LsfJobEnvironment"
    assert plugins.get_executors()["lsf"] is plugin.LsfExecutor
    assert isinstance(plugins.get_job_environments()["lsf"], plugin.LsfJobEnvironment)


def test_without_bsub_it_does_not_offer_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert plugin.LsfExecutor.affinity() == -1
    with pytest.raises(RuntimeError, match="bsub is not in PATH"):
        plugin.LsfExecutor(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("flavor", ["ibm", "compatible", "csm"])
def test_tasks_on_several_hosts(play: Play, request: pytest.FixtureRequest, flavor: str) -> None:
    book = play(flavor)
    executor: submitit.AutoExecutor = request.getfixturevalue("executor")
    executor.update_parameters(nodes=2, tasks_per_node=2, lsf_project="abc")
    job = executor.submit(place, 5)
    told = job.results()
    assert [each["rank"] for each in told] == [0, 1, 2, 3]
    assert [each["local"] for each in told] == [0, 1, 0, 1]
    assert [each["node"] for each in told] == [0, 0, 1, 1]
    assert {each["job"] for each in told} == {job.job_id}
    hosts = told[0]["hosts"]
    assert len(hosts) == 2
    assert "batch1" not in hosts
    assert [each["host"] for each in told] == [hosts[0], hosts[0], hosts[1], hosts[1]]
    assert job.task(3).stdout() is not None
    assert "out of 3" in (job.task(3).stdout() or "")
    assert "err of 3" in (job.task(3).stderr() or "")
    (record,) = book.jobs()
    assert record.name == "odd-name-1"
    wait_until(lambda: book.jobs()[0].has_ended, "the end of the job")
    assert (book.jobs()[0].state, left_over(book)) == ("done", [])


@pytest.mark.slow
def test_an_array_counts_from_one_and_is_split(play: Play, request: pytest.FixtureRequest) -> None:
    play("ibm", facts={"MAX_JOB_ARRAY_SIZE": "2"})
    executor: submitit.AutoExecutor = request.getfixturevalue("executor")
    executor.update_parameters(lsf_array_parallelism=2)
    made = executor.map_array(place, [10, 20, 30])
    first, second, third = (job.job_id for job in made)
    assert first.endswith("_1")
    assert second == first.replace("_1", "_2")
    assert "_" not in third or third.endswith("_1")
    told = [job.result() for job in made]
    assert [each["value"] for each in told] == [10, 20, 30]
    assert [each["job"] for each in told] == [first, second, third]
    assert made[1].paths.submission_file.name == f"{first.partition('_')[0]}_submission.sh"


@pytest.mark.slow
def test_a_failure_is_told_with_its_trace(play: Play, request: pytest.FixtureRequest) -> None:
    book = play("ibm")
    executor: submitit.AutoExecutor = request.getfixturevalue("executor")
    job = executor.submit(fail)
    with pytest.raises(utils.FailedJobError, match="ValueError: bad luck"):
        job.result()
    wait_until(lambda: book.jobs()[0].has_ended, "the end of the job")
    assert book.jobs()[0].exit_code == 1


@pytest.mark.slow
def test_cancel_ends_everything_and_is_no_success(play: Play, request: pytest.FixtureRequest) -> None:
    book = play("ibm")
    executor: submitit.AutoExecutor = request.getfixturevalue("executor")
    executor.update_parameters(nodes=2)
    job = executor.submit(sleep)
    pids = [wait_for_pid(job, rank) for rank in (0, 1)]
    assert job.watcher.get_state(job.job_id, mode="force") == "RUNNING"
    job.cancel()
    wait_until(lambda: book.jobs()[0].has_ended, "the end of the job")
    assert [processes.start_ticks(pid) for pid in pids] == [None, None]
    assert left_over(book) == []
    wait_until(job.task(0).done, "submitit's word")
    assert job.task(0).state == "CANCELLED"
    job.cancel()  # again is no error
    with pytest.raises(utils.UncompletedJobError, match="state: CANCELLED"):
        plugin_without_patience(job).task(0).result()


def wait_for_pid(job: submitit.Job[Any], rank: int) -> int:
    """Returns the process of a task once it runs, by what submitit logs."""
    folder = job.paths.folder

    def found() -> list[int]:
        return [
            pid
            for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
            if rank_of(pid) == (str(rank), str(folder)) and is_ours(pid)
        ]

    wait_until(found, f"the start of task {rank}")
    return found()[0]


def rank_of(pid: int) -> tuple[str, str]:
    try:
        environment = dict(
            word.split("=", 1)
            for word in Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
            if "=" in word
        )
    except OSError:
        return "", ""
    return environment.get(node.GLOBAL_RANK, ""), environment.get("SUBMITIT_FOLDER", "")


def is_ours(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep")


def plugin_without_patience(job: submitit.Job[Any]) -> submitit.Job[Any]:
    """Returns the same job; a result that will never come need not be waited for."""
    for task in job._sub_jobs:
        task._results_timeout_s = 0
    return job


@pytest.mark.slow
def test_a_checkpoint_is_requeued_and_goes_on(
    play: Play, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """LSF's own signal has submitit checkpoint and requeue; that the job looks ended meanwhile is no end."""
    book = play("ibm", requeue_gap_s=3.0)
    executor: submitit.AutoExecutor = request.getfixturevalue("executor")
    job = executor.submit(Counter(tmp_path))
    wait_until((tmp_path / "start1").exists, "the first start")
    time.sleep(0.5)  # submitit has set its handlers before it calls the function
    job._interrupt(timeout=True)
    wait_until(lambda: book.jobs()[0].has_ended, "the moment in which it looks ended")
    job.watcher.update()
    assert job.watcher.get_state(job.job_id, mode="cache") in ("REQUEUED", "PENDING", "RUNNING")
    assert job.result() == 2
    assert book.jobs()[0].restarts == 1
    mark = control.requeued_mark(control.job_folder(job.paths.folder, job.job_id))
    assert not mark.exists()


@pytest.mark.slow
def test_children_do_not_survive_their_launcher(play: Play, request: pytest.FixtureRequest) -> None:
    book = play("ibm")
    executor: submitit.AutoExecutor = request.getfixturevalue("executor")
    executor.update_parameters(nodes=2)
    job = executor.submit(sleep)
    pids = [wait_for_pid(job, rank) for rank in (0, 1)]
    head = book.jobs()[0].pid
    launchers = [pid for pid in processes.descendants(head) if b"blaunch" in cmdline(pid)]
    assert launchers
    for pid in launchers:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: [processes.start_ticks(pid) for pid in pids] == [None, None], "the end of the tasks")
    wait_until(lambda: book.jobs()[0].has_ended, "the end of the job")
    assert book.jobs()[0].state == "exit"


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def watcher_of(book: Book, state: str, monkeypatch: pytest.MonkeyPatch) -> watching.LsfWatcher:
    """Returns a watcher that knows one finished job of the book, shown in a state."""
    monkeypatch.setattr(watching, "SETTLE_S", 0.0)
    watcher = watching.LsfWatcher(delay_s=1)
    watcher.register_job("101")
    with book.changing("101") as job:
        job.options[lsf_listing.SHOWN_STATE] = state
    watcher.update()
    return watcher


@pytest.mark.parametrize(
    ("shown", "state", "is_done"),
    [
        ("UNKWN", "UNKNOWN", False),
        ("ZOMBI", "UNKNOWN", False),
        ("PSUSP", "PENDING", False),
        ("SSUSP", "RUNNING", False),
        ("USUSP", "RUNNING", False),
        ("PROV", "PENDING", False),
        ("DONE", "COMPLETED", True),
    ],
)
def test_states_in_submitits_words(
    play: Play, monkeypatch: pytest.MonkeyPatch, shown: str, state: str, is_done: bool
) -> None:
    book = finished(play)
    watcher = watcher_of(book, shown, monkeypatch)
    assert watcher.get_state("101", mode="cache") == state
    assert watcher.is_done("101", mode="cache") is is_done


def finished(play: Play, **more: Any) -> Book:
    """Returns a book with one job that has ended."""
    book = play("ibm", **more)
    subprocess.run(["bsub", "-W", "5", "true"], check=True, capture_output=True)
    wait_until(lambda: book.jobs()[0].has_ended, "the end of the job")
    return book


def test_an_end_counts_only_when_it_has_stood(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(play)
    monkeypatch.setattr(watching, "SETTLE_S", 1.0)
    watcher = watching.LsfWatcher(delay_s=600)
    watcher.register_job("101")
    watcher.update()
    assert watcher.get_state("101", mode="cache") == "COMPLETING"
    wait_until(lambda: watcher.is_done("101"), "the belief in the end")
    assert watcher.get_state("101", mode="cache") == "COMPLETED"


def test_a_forgotten_job_is_found_in_the_history_or_lost(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    book = finished(play, forget_s=0.0)
    watcher = watcher_of(book, "RUN", monkeypatch)
    assert watcher.get_state("101", mode="cache") == "COMPLETED"
    watcher.register_job("999")
    for _ in range(watching.LOST_ROUNDS):
        assert not watcher.is_done("999", mode="cache")
        watcher.update()
    assert watcher.get_state("999", mode="cache") == "LOST"
    assert watcher.is_done("999", mode="cache")


def test_an_outage_changes_nothing(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    book = finished(play)
    watcher = watcher_of(book, "RUN", monkeypatch)
    (book.folder / lsf_commands.DOWN).touch()
    for _ in range(2 * watching.LOST_ROUNDS):
        watcher.update()
    assert watcher.get_state("101", mode="cache") == "RUNNING"


def test_a_job_that_asked_for_its_requeue_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "SETTLE_S", 0.0)
    monkeypatch.setattr(jobs, "ask", lambda ids, **_: Answer({"7": jobs.Job("7", "DONE")}))
    mark = control.requeued_mark(control.job_folder(tmp_path, "7"))
    mark.parent.mkdir()
    mark.touch()
    watcher = watching.LsfWatcher()
    watcher.register_job("7")
    watcher.register_folder("7", tmp_path)
    watcher.update()
    assert watcher.get_state("7", mode="cache") == "REQUEUED"
    monkeypatch.setattr(watching, "REQUEUE_S", 0.0)  # killed while it was pending: the mark stays
    watcher.update()
    assert watcher.get_state("7", mode="cache") == "COMPLETED"


def test_parameters_are_checked(play: Play, tmp_path: Path) -> None:
    play("compatible")
    made = plugin.LsfExecutor(tmp_path)
    with pytest.raises(ValueError, match=r"unknown parameter\(s\) walltime; allowed: alloc_flags, "):
        made.update_parameters(walltime=5)
    with pytest.raises(ValueError, match="LSF flavor 'vax'"):
        made.update_parameters(flavor="vax")
    made = plugin.LsfExecutor(tmp_path)
    made.update_parameters(options={"alloc_flags": "smt4"})
    with pytest.raises(SchedulerError, match="bsub of flavor compatible has no option -alloc_flags"):
        made.submit(place, 1)


def test_a_sites_refusal_is_quoted(play: Play, tmp_path: Path) -> None:
    play("ibm", is_project_needed=True, queues=("batch",))
    made = plugin.LsfExecutor(tmp_path)
    with pytest.raises(utils.FailedSubmissionError, match="esub: a project is required: -P PROJECT"):
        made.submit(place, 1)
    made.update_parameters(project="abc", queue="nope")
    with pytest.raises(utils.FailedSubmissionError, match=r"nope: No such queue\. Job not submitted\."):
        made.submit(place, 1)


def test_a_job_with_too_few_hosts_says_so_where_people_look(play: Play, tmp_path: Path) -> None:
    """ptile is the site's to lose: the head counts the hosts before it starts anything."""
    book = play("ibm")
    made = plugin.LsfExecutor(tmp_path)
    made.update_parameters(nodes=2, options={"n": 2, "R": "span[ptile=2]"})
    job = made.submit(place, 1)
    wait_until(lambda: book.jobs()[0].has_ended, "the end of the job")
    assert "asked for 2 node(s), LSB_DJOB_HOSTFILE names 1: c1" in (job.task(0).stderr() or "")
