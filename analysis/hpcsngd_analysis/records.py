"""What `hpcsngd_analysis.load` returns: one record per run, and tidy tables of all runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from hpcsngd.rundir import Status
from hpcsngd_analysis import attempts

NO_STATUS = "no status yet"
NOT_RECORDED = "not recorded"
"""The state of runs of the original HyLo scripts, which do not write how they ended."""


class NotFinite(NamedTuple):
    """How many rows of a run have a loss that is not a finite number, and the step of the first."""

    rows: int
    first_step: int


@dataclass(frozen=True)
class Run:
    """What one run says besides its tables.

    Attributes:
        name: unique among the runs loaded: the directory's name, with parents where two are equal.
        path: the run directory; of the original HyLo scripts the folder with their files.
        experiment: name of the experiment asked for.
        site: name of the site asked for.
        config: the resolved configuration, with the keys ``site`` and ``experiment``.
        provenance: git commit, versions, host, command line; every key is optional.
        status: how the run ended; None while it has not.
        attempts: number of attempts begun or submitted.
        world_size: ranks of the last attempt that started; None while none has.
        wall_s: seconds that workers ran, up to each attempt's last row, summed; None without rows.
        last_utc: time of the newest row, ISO 8601; None without rows.
        dropped_rows: per table, rows that a later attempt wrote again.
        unfinished_files: metrics files whose last line has no newline and was left out.
        cell: of a sweep's run, the keys that the sweep varies and their values here; empty for other runs.
        origin: ``run`` for a run directory, ``hylo`` for files of the original HyLo scripts.
        hardware: processor, memory and GPUs of node 0 of the last attempt that started; empty where unknown.
        notes: what loading left out or had to interpret, in sentences.
        rows: per table, rows that count, before thinning.
        not_finite: per table with a loss, where it is not a finite number; only tables that have such rows.
        summary: the model as torchinfo saw it; empty where the run has none.
    """

    name: str
    path: Path
    experiment: str
    site: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    status: Status | None
    attempts: int
    world_size: int | None
    wall_s: float | None
    last_utc: str | None
    dropped_rows: Mapping[str, int]
    unfinished_files: tuple[str, ...]
    cell: Mapping[str, Any] = field(default_factory=dict)
    origin: Literal["run", "hylo"] = "run"
    hardware: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)
    not_finite: Mapping[str, NotFinite] = field(default_factory=dict)
    summary: str = ""

    @property
    def state(self) -> str:
        """One of `hpcsngd.rundir.STATES`, `NO_STATUS`, or `NOT_RECORDED`."""
        if self.status:
            return self.status.state
        return NO_STATUS if self.origin == "run" else NOT_RECORDED

    @property
    def reason(self) -> str:
        """Why the run did not complete, in one line; empty otherwise."""
        return self.status.reason if self.status else ""

    @property
    def revision(self) -> str | None:
        """The git commit of the code, where it is known."""
        sha = self._git.get("sha")
        return str(sha) if sha else None

    @property
    def has_local_changes(self) -> bool:
        """Whether the code is known to have differed from its commit."""
        return bool(self._git.get("dirty"))

    @property
    def _git(self) -> Mapping[str, Any]:
        found = self.provenance.get("git")
        return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class Runs:
    """Runs loaded together.

    Attributes:
        records: one record per run, in the order given.
        tables: per metric a tidy table: the columns of `hpcsngd.tables` after a first column ``run``, ordered
            by run and step. A table that no run wrote is there, without rows.
        attempts: one row per attempt of every run, with the columns of `attempts.COLUMNS`.
        train_rows: at most about how many rows of ``train`` each run kept; None for all of them.
    """

    records: tuple[Run, ...]
    tables: Mapping[str, pd.DataFrame]
    attempts: pd.DataFrame = field(default_factory=lambda: attempts.frame([]))
    train_rows: int | None = None

    @property
    def runs(self) -> pd.DataFrame:
        """One row per run: what its files say; `tables.runs_table` adds what was measured."""
        columns = {
            "run": ("str", [run.name for run in self.records]),
            "experiment": ("str", [run.experiment for run in self.records]),
            "site": ("str", [run.site for run in self.records]),
            "state": ("str", [run.state for run in self.records]),
            "reason": ("str", [run.reason for run in self.records]),
            "seed": ("Int64", [run.config["experiment"].get("seed") for run in self.records]),
            "world_size": ("Int64", [run.world_size for run in self.records]),
            "wall_s": ("float64", [run.wall_s for run in self.records]),
            "attempts": ("int64", [run.attempts for run in self.records]),
            "dropped_rows": ("int64", [sum(run.dropped_rows.values()) for run in self.records]),
        }
        return pd.DataFrame({name: pd.Series(cells, dtype=dtype) for name, (dtype, cells) in columns.items()})
