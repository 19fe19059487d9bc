"""The attempts of a run, and where the time of each went: waiting, starting, training, doing work again.

Times come from the agents' files (submitted, started, ended) and from the clocks in the rows. What no file
says is NaN, never a guess. Work done twice is known to within one row: the rows of an earlier attempt that a
later one wrote again.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcsngd.errors import RunDirError
from hpcsngd.rundir import Attempt, RunDir, Status, read_yaml

COLUMNS: Mapping[str, tuple[str, str, str]] = {
    "run": ("str", "", "the run's name"),
    "attempt": ("int64", "", "number, from 1"),
    "job_id": ("str", "", "the scheduler's; empty where it is not known"),
    "state": ("str", "", "how it ended; empty while it runs, or where nothing was written"),
    "nodes": ("Int64", "", "nodes it had"),
    "world_size": ("Int64", "", "ranks it had"),
    "submitted_utc": ("str", "", "ISO 8601; empty where it is not known"),
    "started_utc": ("str", "", "when the agent of node 0 began"),
    "ended_utc": ("str", "", "when it ended; without a word of that, its last row"),
    "queue_s": ("float64", "s", "from submission, or from the end of the attempt before, to the start"),
    "charged_s": ("float64", "s", "from start to end: what a site charges, times the nodes"),
    "startup_s": ("float64", "s", "from the start to the first training step: image, imports, data, resume"),
    "trained_s": ("float64", "s", "in training steps, those included that were lost or done again"),
    "redone_s": ("float64", "s", "of earlier attempts' training, what this attempt had to do again"),
    "eval_s": ("float64", "s", "in evaluations"),
    "other_s": ("float64", "s", "the rest of charged_s: checkpoints, waiting, leaving"),
    "before_s": ("float64", "s", "charged to earlier attempts"),
    "boot_s": ("float64", "s", "from the start to the zero of the rows' wall_s"),
}
"""Column -> pandas dtype, unit, meaning."""

_CLOCKS = ("train", "eval")
_NUMBERS = ("step", "train_s", "wall_s", "eval_s")

Floats = npt.NDArray[np.float64]


def frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Returns rows of `facts` as a table with the columns and dtypes of `COLUMNS`."""
    return pd.DataFrame(
        {name: pd.Series([row[name] for row in rows], dtype=dtype) for name, (dtype, _, _) in COLUMNS.items()}
    )


def facts(
    run: RunDir, name: str, tables: Mapping[str, pd.DataFrame], status: Status | None
) -> list[dict[str, Any]]:
    """Returns one row of `COLUMNS` per attempt of a run.

    Args:
        run: the run directory.
        name: what the run is called.
        tables: all rows of ``train`` and ``eval``, as far as loaded, those included that were written again.
        status: how the run ended, if it has.

    Raises:
        RunDirError: a damaged file; the message names it.
    """
    clocks = _clocks(tables)
    found: list[dict[str, Any]] = []
    steps, trained = np.array([]), np.array([])  # what counts so far
    before_s = 0.0
    for attempt in run.attempts():
        rows = clocks.of(attempt.number)
        files = _files(attempt, status)
        times = _times(files, rows, found[-1]["ended_utc"] if found else "")
        earlier = steps < rows.step[0] if len(rows) else np.ones(len(steps), dtype=bool)
        base = trained[earlier][-1] if earlier.any() else 0.0
        reached = trained[-1] if len(trained) else 0.0
        steps = np.concatenate([steps[earlier], rows.step])
        trained = np.concatenate([trained[earlier], rows.train_s])
        spent = _spent(rows, base, reached, times)
        found.append(
            {"run": name, "attempt": attempt.number} | files | times | spent | {"before_s": before_s}
        )
        before_s += times["charged_s"]
    return found


@dataclass(frozen=True)
class _Clocks:
    """The clocks of rows, each attempt's in the order written; ``eval_s`` is 0 for rows of training."""

    attempt: npt.NDArray[np.int64]
    step: Floats
    train_s: Floats
    wall_s: Floats
    eval_s: Floats
    utc: npt.NDArray[np.object_]

    def __len__(self) -> int:
        return len(self.step)

    def of(self, number: int) -> _Clocks:
        """Returns the rows of an attempt."""
        return self.at(self.attempt == number)

    def at(self, chosen: npt.NDArray[Any]) -> _Clocks:
        """Returns chosen rows."""
        return _Clocks(*(getattr(self, item.name)[chosen] for item in fields(self)))


def _clocks(tables: Mapping[str, pd.DataFrame]) -> _Clocks:
    parts = [tables[name] for name in _CLOCKS if name in tables]

    def joined(name: str, dtype: Any) -> Any:
        columns = [part[name].to_numpy(dtype) if name in part else np.zeros(len(part)) for part in parts]
        return np.concatenate([np.array([], dtype=dtype), *columns])

    step, train_s, wall_s, eval_s = (joined(name, float) for name in _NUMBERS)
    clocks = _Clocks(joined("attempt", np.int64), step, train_s, wall_s, eval_s, joined("utc", object))
    return clocks.at(np.lexsort((clocks.wall_s, clocks.attempt)))


def _files(attempt: Attempt, status: Status | None) -> dict[str, Any]:
    """Returns what the agents' files say of an attempt."""
    submitted, started, ended = (
        read_yaml(file) if file.exists() else {}
        for file in (attempt.submitted_yaml, attempt.attempt_yaml, attempt.ended_yaml)
    )
    is_last = status is not None and status.attempt == attempt.number
    end = {"state": status.state, "utc": status.utc} if is_last and status else ended
    return {
        "job_id": str(started.get("job_id") or submitted.get("job_id") or ""),
        "state": str(end.get("state", "")),
        "nodes": _whole(attempt, started, "nodes"),
        "world_size": _whole(attempt, started, "world_size"),
        "submitted_utc": _moment_text(attempt, submitted, "utc"),
        "started_utc": _moment_text(attempt, started, "start"),
        "ended_utc": _moment_text(attempt, end, "utc"),
    }


def _times(files: Mapping[str, Any], rows: _Clocks, last_end: str) -> dict[str, Any]:
    """Returns when the attempt ended, how long it waited and what is charged for it."""
    ended = files["ended_utc"] or (str(max(rows.utc)) if len(rows) else "")
    asked = max(files["submitted_utc"], last_end)  # ISO 8601 of one precision: text order is time order
    return {
        "ended_utc": ended,
        "queue_s": _between(asked, files["started_utc"]),
        "charged_s": _between(files["started_utc"], ended),
        "boot_s": _between(files["started_utc"], rows.utc[0]) - rows.wall_s[0] if len(rows) else np.nan,
    }


def _spent(rows: _Clocks, base: float, reached: float, times: Mapping[str, Any]) -> dict[str, float]:
    """Returns where the charged time of an attempt went.

    Args:
        rows: the attempt's rows.
        base: reading of the training clock that the attempt went on from.
        reached: the furthest reading before it.
        times: result of `_times`.
    """
    if not len(rows):
        nothing = {"trained_s": 0.0, "redone_s": 0.0, "eval_s": 0.0}
        return {"startup_s": times["charged_s"], **nothing, "other_s": times["charged_s"] * 0.0}
    trained, evaluated = rows.train_s[-1] - base, rows.eval_s.sum()
    startup = times["boot_s"] + rows.wall_s[0] - (rows.train_s[0] - base)
    return {
        "startup_s": startup,
        "trained_s": trained,
        "redone_s": reached - base,
        "eval_s": evaluated,
        "other_s": times["charged_s"] - startup - trained - evaluated,
    }


def _whole(attempt: Attempt, facts: Mapping[str, Any], key: str) -> int | None:
    found = facts.get(key)
    if not isinstance(found, int | None):
        raise RunDirError(f"{attempt.attempt_yaml}: {key} should be a whole number, is {found!r}")
    return found


def _moment_text(attempt: Attempt, facts: Mapping[str, Any], key: str) -> str:
    found = str(facts.get(key) or "")
    try:
        return found and str(found if datetime.datetime.fromisoformat(found) else "")
    except ValueError as error:
        raise RunDirError(f"{attempt.path}: {key} is no ISO 8601 time: {found!r}") from error


def _between(begin: str, end: str) -> float:
    """Returns the seconds between two moments; NaN where one is not known."""
    if not begin or not end:
        return np.nan
    first, last = datetime.datetime.fromisoformat(begin), datetime.datetime.fromisoformat(end)
    return (last - first).total_seconds()
