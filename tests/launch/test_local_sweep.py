"""Sweeps on this machine: cells in turn under a controller that nobody waits for."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from hpcsngd import rundir, sweepdir
from hpcsngd.config import matrix
from hpcsngd.config.matrix import Matrix
from hpcsngd.launch import processes, sweep, sweep_status
from hpcsngd.rundir import RunDir
from hpcsngd.sweepdir import SweepDir

from .conftest import EXPERIMENT, LOCAL_SITE, STANDIN

pytestmark = pytest.mark.usefixtures("standin")


def cells(tmp_path: Path, behavior: str, *axes: str, parallel: int | None = None) -> Matrix:
    site = {
        **LOCAL_SITE,
        "scheduler": {"kind": "local", "poll_s": 0.2, "parallel_cells": parallel},
        "env": {"OMP_NUM_THREADS": "1", "STANDIN": behavior},
        "launch": {"mode": "per_rank"},  # without torchrun, the stand-in starts at once
        "run_root": str(tmp_path / "runs"),
    }
    site_file, exp_file = tmp_path / "testsite.yaml", tmp_path / "standin.yaml"
    site_file.write_text(yaml.safe_dump(site))
    exp_file.write_text(yaml.safe_dump(EXPERIMENT | {"resources": {"ranks_per_node": 1, "walltime": "5m"}}))
    given = [matrix.parse(text) for text in axes]
    found = matrix.resolve(str(site_file), str(exp_file), (), given, environment={})
    assert found is not None
    return found


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.1)


def spans(place: SweepDir) -> list[tuple[str, str]]:
    """Returns start and end of every cell, in order."""
    found = []
    for run in place.runs():
        ended = run.status()
        assert ended is not None
        found.append((str(rundir.read_yaml(run.attempt(1).attempt_yaml)["start"]), ended.utc))
    return found


def test_cells_run_one_after_the_other_and_a_failed_one_stops_nothing(tmp_path: Path) -> None:
    found = cells(tmp_path, "ok", "site.env.STANDIN=ok,import", "seed=1,2")
    submitted = sweep.submit(found, argv=["test"], worker=STANDIN)
    ended = sweep_status.wait(submitted.sweep, poll_s=0.2)
    assert [state.state for _, state in ended.cells] == ["completed", "completed", "failed", "failed"]
    assert "no_such_module_anywhere" in ended.cells[2][1].reason
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans(submitted.sweep)))
    wait_until(lambda: processes.start_ticks(int(submitted.job_ids[0])) is None, "the end of the controller")


def test_cells_run_side_by_side_where_that_is_asked_for(tmp_path: Path) -> None:
    found = cells(tmp_path, "stop", "seed=1,2,3", parallel=2)
    place = sweep.submit(found, argv=[], worker=STANDIN).sweep
    wait_until(lambda: sweep_status.look(place).counts == {"running": 2, "pending": 1}, "two cells at once")
    waiting = place.runs()[2]
    assert rundir.read_yaml(waiting.attempt(1).submitted_yaml)["queued"] is True
    waiting.attempt(1).cancel_request.touch()
    for run in place.runs()[:2]:
        end(run)
    ended = sweep_status.wait(place, poll_s=0.2)
    assert ended.cells[2][1].state == "cancelled"
    assert ended.cells[2][1].reason == "cancelled before it started"
    assert not (waiting.path / "report").exists()


def test_the_controller_outlives_its_submitter(tmp_path: Path) -> None:
    found = cells(tmp_path, "ok", "seed=1,2")
    script = (
        "import os, signal, sys\n"
        "from hpcsngd.config import matrix\n"
        "from hpcsngd.launch import sweep\n"
        f"found = matrix.resolve({str(tmp_path / 'testsite.yaml')!r}, {str(tmp_path / 'standin.yaml')!r}, (),"
        " [matrix.parse('seed=1,2')])\n"
        f"sweep.submit(found, argv=[], worker={STANDIN!r})\n"
        "os.killpg(0, signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], start_new_session=True, check=False, timeout=60)
    assert done.returncode == -9
    place = sweepdir.open_sweep(sweep.directory(found).path)
    assert sweep_status.wait(place, poll_s=0.2).counts == {"completed": 2}


def test_cells_that_a_killed_controller_left_are_lost_and_start_next_time(tmp_path: Path) -> None:
    found = cells(tmp_path, "stop", "seed=1,2")
    submitted = sweep.submit(found, argv=[], worker=STANDIN)
    first, second = submitted.sweep.runs()
    wait_until((first.path / "report").exists, "the start of the first cell")
    os.kill(int(submitted.job_ids[0]), 9)
    wait_until(lambda: states(submitted.sweep) == ["running", "lost"], "the loss of the second")
    again = sweep.submit(found, argv=[], worker=STANDIN)
    assert (again.submitted, again.skipped) == (1, {"running": 1})
    wait_until((second.path / "report").exists, "the start of the second cell")
    assert [attempt.number for attempt in second.attempts()] == [1, 2]
    for run in (first, second):
        end(run)
    assert sweep_status.wait(submitted.sweep, poll_s=0.2).has_ended


def states(place: SweepDir) -> list[str]:
    return [state.state for _, state in sweep_status.look(place).cells]


def end(run: RunDir) -> None:
    """Ends the stand-in of a run."""
    run.attempts()[-1].stop_request.touch()
