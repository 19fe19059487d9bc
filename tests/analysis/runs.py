"""Run directories for these tests: those written by hand in tests/data/runs, and new ones made to measure."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpcsngd import rundir
from hpcsngd.rundir import CsvWriter, RunDir, Status
from hpcsngd.tables import TABLES

EXAMPLES = Path(__file__).parents[1] / "data" / "runs"
UTC = "2026-01-05T10:00:00.000+00:00"


def make_run(
    root: Path,
    name: str = "run",
    *,
    experiment: str = "digits-sgd",
    settings: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    status: Status | None = None,
    tables: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
) -> RunDir:
    """Returns a new run directory; rows need only the columns that matter, see `row`."""
    run = RunDir(root / name)
    config = {
        "site_name": "local",
        "exp_name": experiment,
        "site": {"scheduler": {"kind": "local"}},
        "experiment": {"epochs": 2, "seed": 1, **(settings or {})},
    }
    rundir.write_yaml(run.run_yaml, {"schema": 1, "config": config, "provenance": dict(provenance or {})})
    if status:
        run.write_status(status)
    for table, rows in (tables or {}).items():
        writer = CsvWriter(run.metrics(table, 0), TABLES[table])
        for cells in rows:
            writer.write(**row(table, **cells))
        writer.close()
    return run


def row(table: str, **cells: Any) -> dict[str, Any]:
    """Returns a full row: what is given, and plain values for the other columns."""
    plain = {"int": 1, "float": 1.0, "str": "x"}
    filled = {column.name: plain[column.dtype] for column in TABLES[table].columns}
    return {**filled, "utc": UTC, **cells} if "utc" in filled else {**filled, **cells}


def copy_of(example: str, folder: Path) -> Path:
    """Returns a copy of one of the hand-written runs, to be damaged."""
    return Path(shutil.copytree(EXAMPLES / example, folder / example))


def at(minutes: float) -> str:
    """Returns a time after ten o'clock."""
    whole, rest = divmod(minutes * 60, 60)
    return f"2026-01-05T10:{int(whole):02d}:{rest:06.3f}+00:00"


def clocked(
    attempt: int, step: int, train_s: float, wall_s: float, begun: float, **more: Any
) -> dict[str, Any]:
    """Returns a row of a worker that began so many minutes after ten."""
    utc = at(begun + wall_s / 60)
    return {"attempt": attempt, "step": step, "train_s": train_s, "wall_s": wall_s, "utc": utc, **more}


def resumed_run(root: Path) -> RunDir:
    """Two attempts: 90 s of training, of which 30 are done again, and 60 more; an evaluation of 5 s each."""
    first, second = 2.5, 11.0  # when the workers began
    run = make_run(
        root,
        status=Status("completed", "", 2, at(14.0)),
        tables={
            "train": [
                clocked(1, 10, 30, 40, first),
                clocked(1, 20, 60, 75, first),
                clocked(1, 30, 90, 105, first),
                clocked(2, 30, 88, 38, second),
                clocked(2, 40, 120, 70, second),
            ],
            "eval": [
                clocked(1, 20, 60, 74, first, eval_s=5.0, split="test"),
                clocked(2, 40, 120, 75, second, eval_s=5.0, split="test"),
            ],
        },
    )
    for number, (submitted, start) in enumerate(((0.0, 2.0), (None, 10.0)), 1):
        attempt = run.attempt(number)
        if submitted is not None:
            rundir.write_yaml(
                attempt.submitted_yaml, {"scheduler": "slurm", "job_id": "7", "utc": at(submitted)}
            )
        facts = {"nodes": 3, "world_size": 12, "start": at(start), "hardware": {"cpu": "POWER9"}}
        rundir.write_yaml(attempt.attempt_yaml, facts)
    rundir.write_yaml(run.attempt(1).ended_yaml, {"state": "preempted", "reason": "", "utc": at(5.0)})
    return run
