"""Trains the cells of `study-lbfgs` without a launcher, which would take longer than the training itself.

Run: ``python -m benchmarks.lbfgs FOLDER``, which ends with a table of what each method reached with equally
many samples and in equal time. ``hpcsngd report FOLDER --spec analysis/reports/lbfgs.yaml`` draws
the same runs.

Cells of one number of ranks share one process group. For each seed all methods take turns, so that drifts of
the machine meet all alike. A cell that has ended is skipped when the command is repeated.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
import torch.multiprocessing

from hpcsngd import dist, rundir
from hpcsngd.config import matrix
from hpcsngd.config.matrix import Cell
from hpcsngd.launch import hardware
from hpcsngd.rundir import RunDir, Status
from hpcsngd.train import session
from hpcsngd_analysis import stats
from hpcsngd_analysis.budgets import Clock, at_budget, compare_at
from hpcsngd_analysis.compare import Verdict
from hpcsngd_analysis.load import Run, load

EXPERIMENT = "study-lbfgs"
BASELINE = "sgd x 1"


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


def table(folder: Path) -> str:
    """Returns accuracy at equal samples and equal time, and differences from SGD on one rank by seed."""
    runs = load([folder])
    methods: dict[str, list[str]] = {}
    for run in runs.records:
        methods.setdefault(_label(run), []).append(run.name)
    ordered = sorted(methods.items(), key=lambda item: (item[0] != BASELINE, item[0]))
    lines = []
    for clock in get_args(Clock):
        budget = at_budget(runs, clock)
        unit = "samples" if clock == "samples" else "s of training"
        lines.append(f"{budget.amount:,.5g} {unit}: accuracy %, less {BASELINE}, better?")
        for label, names in ordered:
            values = [100 * each for each in budget.accuracy.reindex(names).dropna()]
            verdict = compare_at(budget, runs, names, methods[BASELINE])
            lines.append(f"{label:<28}{_interval(values):<24}{_difference(verdict)}".rstrip())
    return "\n".join(lines)


def _label(run: Run) -> str:
    experiment = run.config["experiment"]
    optimizer = experiment["optimizer"]
    kind = "full" if experiment["strategy"] == "full_batch" else optimizer.get("batches", "")
    return " ".join(filter(None, (optimizer["name"], kind, f"x {run.world_size}")))


def _interval(values: Sequence[float]) -> str:
    if not values:
        return "not evaluated by then"
    found = stats.mean_interval(values)
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _difference(verdict: Verdict) -> str:
    if math.isnan(verdict.low) or verdict.low == verdict.high:
        return ""
    numbers = (100 * each for each in (verdict.estimate, verdict.low, verdict.high))
    return "{:+.2f} [{:+.2f}, {:+.2f}]  ".format(*numbers) + verdict.word


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lbfgs", description=__doc__)
    parser.add_argument("folder", type=Path, help="where run directories are kept")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    train_all(0, 1, "", str(options.folder))
    with tempfile.TemporaryDirectory() as meeting:
        place = str(Path(meeting) / "rendezvous")
        torch.multiprocessing.spawn(train_all, (2, place, str(options.folder)), nprocs=2)
    print(table(options.folder))


if __name__ == "__main__":
    main()
