"""Reads run directories into tidy pandas tables, one per metric, and says what it left out.

The contract: columns and types come from `hpcsngd.tables`. Nothing is repaired silently. After a resume the
last attempt's row of each key counts, and the number of rows dropped is kept. A last line without newline is
not a row yet; the file's name is kept. Failed and unfinished runs are loaded like all others. Anything that
does not fit raises `RunDirError` with file and line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from hpcsngd.errors import RunDirError, did_you_mean
from hpcsngd.rundir import STATES, RunDir, Status, open_run, read_yaml
from hpcsngd.tables import TABLES, Table
from hpcsngd_analysis.csv_table import empty, read_file

NO_STATUS = "no status yet"


@dataclass(frozen=True)
class Run:
    """What one run directory says besides its tables.

    Attributes:
        name: unique among the runs loaded: the directory's name, with parents where two are equal.
        path: the run directory.
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

    @property
    def state(self) -> str:
        """One of `hpcsngd.rundir.STATES`, or `NO_STATUS`."""
        return self.status.state if self.status else NO_STATUS

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
    """

    records: tuple[Run, ...]
    tables: Mapping[str, pd.DataFrame]

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


def load(paths: Iterable[str | Path], tables: Sequence[str] | None = None) -> Runs:
    """Loads runs.

    Args:
        paths: each a run directory, or a folder that holds run directories directly. A run that is found
            twice is loaded once.
        tables: names of the metrics to read; default: all of `hpcsngd.tables.TABLES`.

    Returns:
        The runs in the order given; inside a folder ordered by name.

    Raises:
        RunDirError: no run found, an unknown schema, a damaged file; the message names file and line.
    """
    wanted = [_table(name) for name in (TABLES if tables is None else tables)]
    folders = _find(paths)
    loaded = [_load_run(path, name, wanted) for path, name in zip(folders, _names(folders), strict=True)]
    merged = {
        table.name: _stack(table, {run.name: frames[table.name] for run, frames in loaded})
        for table in wanted
    }
    return Runs(tuple(run for run, _ in loaded), merged)


def _table(name: str) -> Table:
    if name not in TABLES:
        raise ValueError(f"unknown table {name!r}{did_you_mean(name, TABLES)}; allowed: {', '.join(TABLES)}")
    return TABLES[name]


def _find(paths: Iterable[str | Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given).expanduser().resolve()
        if not path.is_dir():
            raise RunDirError(f"{path} is not a directory" if path.exists() else f"{path} does not exist")
        if RunDir(path).run_yaml.is_file():
            found[path] = None
            continue
        inside = sorted(child.resolve() for child in path.iterdir() if RunDir(child).run_yaml.is_file())
        if not inside:
            raise RunDirError(
                f"{path} is no run directory and holds none: no run.yaml in it or one level below"
            )
        found.update(dict.fromkeys(inside))
    if not found:
        raise RunDirError("no run directory was given")
    return list(found)


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest endings of the paths that tell all of them apart, all of the same depth."""
    depth = 1
    while len({path.parts[-depth:] for path in folders}) < len(folders):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in folders]


def _load_run(path: Path, name: str, wanted: Sequence[Table]) -> tuple[Run, dict[str, pd.DataFrame]]:
    run = open_run(path)
    record = run.record()
    config = _section(run, record, "config")
    frames, unfinished = _read_metrics(run, wanted)
    kept = {table.name: _last_attempts(frames[table.name], table) for table in wanted}
    return Run(
        name=name,
        path=path,
        experiment=_text(run, config, "exp_name"),
        site=_text(run, config, "site_name"),
        config={part: _section(run, config, part) for part in ("site", "experiment")},
        provenance=_section(run, record, "provenance"),
        status=_status(run),
        attempts=len(run.attempts()),
        world_size=_world_size(run),
        wall_s=_wall_s(frames.values()),
        last_utc=_last_utc(frames.values()),
        dropped_rows={key: len(frames[key]) - len(frame) for key, frame in kept.items()},
        unfinished_files=unfinished,
        cell=_section(run, _section(run, record, "sweep"), "axes"),
    ), kept


def _section(run: RunDir, data: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = data.get(key) or {}
    if not isinstance(found, dict):
        raise RunDirError(f"{run.run_yaml} is damaged: {key} should be a mapping, is {found!r}")
    return found


def _text(run: RunDir, config: Mapping[str, Any], key: Literal["exp_name", "site_name"]) -> str:
    if key not in config:
        raise RunDirError(f"{run.run_yaml} is damaged: config.{key} is missing")
    return str(config[key])


def _status(run: RunDir) -> Status | None:
    try:
        status = run.status()
    except TypeError as error:  # a key is missing or unknown
        raise RunDirError(f"{run.status_yaml} is damaged: {error}") from error
    if status and status.state not in STATES:
        raise RunDirError(
            f"{run.status_yaml}: unknown state {status.state!r}; this version knows {', '.join(STATES)}"
        )
    return status


def _world_size(run: RunDir) -> int | None:
    for attempt in reversed(run.attempts()):
        if attempt.attempt_yaml.exists():
            found = read_yaml(attempt.attempt_yaml).get("world_size")
            if not isinstance(found, int | None):
                raise RunDirError(
                    f"{attempt.attempt_yaml}: world_size should be a whole number, is {found!r}"
                )
            return found
    return None


def _read_metrics(run: RunDir, wanted: Sequence[Table]) -> tuple[dict[str, pd.DataFrame], tuple[str, ...]]:
    frames, unfinished = {}, []
    for table in wanted:
        parts = [empty(table)]
        for file in sorted(run.metrics_dir.glob(table.pattern)):
            part, is_unfinished = read_file(file, table)
            parts.append(part)
            unfinished += [file.name] if is_unfinished else []
        frames[table.name] = _concat(parts)
    return frames, tuple(unfinished)


def _concat(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    # Parts without rows carry the columns only; pandas deprecates letting them take part in choosing dtypes.
    filled = [part for part in parts if len(part)]
    return pd.concat(filled, ignore_index=True) if filled else parts[0]


def _last_attempts(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """Returns the rows that count, ordered by step: for each key the one of the last attempt."""
    key = [*table.key, "rank"] if table.per_rank else list(table.key)
    by_attempt = frame.sort_values("attempt", kind="stable")
    kept = by_attempt.drop_duplicates(key, keep="last")
    return kept.sort_values("step", kind="stable", ignore_index=True)


def _wall_s(frames: Iterable[pd.DataFrame]) -> float | None:
    # From all rows, also those that a later attempt replaced: that time was spent.
    clocks = [frame[["attempt", "wall_s"]] for frame in frames if "wall_s" in frame and len(frame)]
    return float(pd.concat(clocks).groupby("attempt")["wall_s"].max().sum()) if clocks else None


def _last_utc(frames: Iterable[pd.DataFrame]) -> str | None:
    # All stamps are ISO 8601 in UTC with the same precision, so text order is time order.
    return max((str(frame["utc"].max()) for frame in frames if "utc" in frame and len(frame)), default=None)


def _stack(table: Table, by_run: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    columns = {"run": pd.Series([], dtype="str")} | dict(empty(table).items())
    parts = [pd.DataFrame(columns)]
    for name, frame in by_run.items():
        frame.insert(0, "run", pd.Series(name, index=frame.index, dtype="str"))
        parts.append(frame)
    return _concat(parts)
