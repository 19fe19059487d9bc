"""Ranks that begin and end one by one: who is lost, who has failed, and when it is over."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from hpcsngd.handover import EXIT_STOPPED
from hpcsngd.launch.crew import Crew
from hpcsngd.launch.processes import Child
from hpcsngd.rundir import Attempt, Fault


def crew(tmp_path: Path, texts: dict[int, str]) -> tuple[Crew, Attempt]:
    attempt = Attempt(tmp_path / "1")
    children = {
        rank: Child(
            [sys.executable, "-c", f"import os, sys, time; print('rank {rank}'); {text}"],
            os.environ,
            *(attempt.rank_log(rank, stream) for stream in ("out", "err")),
        )
        for rank, text in texts.items()
    }
    return Crew(children, attempt, "here"), attempt


def wait(found: Crew) -> int:
    deadline = time.monotonic() + 120
    while (status := found.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return status


KILLED = "sys.stdout.flush(); os.kill(os.getpid(), 9)"


@pytest.mark.parametrize("server", [0, EXIT_STOPPED])
def test_a_lost_worker_is_reported_and_is_no_failure(tmp_path: Path, server: int) -> None:
    found, attempt = crew(tmp_path, {0: f"sys.exit({server})", 1: KILLED, 2: f"sys.exit({server})"})
    assert wait(found) == server
    assert attempt.lost_ranks() == {1: "on here was ended by SIGKILL (signal 9)"}


def test_a_worker_that_tells_its_fault_is_not_lost(tmp_path: Path) -> None:
    found, attempt = crew(tmp_path, {1: "sys.exit(1)", 2: ""})
    attempt.write_fault(Fault("missing_data", "no such file", "here", rank=1))
    assert wait(found) == 1
    assert attempt.lost_ranks() == {}
    assert found.tail() == ["rank 1"]


def test_the_end_of_the_server_is_the_end(tmp_path: Path) -> None:
    found, attempt = crew(tmp_path, {0: KILLED, 1: "time.sleep(600)"})
    assert wait(found) == -9
    assert attempt.lost_ranks() == {}
    found.end(0.0)
    assert found.tail() == ["rank 0"]
