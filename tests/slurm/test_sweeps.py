"""Sweeps on a real Slurm: one array with a limit, a failed cell submitted again alone, 1,000 cells."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from hpcsngd import rundir
from hpcsngd.config import matrix
from hpcsngd.config.matrix import Matrix
from hpcsngd.launch import cancel, slurm, status, sweep, sweep_status
from hpcsngd.rundir import Status

from .conftest import STANDIN, Configure, site_data

if TYPE_CHECKING:
    from tests.testbed.plugin import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm_cluster")]

# one rank each and few samples: the time goes into importing torch
DIGITS = """\
extends: digits-sgd
model: {name: digits-cnn, args: {width: 4}}
data: {name: digits, train_limit: 200}
batch_size: 50
epochs: 1
resources: {nodes: 1, ranks_per_node: 1, walltime: 5m}
matrix:
  optimizer.lr: [0.05, 0.1]
  data.folds.index: [0, 1, 2]
"""


def cells(tmp_path: Path, *axes: str, experiment: str, parallel: int | None = None, **site: Any) -> Matrix:
    """Returns the cells of a matrix on the test cluster."""
    file = tmp_path / "sweep.yaml"
    file.write_text(experiment)
    found = matrix.resolve(
        str(write_site(tmp_path, parallel, **site)),
        str(file),
        (),
        [matrix.parse(text) for text in axes],
        environment={},
    )
    assert found is not None
    return found


def write_site(tmp_path: Path, parallel: int | None, **changes: Any) -> Path:
    data = site_data(tmp_path / "runs", "per_rank", **changes)
    data["scheduler"]["parallel_cells"] = parallel
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def counted_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts an sbatch first in PATH that notes each call and then makes it; returns the notes."""
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True).stdout.strip()
    shim = tmp_path / "bin" / "sbatch"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\necho called >> {tmp_path}/calls\nexec {real} "$@"\n')
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")  # jobs inherit it, and call no sbatch
    return tmp_path / "calls"


def test_only_the_failed_cell_is_submitted_again(
    slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six cells of a cross-validated grid search, two at once; the data of one are made to fail at first."""
    calls = counted_sbatch(tmp_path, monkeypatch)
    text = DIGITS.replace("train_limit: 200", "train_limit: 200, folds: {count: 3, index: 0}")
    # fold 2 of the second learning rate fails on the first attempt alone
    trap = f'case "$*" in *"/0005-"*) mkdir {tmp_path}/trapped 2>/dev/null && exit 9 ;; esac; true'
    found = cells(tmp_path, experiment=text, parallel=2, preload=[trap], nodes=1, ranks_per_node=1)
    submitted = sweep.submit(found, argv=["test"])
    most = 0

    def look(state: sweep_status.SweepState) -> None:
        nonlocal most
        most = max(most, state.counts.get("running", 0))

    ended = sweep_status.wait(submitted.sweep, poll_s=0.5, on_change=look)
    assert calls.read_text() == "called\n"
    assert [state.state for _, state in ended.cells] == ["completed"] * 5 + ["failed"], ended.text()
    assert 1 <= most <= 2
    failed = ended.failed.cells[0][0].run
    assert len(ended.failed.cells) == 1

    again = sweep.submit(found, argv=["test"])
    assert (again.submitted, again.skipped) == (1, {"completed": 5})
    ended = sweep_status.wait(again.sweep, poll_s=0.5)
    assert ended.counts == {"completed": 6}
    assert [attempt.number for attempt in failed.attempts()] == [1, 2]
    assert {len(run.attempts()) for run in again.sweep.runs() if run != failed} == {1}
    assert sweep.submit(found, argv=["test"]).submitted == 0

    from hpcsngd_analysis import report

    (plain,) = report.to_json([again.sweep.path])["sweeps"]
    assert (plain["split"], plain["replicates"]) == ("validation", ["data.folds.index"])
    assert [(row["n"], row["is_complete"]) for row in plain["settings"]] == [(3, True)] * 2
    assert all(row["low"] < row["mean"] < row["high"] for row in plain["settings"])


def test_members_of_an_array_are_ordinary_jobs(
    slurm_cluster: SlurmCluster, configure: Configure, tmp_path: Path
) -> None:
    """One member is started again by Slurm and one is cancelled; each keeps its cell."""
    configure("per_rank")  # lets jobs import the stand-in
    text = (tmp_path / "standin.yaml").read_text() + "resources: {nodes: 1, ranks_per_node: 1}\n"
    found = cells(tmp_path, "seed=1,2", experiment=text, env={"STANDIN": "stop"}, nodes=1, ranks_per_node=1)
    submitted = sweep.submit(found, argv=["test"], worker=STANDIN)
    first, second = submitted.sweep.runs()
    ids = [str(rundir.read_yaml(run.attempt(1).submitted_yaml)["job_id"]) for run in (first, second)]
    assert ids == [f"{submitted.job_ids[0]}_0", f"{submitted.job_ids[0]}_1"]
    wait_until(lambda: all((run.path / "report").exists() for run in (first, second)), "the start of both")
    assert [state.job_id for state in status.states([first, second])] == ids
    subprocess.run(["scancel", ids[1]], check=True)
    subprocess.run(["scontrol", "requeue", ids[0]], check=True)
    wait_until(first.attempt(2).attempt_yaml.exists, "the second attempt of the first")
    assert rundir.read_yaml(first.attempt(2).attempt_yaml)["job_id"] == ids[0]
    assert status.states([second])[0].state == "cancelled"
    assert [each.was_sent for each in cancel.cancel(submitted.sweep.runs())] == [True, False]
    wait_until(lambda: sweep_status.look(submitted.sweep).counts == {"cancelled": 2}, "the end of the first")


def test_a_thousand_cells_are_one_call(
    slurm_cluster: SlurmCluster, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted_sbatch(tmp_path, monkeypatch)
    configure("per_rank")
    text = (tmp_path / "standin.yaml").read_text() + "resources: {nodes: 1, ranks_per_node: 1}\n"
    seeds = ",".join(map(str, range(500)))
    held = {"options": {"hold": True}}
    found = cells(
        tmp_path, f"seed={seeds}", "optimizer.lr=0.1,0.2", experiment=text, scheduler=held, parallel=7
    )
    submitted = sweep.submit(found, argv=["test"], worker=STANDIN)
    try:
        assert (submitted.submitted, calls.read_text()) == (1000, "called\n")
        runs = submitted.sweep.runs()
        runs[0].write_status(Status("completed", "", 1, result={}))
        state = sweep_status.look(submitted.sweep)
        assert state.counts == {"completed": 1, "pending": 999}
        assert len(slurm.ask([f"{submitted.job_ids[0]}_{n}" for n in range(1000)], timeout_s=30).jobs) == 1000
    finally:
        subprocess.run(["scancel", submitted.job_ids[0]], check=True)


def wait_until(condition: Any, what: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.3)
