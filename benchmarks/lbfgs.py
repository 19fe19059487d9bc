"""Trains the cells of `study-lbfgs` without a launcher, which would take longer than the training itself.

Run: ``python -m benchmarks.lbfgs FOLDER``; then ``hpcsngd report FOLDER --spec analysis/reports/lbfgs.yaml``.
Cells of one number of ranks share one process group. For each seed all methods take turns, so that drifts of
the machine meet all alike. A cell that has ended is skipped when the command is repeated.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.multiprocessing

from hpcsngd import dist, rundir
from hpcsngd.config import matrix
from hpcsngd.config.matrix import Cell
from hpcsngd.launch import hardware
from hpcsngd.rundir import RunDir, Status
from hpcsngd.train import session

EXPERIMENT = "study-lbfgs"


def cells(ranks: int) -> list[Cell]:
    """Returns the study's cells of so many ranks, seed after seed."""
    study = matrix.resolve("local", EXPERIMENT)
    if study is None:
        raise SystemExit(f"{EXPERIMENT} has no matrix")
    found = [cell for cell in study.cells if cell.resolved.world_size == ranks]
    return sorted(found, key=lambda cell: cell.resolved.experiment.seed)


def ended(folder: Path) -> set[str]:
    """Returns the ids of cells that have ended."""
    runs = [rundir.open_run(file.parent) for file in folder.glob("*/run.yaml")]
    return {run.record()["cell"] for run in runs if run.status() is not None}


def new_run(folder: Path, cell: Cell, ranks: int) -> RunDir:
    """Returns a run directory with what a launcher would have written."""
    run = rundir.create(folder, EXPERIMENT, {"cell": cell.id, "config": cell.resolved.to_record()})
    facts = {
        "hosts": [socket.gethostname()],
        "nodes": 1,
        "world_size": ranks,
        "start": rundir.utc_now(),
        "hardware": hardware.facts(),
    }
    run.attempt(1).path.mkdir(parents=True)
    rundir.write_yaml(run.attempt(1).attempt_yaml, facts)
    return run


def train_all(rank: int, ranks: int, meeting: str, folder: str) -> None:
    """Trains this rank's part of every cell that has not ended."""
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
        dist.init("gloo", init_method=f"file://{meeting}")
    skipped = dist.broadcast_object(ended(Path(folder)) if rank == 0 else None)
    for cell in cells(ranks):
        if cell.id in skipped:
            continue
        made = str(new_run(Path(folder), cell, ranks).path) if rank == 0 else None
        run = RunDir(Path(dist.broadcast_object(made)))
        began = time.monotonic()
        session.train(run, 1, torch.device("cpu"), started=began)
        if rank == 0:
            result = rundir.read_yaml(run.attempt(1).finished_yaml)
            run.write_status(Status("completed", "", 1, result=result))
            print(f"{ranks} ranks, {cell}: {result['test_accuracy']:.4f}, ", end="")
            print(f"{time.monotonic() - began:.1f} s", flush=True)
    dist.shutdown()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lbfgs", description=__doc__)
    parser.add_argument("folder", type=Path, help="where run directories are kept")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    train_all(0, 1, "", str(options.folder))
    with tempfile.TemporaryDirectory() as meeting:
        place = str(Path(meeting) / "rendezvous")
        torch.multiprocessing.spawn(train_all, (2, place, str(options.folder)), nprocs=2)


if __name__ == "__main__":
    main()
