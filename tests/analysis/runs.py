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
