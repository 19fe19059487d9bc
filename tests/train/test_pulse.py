"""Heartbeats of a rank: what it measures, and when a file is written."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hpcsngd import lifeline
from hpcsngd.train import pulse
from hpcsngd.train.pulse import Heartbeat, Pulse

from .runs import make_run, train


def test_every_call_is_progress_and_the_step_stays_until_the_next() -> None:
    told = Pulse(rank=3)
    assert (told.beat().name, told.beat().phase, told.beat().beats) == ("rank3", "import", 0)
    told.at("update", 7)
    told.at("data")
    assert (told.beat().phase, told.beat().step, told.beat().beats) == ("data", 7, 2)


def test_the_longest_gap_between_boundaries_is_without_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.0, 18.0])
    monkeypatch.setattr(pulse.time, "monotonic", lambda: next(clock))
    told = Pulse()
    told.boundary()
    told.boundary()
    told.saved(5.0)
    told.boundary()
    assert (told.beat().boundary_s, told.beat().checkpoint_s) == (2.0, 5.0)


def test_a_heartbeat_is_written_at_once_and_at_the_end(tmp_path: Path) -> None:
    told = Pulse()
    with Heartbeat(told, tmp_path):
        deadline = time.monotonic() + 10
        while (first := lifeline.read_beat(tmp_path, "rank0")) is None:
            assert time.monotonic() < deadline, "no heartbeat was written"
            time.sleep(0.01)
        told.at("done", 5)
    last = lifeline.read_beat(tmp_path, "rank0")
    assert last is not None
    assert (first.phase, last.phase, last.step) == ("import", "done", 5)


def test_a_folder_that_cannot_be_written_does_not_end_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = Pulse()
    with Heartbeat(told, tmp_path / "file"):
        told.at("data")
    assert told.beat().phase == "data"


def test_a_call_is_cheap() -> None:
    told = Pulse()
    started = time.perf_counter()
    for step in range(10_000):
        told.at("compute", step)
    # a microsecond here; a step of training takes a thousand at least
    assert (time.perf_counter() - started) / 10_000 < 50e-6


def test_training_tells_where_it_stands(tmp_path: Path) -> None:
    from hpcsngd.train import session

    from .runs import CPU

    run, told = make_run(tmp_path), Pulse()
    assert session.train(run, 1, CPU, started=time.monotonic(), pulse=told)
    beat = told.beat()
    assert (beat.phase, beat.step) == ("done", 26)
    assert beat.checkpoint_s > 0
    assert beat.boundary_s > 0


def test_training_without_a_pulse_writes_no_heartbeats(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert train(run)
    assert not run.attempt(1).heartbeats.exists()
