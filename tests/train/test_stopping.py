"""A stop request as a file or as SIGTERM, and what a run that heeds it leaves behind."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from hpcsngd import rundir
from hpcsngd.train import stopping
from hpcsngd.train.stopping import StopRequest

from .runs import make_run, train


def test_the_file_is_looked_for_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    request = StopRequest(tmp_path / "stop-request")
    assert not request.is_seen()
    (tmp_path / "stop-request").touch()
    assert not request.is_seen()
    now += stopping.POLL_S
    assert request.is_seen()


def test_sigterm_is_a_request_while_training_and_deadly_again_later(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(tmp_path / "stop-request") as request:
        assert not request.is_seen()
        signal.raise_signal(signal.SIGTERM)
        assert request.is_seen()
        assert request.is_seen()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stopped_run_says_at_which_step(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.attempt(1).path.mkdir(parents=True)
    run.attempt(1).stop_request.touch()
    assert not train(run)
    assert rundir.read_yaml(run.attempt(1).stopped_yaml)["step"] == 1
    assert run.newest_checkpoint() == "step_1"
    assert not run.attempt(1).finished_yaml.exists()
