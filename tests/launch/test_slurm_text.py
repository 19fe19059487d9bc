"""Slurm's words, on recorded output of Slurm 22.05 (and the state codes of its manual pages)."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from hpcsngd.errors import SchedulerError
from hpcsngd.launch import slurm
from hpcsngd.rundir import FAULT_KINDS, STATES

SACCT = """\
101|COMPLETED|None
102|CANCELLED by 0|None
103|FAILED|NonZeroExitCode
104|TIMEOUT|None
104.batch|CANCELLED|
105_3|NODE_FAIL|None
106|OUT_OF_ME+|None
"""
SQUEUE = """\
201|PENDING|Resources
202|RUNNING|None
203|COMPLETING|None
204|PENDING|BeginTime

slurm_load_jobs warning: something
"""


def test_sacct_output() -> None:
    jobs = slurm.parse_jobs(SACCT)
    assert sorted(jobs) == ["101", "102", "103", "104", "105_3", "106"]
    assert jobs["102"] == slurm.Job("102", "CANCELLED", "by 0")
    assert jobs["103"] == slurm.Job("103", "FAILED", "NonZeroExitCode")
    assert all(jobs[job].phase == slurm.ENDED for job in ("101", "102", "103", "104", "105_3"))


def test_squeue_output() -> None:
    jobs = slurm.parse_jobs(SQUEUE)
    assert {job: found.phase for job, found in jobs.items()} == {
        "201": slurm.PENDING,
        "202": slurm.RUNNING,
        "203": slurm.RUNNING,
        "204": slurm.PENDING,
    }
    assert jobs["201"].detail == "Resources"


def test_unknown_words_stay_unknown() -> None:
    assert slurm.Job("1", "TELEPORTED").phase == slurm.UNKNOWN


@pytest.mark.parametrize(
    ("state", "ours", "kind"),
    [
        ("COMPLETED", "failed", "unknown"),
        ("CANCELLED", "cancelled", "killed"),
        ("FAILED", "failed", "unknown"),
        ("TIMEOUT", "timeout", "walltime"),
        ("NODE_FAIL", "failed", "node_failure"),
        ("BOOT_FAIL", "failed", "node_failure"),
        ("OUT_OF_MEMORY", "failed", "out_of_memory"),
        ("PREEMPTED", "preempted", "preempted"),
        ("DEADLINE", "cancelled", "killed"),
        ("REVOKED", "cancelled", "killed"),
        ("LAUNCH_FAILED", "failed", "node_failure"),
        ("TELEPORTED", "failed", "unknown"),
    ],
)
def test_a_job_that_ends_without_a_status_never_succeeded(state: str, ours: str, kind: str) -> None:
    found = slurm.Job("1", state, "by 0").ending()
    assert found[:2] == (ours, kind)
    assert f"(Slurm: {state} by 0)" in found[2]
    assert ours in STATES
    assert kind in FAULT_KINDS


def program(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing but bash and cat, for stand-in programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "cat", "sleep"):
        (folder / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_squeue_answers_and_sacct_is_asked_for_the_rest_once(path: Path) -> None:
    program(path, "squeue", 'echo "$@" >> "$0.calls"; echo "7|RUNNING|None"')
    program(path, "sacct", 'echo "$@" >> "$0.calls"; printf "8|FAILED|None\\n8.0|FAILED|\\n"')
    answer = slurm.ask(["7", "8", "9"], timeout_s=5)
    assert {job: found.state for job, found in answer.jobs.items()} == {"7": "RUNNING", "8": "FAILED"}
    assert (answer.is_complete, answer.complaints) == (True, ())
    assert (path / "squeue.calls").read_text().endswith("--jobs 7,8,9\n")
    assert (path / "sacct.calls").read_text().endswith("--jobs 8,9\n")


def test_a_forgotten_job_is_an_answer_and_a_missing_sacct_no_harm(path: Path) -> None:
    program(path, "squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    answer = slurm.ask(["7"], timeout_s=5)
    assert answer.jobs == {}
    assert answer.is_complete
    assert "sacct is not installed here" in answer.complaints[0]


def test_without_squeue_silence_means_nothing(path: Path) -> None:
    program(path, "sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
    answer = slurm.ask(["7"], timeout_s=5)
    assert not answer.is_complete
    assert answer.complaints[1] == "sacct refused: Slurm accounting storage is disabled"


def test_a_program_that_hangs_is_given_up(path: Path) -> None:
    program(path, "squeue", "sleep 30")
    with pytest.raises(SchedulerError, match=r"squeue did not answer within 0\.2 s"):
        slurm.command_output(["squeue"], timeout_s=0.2)


def test_a_program_that_cannot_be_run_says_so(path: Path) -> None:
    (path / "squeue").write_text("not a program")
    with pytest.raises(SchedulerError, match="squeue cannot be run: Permission denied"):
        slurm.command_output(["squeue"], timeout_s=5)
