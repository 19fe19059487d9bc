"""A run's tables as numbers by tag and step, as trackers want them.

A tag is the table's name, the values of the table's key besides the step, and the column: ``train/loss``,
``eval/test/accuracy``, ``grad_norm/conv1/norm``. Attempts are merged by the loader: after a resume the last
attempt's row of each step counts. Of tables that every rank writes, rank 0's rows are taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcsngd.tables import TABLES, Table
from hpcsngd_analysis.records import Runs

#: Columns that say where a row stands, and are no numbers of their own.
_PLACES = {"attempt", "step", "rank", "utc"}

#: Once per run and class, not a curve.
_NOT_CURVES = {"confusion", "landscape_path"}

CURVES = tuple(name for name, table in TABLES.items() if "step" in table.key and name not in _NOT_CURVES)
"""The tables that are exported."""

COLUMNS = ("step", "tag", "value", "time")


def history(runs: Runs, name: str) -> pd.DataFrame:
    """Returns everything that a run has measured, ordered by step, then table and column.

    Args:
        runs: from `hpcsngd_analysis.load.load`.
        name: of the run in them.

    Returns:
        ``step`` (int), ``tag`` (str), ``value`` (float, NaN where that was written) and ``time`` (seconds
        since 1970; of tables without a clock that of the rows of training and evaluation around it).
    """
    tables = {key: frame[frame["run"] == name] for key, frame in runs.tables.items() if key in CURVES}
    parts = [part for key, frame in tables.items() for part in _numbers(TABLES[key], frame)]
    if not parts:
        return pd.DataFrame({"step": [], "tag": [], "value": [], "time": []}).astype(
            {"step": "int64", "tag": "str", "value": "float64", "time": "float64"}
        )
    joined = pd.concat(parts, ignore_index=True)
    joined["time"] = _times(joined)
    return joined.sort_values("step", kind="stable", ignore_index=True)[list(COLUMNS)]


def _numbers(table: Table, frame: pd.DataFrame) -> list[pd.DataFrame]:
    """Returns one frame per numeric column."""
    if table.per_rank:
        frame = frame[frame["rank"] == 0]
    if not len(frame):
        return []
    keys = [key for key in table.key if key != "step"]
    columns = [
        column.name
        for column in table.columns
        if column.dtype != "str" and column.name not in _PLACES and column.name not in keys
    ]
    prefix = pd.Series(table.name, index=frame.index, dtype="str")
    for key in keys:
        prefix = prefix + "/" + frame[key].astype("str")
    steps, clock = frame["step"].to_numpy(np.int64), _clock(frame)
    return [
        pd.DataFrame(
            {"step": steps, "tag": prefix + "/" + name, "value": frame[name].to_numpy(float), "time": clock}
        )
        for name in columns
    ]


def _clock(frame: pd.DataFrame) -> npt.NDArray[np.float64]:
    if "utc" not in frame:
        return np.full(len(frame), np.nan)
    moments = pd.to_datetime(frame["utc"], utc=True, format="ISO8601")
    since: npt.NDArray[np.float64] = (moments - pd.Timestamp(0, tz="UTC")).dt.total_seconds().to_numpy(float)
    return since


def _times(joined: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Returns the times with those that are not known put between those that are; 0 where none is."""
    times = joined["time"].to_numpy(float).copy()
    steps, is_known = joined["step"].to_numpy(float), ~np.isnan(times)
    if not is_known.any():
        return np.zeros_like(times)
    known = joined[is_known].groupby("step")["time"].max()
    unknown = ~is_known
    times[unknown] = np.interp(steps[unknown], known.index.to_numpy(float), known.to_numpy(float))
    return times


def before(frame: pd.DataFrame, step: int | None) -> pd.DataFrame:
    """Returns the rows before a step; all for None."""
    return frame if step is None else frame[frame["step"] < step]


def newest(frame: pd.DataFrame) -> int:
    """Returns the newest step; 0 without rows."""
    return int(frame["step"].max()) if len(frame) else 0


def steps_of(frame: pd.DataFrame) -> Sequence[tuple[int, float, dict[str, float]]]:
    """Returns step, time and numbers by tag of each step, in order."""
    return [
        (
            int(rows["step"].iloc[0]),
            float(rows["time"].max()),
            dict(zip(rows["tag"], rows["value"], strict=True)),
        )
        for _, rows in frame.groupby("step", sort=True)
    ]
