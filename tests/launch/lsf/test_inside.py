"""Inside a job: which tasks a starter starts, what they are told, the files between head and starters."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from hpcsngd.errors import SchedulerError
from hpcsngd.launch import programs
from hpcsngd.launch.lsf import control, head, jobs, node, plugin, render
from hpcsngd.launch.lsf.control import Control, Pulse, Work
from hpcsngd.launch.lsf.launchers import ResourceSets
from hpcsngd.launch.lsf.node import StandingError, Task
from hpcsngd.launch.programs import Said

from .conftest import wait_until

WORK = Work("60_4", ("c2.site.org", "c1.site.org"), 2, ("python", "-m", "x"), "/logs")


def jsm(rank: int, local_rank: int, size: int = 4, local_size: int = 2) -> dict[str, str]:
    names = {"RANK": rank, "SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_SIZE": local_size}
    return {f"JSM_NAMESPACE_{name}": str(value) for name, value in names.items()}


def test_a_numbered_starter_starts_the_tasks_of_its_host() -> None:
    assert node.tasks(WORK, 1, "c1", {}) == [Task(2, 1, 0), Task(3, 1, 1)]


def test_under_jsrun_a_starter_is_one_task_of_its_host_whatever_jsruns_order() -> None:
    assert node.tasks(WORK, None, "c1", jsm(0, 1)) == [Task(3, 1, 1)]
    assert node.tasks(WORK, None, "c2", jsm(3, 0)) == [Task(0, 0, 0)]
    # a host that calls itself otherwise is found by the packed order of ranks
    assert node.tasks(WORK, None, "elsewhere", jsm(2, 0)) == [Task(2, 1, 0)]
    with pytest.raises(StandingError, match="neither a number nor jsrun says"):
        node.tasks(WORK, None, "c1", {})


def test_what_a_task_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Control.begin(control.job_folder(tmp_path, "60_4"), WORK)
    for name, value in node.task_environment(WORK, Task(3, 1, 1), files).items():
        monkeypatch.setenv(name, value)
    here = plugin.LsfJobEnvironment()
    assert here.activated()
    assert (here.job_id, here.array_job_id, here.array_task_id) == ("60_4", "60", "4")
    assert (here.num_nodes, here.node, here.num_tasks) == (2, 1, 4)
    assert (here.global_rank, here.local_rank) == (3, 1)
    assert here.hostnames == ["c2.site.org", "c1.site.org"]
    assert control.own().work() == WORK


def test_an_ordinary_job_has_no_array_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSB_JOBID", "7")
    monkeypatch.setenv("LSB_JOBINDEX", "0")
    monkeypatch.delenv(node.HOSTS, raising=False)
    here = plugin.LsfJobEnvironment()
    assert (here.job_id, here.array_job_id, here.array_task_id) == ("7", None, None)
    assert here.hostnames == [here.hostname]
    assert head.job_id() == "7"
    monkeypatch.setenv("LSB_JOBINDEX", "3")
    assert head.job_id() == "7_3"


def test_each_start_has_files_of_its_own(tmp_path: Path) -> None:
    folder = control.job_folder(tmp_path, "7")
    first = Control.begin(folder, WORK)
    assert (first.restarts, first.exits(), first.orders(), first.pulse()) == (0, {}, [], None)
    first.write_exit(1, -9)
    first.order([12, 15])
    first.beat(Pulse(1, 59.5, 0))
    assert (first.exits(), first.orders(), first.pulse()) == ({1: -9}, [12, 15], Pulse(1, 59.5, 0))
    control.requeued_mark(folder).touch()
    second = Control.begin(folder, WORK)
    assert (second.restarts, second.exits(), control.starts(folder)) == (1, {}, 2)
    assert not control.requeued_mark(folder).exists()


def test_a_requeue_is_asked_of_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Control.begin(control.job_folder(tmp_path, "7"), WORK)
    monkeypatch.setenv(control.FOLDER, str(files.folder))
    with pytest.raises(SchedulerError, match=r"the head of LSF job 7 did not answer within 0\.3 s"):
        jobs.requeue("7", timeout_s=0.3)
    assert files.request_file.exists()

    def answer(error: str) -> None:
        wait_until(files.request_file.exists, "the request")
        files.answer(error)

    for error in ("", "brequeue refused: User permission denied"):
        files.request_file.unlink(missing_ok=True)
        serving = threading.Thread(target=answer, args=(error,))
        serving.start()
        if error:
            with pytest.raises(SchedulerError, match="User permission denied"):
                jobs.requeue("7", timeout_s=30)
        else:
            jobs.requeue("7", timeout_s=30)
        serving.join()


def test_the_own_job_by_the_heads_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Control.begin(control.job_folder(tmp_path, "7"), WORK)
    monkeypatch.setenv(control.FOLDER, str(files.folder))
    assert jobs.own_job("7", timeout_s=1) is None
    fates = {"RUNNING": "running", "REQUEUED": "restarting", "KILLED": "ending"}
    for word, fate in fates.items():
        files.beat(Pulse(1, 100.0, 0, word))
        job = jobs.own_job("7", timeout_s=0.2)  # a head that is silent is not waited for
        assert job is not None
        assert (job.fate(0), job.left_s) == (fate, 100.0)


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        (Said("Job <7> is being requeued\n", "", 0), ""),
        # LSF's INT for the job has reached brequeue, too
        (Said("Job <7> is being requeued\n", "KeyboardInterrupt", -2), ""),
        (
            Said("", "Job <7>: No such job", 255),
            "brequeue refused: Job <7>: No such job",
        ),
        (SchedulerError("brequeue is not installed here"), "brequeue is not installed here"),
    ],
)
def test_what_brequeue_says(monkeypatch: pytest.MonkeyPatch, said: Any, refusal: str) -> None:
    def run(words: list[str], **_: object) -> Said:
        assert words == ["brequeue", "7"]
        if isinstance(said, SchedulerError):
            raise said
        return said

    monkeypatch.setattr(programs, "run", run)
    assert head._requeue("7") == refusal


def test_the_script_is_bash_that_hands_everything_to_the_head(tmp_path: Path) -> None:
    settings = render.Head(
        python=f"{tmp_path}/python",
        folder=f"{tmp_path}/log s/%j",
        log_folder=f"{tmp_path}/log s",
        nodes=2,
        tasks_per_node=1,
        walltime_min=30,
        warning_s=90,
        launcher="jsrun",
        launcher_args=("--smpiargs=off",),
        sets=ResourceSets(1, 1, 6, 42, "none"),
        batch_host="yes",
        straggler_s=60,
        is_joined=True,
    )
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@" "$SUBMITIT_EXECUTOR" "$MODULE"\n')
    (tmp_path / "python").chmod(0o755)
    file = tmp_path / "job.sh"
    file.write_text(render.script(settings, "python -u -m x 'a b'", setup=["export MODULE=loaded"]))
    environment = {"LSB_JOBID": "7", "LSB_JOBINDEX": "4", "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", str(file)], check=True, env=environment)
    told = (tmp_path / "log s" / "7_4_head.log").read_text().splitlines()
    assert told[:4] == ["-u", "-m", "hpcsngd.launch.lsf.head", f"{tmp_path}/log s/%j"]
    assert told[-8:] == ["--", "python", "-u", "-m", "x", "a b", "lsf", "loaded"]
    asked, command = head._arguments(told[3:-2])
    assert command == ["python", "-u", "-m", "x", "a b"]
    assert (asked.nodes, asked.limit_min, asked.warning_s, asked.straggler_s) == (2, 30, 90, 60)
    assert (asked.launcher, asked.launcher_arg, asked.batch_host) == ("jsrun", ["--smpiargs=off"], "yes")
    assert head._sets(asked.sets) == settings.sets
    assert asked.join


def test_the_heads_word_is_the_one_after_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Control.begin(control.job_folder(tmp_path, "7"), WORK)
    monkeypatch.setenv(control.FOLDER, str(files.folder))
    coming = iter([Pulse(4, 9.0, 0), Pulse(5, 8.0, 0), Pulse(6, 7.0, 0, "REQUEUED")])
    monkeypatch.setattr(Control, "pulse", lambda _: next(coming))
    job = jobs.own_job("7", timeout_s=30)
    assert job is not None
    assert (job.fate(0), job.left_s) == ("restarting", 7.0)
