"""Reads runs into tidy pandas tables, one per metric, and says what it left out.

The contract: columns and types come from `hpcsngd.tables`. Nothing is repaired silently. After a resume the
last attempt's row of each key counts, and the number of rows dropped is kept. A last line without newline is
not a row yet; the file's name is kept. Failed and unfinished runs are loaded like all others. Files of the
original HyLo scripts become rows of the same tables, see `hpcsngd_analysis.original`. Anything that does not
fit raises `RunDirError` with file and line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from hpcsngd.errors import RunDirError, did_you_mean
from hpcsngd.rundir import STATES, RunDir, Status, checked_record, read_yaml
from hpcsngd.tables import TABLES, Table
from hpcsngd_analysis import attempts, original, thin
from hpcsngd_analysis.csv_table import empty, read_file, with_declared_text
from hpcsngd_analysis.records import NO_STATUS, NOT_RECORDED, NotFinite, Run, Runs

__all__ = ["NOT_RECORDED", "NO_STATUS", "Run", "Runs", "load"]

THINNED = {"train": ("loss", "accuracy")}
"""Table -> columns whose extremes stay when `load` is asked for fewer rows."""

_Loaded = tuple[Run, dict[str, pd.DataFrame], list[dict[str, Any]]]


def load(
    paths: Iterable[str | Path], tables: Sequence[str] | None = None, *, train_rows: int | None = None
) -> Runs:
    """Loads runs.

    Args:
        paths: each a run directory, a folder that holds run directories or files of the original HyLo scripts
            directly, or one such file. A run that is found twice is loaded once.
        tables: names of the metrics to read; default: all of `hpcsngd.tables.TABLES`.
        train_rows: keep at most about this many rows of ``train`` per run: the first, the last, and of equal
            parts the rows with the lowest and highest loss and accuracy. What `Run` counts is counted before.
            Default: all rows. For a thousand runs at once, which would not fit in memory.

    Returns:
        The runs in the order given; inside a folder ordered by name.

    Raises:
        RunDirError: no run found, an unknown schema, a damaged file; the message names file and line.
    """
    wanted = [_table(name) for name in (TABLES if tables is None else tables)]
    sources = _find(paths)
    loaded = [
        _load(source, name, wanted, train_rows) for source, name in zip(sources, _names(sources), strict=True)
    ]
    merged = {
        table.name: _stack(table, {run.name: frames[table.name] for run, frames, _ in loaded})
        for table in wanted
    }
    spent = attempts.frame([row for _, _, rows in loaded for row in rows])
    return Runs(tuple(run for run, _, _ in loaded), merged, spent, train_rows)


def _table(name: str) -> Table:
    if name not in TABLES:
        raise ValueError(f"unknown table {name!r}{did_you_mean(name, TABLES)}; allowed: {', '.join(TABLES)}")
    return TABLES[name]


def _find(paths: Iterable[str | Path]) -> list[Path | original.Source]:
    """Returns run directories and groups of original files, each once."""
    found: dict[Path | original.Source, None] = {}
    for given in paths:
        path = Path(given).expanduser().resolve()
        inside = list(_inside(path))
        if not inside:
            raise RunDirError(
                f"{path} is no run directory and holds none: no run.yaml in it or one level below, and no "
                "file of the original HyLo scripts"
            )
        found.update(dict.fromkeys(inside))
    if not found:
        raise RunDirError("no run directory was given")
    return list(found)


def _inside(path: Path) -> Iterator[Path | original.Source]:
    if path.is_file():
        yield original.of_file(path)
    elif not path.is_dir():
        raise RunDirError(f"{path} does not exist")
    elif RunDir(path).run_yaml.is_file():
        yield path
    else:
        yield from sorted(child.resolve() for child in path.iterdir() if RunDir(child).run_yaml.is_file())
        yield from original.in_folder(path)


def _names(sources: Sequence[Path | original.Source]) -> list[str]:
    """Returns the shortest endings of the paths that tell all of them apart, all of the same depth."""
    paths = [source if isinstance(source, Path) else source.folder / source.name for source in sources]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _load(
    source: Path | original.Source, name: str, wanted: Sequence[Table], train_rows: int | None
) -> _Loaded:
    if isinstance(source, Path):
        return _load_run(source, name, wanted, train_rows)
    run, frames = original.read(source, name)
    kept = {table.name: _thinned(frames.get(table.name, empty(table)), table, train_rows) for table in wanted}
    return run, kept, []


def _load_run(path: Path, name: str, wanted: Sequence[Table], train_rows: int | None) -> _Loaded:
    run = RunDir(path)
    record = checked_record(run)
    config = _section(run, record, "config")
    frames, unfinished = _read_metrics(run, wanted)
    kept = {table.name: _last_attempts(frames[table.name], table) for table in wanted}
    status, begun = _status(run), _last_begun(run)
    spent = attempts.facts(run, name, frames, status)
    loaded = Run(
        name=name,
        path=path,
        experiment=_text(run, config, "exp_name"),
        site=_text(run, config, "site_name"),
        config={part: _section(run, config, part) for part in ("site", "experiment")},
        provenance=_section(run, record, "provenance"),
        status=status,
        attempts=len(spent),
        world_size=begun.get("world_size"),
        wall_s=_wall_s(frames.values()),
        last_utc=_last_utc(frames.values()),
        dropped_rows={key: len(frames[key]) - len(frame) for key, frame in kept.items()},
        unfinished_files=unfinished,
        cell=_section(run, _section(run, record, "sweep"), "axes"),
        hardware=begun.get("hardware") or {},
        rows={key: len(frame) for key, frame in kept.items()},
        not_finite=_not_finite(kept),
        summary=_summary(run),
    )
    return loaded, {table.name: _thinned(kept[table.name], table, train_rows) for table in wanted}, spent


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


def _last_begun(run: RunDir) -> dict[str, Any]:
    """Returns what the last attempt that began says of itself; empty while none has."""
    for attempt in reversed(run.attempts()):
        if attempt.attempt_yaml.exists():
            return read_yaml(attempt.attempt_yaml)
    return {}


def _summary(run: RunDir) -> str:
    try:
        return run.summary_txt.read_text(encoding="utf-8") if run.summary_txt.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirError(f"cannot read {run.summary_txt}: {error}") from error


def _read_metrics(run: RunDir, wanted: Sequence[Table]) -> tuple[dict[str, pd.DataFrame], tuple[str, ...]]:
    """Returns the rows of each table, and the files whose last line is unfinished."""
    frames, unfinished = {}, []
    for table in wanted:
        parts = []
        for file in sorted(run.metrics_dir.glob(table.pattern)):
            part, is_unfinished = read_file(file, table)
            parts += [part] if len(part) else []
            unfinished += [file.name] if is_unfinished else []
        # an empty part would take part in choosing dtypes, and copying a single one is slow
        frames[table.name] = (
            pd.concat(parts, ignore_index=True) if len(parts) > 1 else (*parts, empty(table))[0]
        )
    return frames, tuple(unfinished)


def _last_attempts(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """Returns the rows that count, ordered by step: for each key the one of the last attempt."""
    if not len(frame):
        return frame
    key = [*table.key, "rank"] if table.per_rank else list(table.key)
    if "attempt" not in frame:
        return frame.drop_duplicates(key, keep="last", ignore_index=True)
    if _is_in_order(frame) and not frame.duplicated(key).any():
        return frame
    by_attempt = frame.sort_values("attempt", kind="stable")
    kept = by_attempt.drop_duplicates(key, keep="last")
    return kept.sort_values("step", kind="stable", ignore_index=True)


def _is_in_order(frame: pd.DataFrame) -> bool:
    """Returns whether there is one attempt and all its steps rise; most runs are never interrupted."""
    numbers, steps = frame["attempt"].to_numpy(), frame["step"].to_numpy()
    return bool((numbers == numbers[:1]).all() and (np.diff(steps) >= 0).all())


def _not_finite(frames: Mapping[str, pd.DataFrame]) -> dict[str, NotFinite]:
    found = {}
    for name in ("train", "eval"):
        if name in frames:
            bad = ~np.isfinite(frames[name]["loss"].to_numpy(float))
            if bad.any():
                found[name] = NotFinite(int(bad.sum()), int(frames[name]["step"].to_numpy()[bad][0]))
    return found


def _thinned(frame: pd.DataFrame, table: Table, rows: int | None) -> pd.DataFrame:
    """Returns the rows to keep of a table, see `load`; new positions."""
    columns = THINNED.get(table.name)
    if rows is None or columns is None or len(frame) <= rows:
        return frame
    share = rows // len(columns)
    kept = [thin.kept_points(frame[column].to_numpy(float), share) for column in columns]
    return frame.iloc[np.unique(np.concatenate(kept))].reset_index(drop=True)


def _wall_s(frames: Iterable[pd.DataFrame]) -> float | None:
    # From all rows, also those that a later attempt replaced: that time was spent.
    furthest: dict[int, float] = {}
    for frame in frames:
        if len(frame) and "wall_s" in frame:
            number, wall_s = frame["attempt"].to_numpy(), frame["wall_s"].to_numpy()
            for attempt in np.unique(number).tolist():
                furthest[attempt] = max(furthest.get(attempt, 0.0), float(wall_s[number == attempt].max()))
    return sum(furthest.values()) if furthest else None


def _last_utc(frames: Iterable[pd.DataFrame]) -> str | None:
    # All stamps are ISO 8601 in UTC with the same precision, so text order is time order.
    return max((str(frame["utc"].max()) for frame in frames if "utc" in frame and len(frame)), default=None)


def _stack(table: Table, by_run: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    columns = {"run": pd.Series([], dtype="str")} | dict(empty(table).items())
    filled = {name: frame for name, frame in by_run.items() if len(frame)}
    if not filled:
        return pd.DataFrame(columns)
    joined = with_declared_text(pd.concat(filled.values(), ignore_index=True), table)
    sizes = [len(frame) for frame in filled.values()]
    joined.insert(0, "run", pd.Series(np.repeat(np.array(list(filled), dtype=object), sizes), dtype="str"))
    return joined
