"""The hang guard on heartbeats in files: when it speaks, whom it names, whose stacks it asks for."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcsngd import lifeline
from hpcsngd.launch import watch
from hpcsngd.launch.watch import Watch
from hpcsngd.lifeline import Beat


def beat(rank: int, step: int, phase: str = "compute", beats: int = 1) -> Beat:
    return Beat(f"rank{rank}", f"n{rank // 2}", 1000 + rank, phase, step=step, beats=beats)


@pytest.fixture
def guard(tmp_path: Path) -> Watch:
    return Watch(tmp_path, [0, 1], start_timeout_s=100.0, hang_timeout_s=20.0, now=0.0)


def test_no_heartbeat_at_all_has_the_time_of_a_start(guard: Watch) -> None:
    assert [guard.silence(now) for now in (50.0, 100.0)] == [None, None]
    assert guard.silence(110.0) == 110.0


def test_progress_of_any_rank_counts(guard: Watch, tmp_path: Path) -> None:
    lifeline.write_beat(tmp_path, beat(0, 5))
    lifeline.write_beat(tmp_path, beat(1, 5))
    assert guard.silence(1.0) is None
    assert guard.silence(19.0) is None
    lifeline.write_beat(tmp_path, beat(1, 5, beats=2))
    assert guard.silence(25.0) is None
    assert guard.silence(44.0) is None
    assert guard.silence(50.0) == 25.0


def test_the_first_step_has_the_time_of_a_start(guard: Watch, tmp_path: Path) -> None:
    lifeline.write_beat(tmp_path, beat(0, 0))
    lifeline.write_beat(tmp_path, beat(1, 0))
    assert [guard.silence(now) for now in (1.0, 60.0, 100.0)] == [None, None, None]
    assert guard.silence(110.0) == 109.0


def test_files_are_read_seldom(guard: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(lifeline, "read_beat", lambda folder, name: read.append(name))
    for tenth in range(100):
        guard.silence(tenth / 10)
    assert len(read) == 4  # two ranks, every five seconds


def test_ranks_behind_are_named() -> None:
    beats = [beat(0, 8, "reduce"), beat(1, 8, "reduce"), beat(2, 8, "data"), beat(3, 8, "reduce")]
    line, evidence = watch.describe(beats, 600.2)
    assert line == "no progress for 600 s; behind: rank 2 on n1: after step 8, data"
    assert evidence == ["rank 2 on n1: after step 8, data"]


def test_a_rank_that_never_reported_is_named() -> None:
    line, _ = watch.describe([beat(0, 0, "rendezvous"), None], 1800)
    assert line == "no progress for 1800 s; behind: rank 1: no heartbeat in this attempt"


def test_equal_ranks_are_not_accused() -> None:
    line, _ = watch.describe([beat(0, 8, "reduce"), beat(1, 8, "reduce")], 60)
    assert (
        line == "no progress for 60 s; all ranks stand at the same place: rank 0 on n0: after step 8, reduce"
    )


def test_many_ranks_behind_are_counted() -> None:
    line, evidence = watch.describe([beat(rank, 3) for rank in range(11)] + [beat(11, 4)], 60)
    assert line.endswith(" and 3 more")
    assert len(evidence) == 8


def test_stacks_of_own_ranks_come_into_the_log_and_others_are_left_alone(tmp_path: Path) -> None:
    script = (
        "import faulthandler, signal, time\n"
        "faulthandler.register(signal.SIGUSR1)\n"
        "def stuck():\n    print('here', flush=True)\n    time.sleep(60)\n"
        "stuck()\n"
    )
    log = tmp_path / "node0.err"
    with log.open("a") as stream:
        process = subprocess.Popen([sys.executable, "-c", script], stderr=stream, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as output:
        output.readline()
    ours = dataclasses.replace(beat(0, 4), pid=process.pid)
    lifeline.write_beat(tmp_path, ours)
    lifeline.write_beat(tmp_path, dataclasses.replace(beat(1, 4), pid=os.getppid()))
    watch.dump_stacks(tmp_path, [0, 1], [log, log])
    deadline = time.monotonic() + 20
    while "in stuck" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    process.kill()
    process.wait()
    heading = f"hpcsngd: rank 0 on n0: after step 4, compute, process {process.pid}, has hung; its stacks:"
    assert log.read_text().splitlines()[0] == heading
    assert "rank 1" not in log.read_text()
