"""What Slurm says of a job that got SIGTERM; the answers were recorded on Slurm 22.05."""

from __future__ import annotations

import pytest

from hpcsngd.errors import SchedulerError
from hpcsngd.launch import ownjob
from hpcsngd.launch.ownjob import OwnJob


@pytest.mark.parametrize(
    ("text", "fate"),
    [
        ("RUNNING             0           N/A                   9:58  \n", "running"),
        ("RUNNING             0           2026-11-21T14:00:45   9:58  \n", "preempted"),
        ("COMPLETING          1           N/A                   10:00 \n", "restarting"),
        ("COMPLETING          0           N/A                   9:59  \n", "ending"),
        ("PENDING             1           N/A                   10:00 \n", "restarting"),
        ("CANCELLED           0           N/A                   0:00  \n", "ending"),
    ],
)
def test_fate(text: str, fate: str) -> None:
    job = ownjob.parse(text)
    assert job is not None
    assert job.fate(restarts=0) == fate


def test_restarts_before_this_process_do_not_count() -> None:
    job = ownjob.parse("COMPLETING 2 N/A 9:59")
    assert job is not None
    assert (job.fate(restarts=1), job.fate(restarts=2)) == ("restarting", "ending")


@pytest.mark.parametrize(
    ("left", "seconds"),
    [
        ("0:05", 5),
        ("9:58", 598),
        ("1:00:01", 3601),
        ("2-03:00:00", 183600),
        ("UNLIMITED", None),
        ("INVALID", None),
    ],
)
def test_time_left(left: str, seconds: float | None) -> None:
    assert ownjob.parse(f"RUNNING 0 N/A {left}") == OwnJob("RUNNING", 0, False, seconds)


@pytest.mark.parametrize("text", ["", "\n", "RUNNING 0 N/A", "RUNNING many N/A 1:00"])
def test_another_form_is_no_answer(text: str) -> None:
    assert ownjob.parse(text) is None


def test_a_silent_slurm_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise SchedulerError("squeue did not answer within 1 s")

    monkeypatch.setattr(ownjob, "command_output", refuse)
    assert ownjob.ask("7", timeout_s=1.0) is None
