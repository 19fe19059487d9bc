"""Tables for people: the runs, what to know about each, and the settings in which they differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from hpcsngd_analysis import stats
from hpcsngd_analysis.load import Run, Runs

NOT_SET = "–"


def runs_table(runs: Runs) -> pd.DataFrame:
    """Returns one row per run, failed and empty ones included, in the order loaded.

    Columns: those of `Runs.runs`, then ``epochs_planned``, ``epochs`` (passes completed), ``train_s``
    (training time), ``evaluations`` on test data (0 where there is none) and the results of
    `stats.split_results` on test data: ``final_accuracy``, ``final_loss``, ``best_accuracy``, ``best_epoch``.
    Times are seconds, accuracies shares. A cell that no row supports is NaN.
    """
    train, evaluation = runs.tables["train"], runs.tables["eval"]
    table = runs.runs
    planned = [run.config["experiment"].get("epochs") for run in runs.records]
    table["epochs_planned"] = pd.Series(planned, dtype="float64")
    for measured in (stats.elapsed(train, evaluation), stats.split_results(evaluation)):
        table = table.merge(measured, left_on="run", right_index=True, how="left")
    table["evaluations"] = table["evaluations"].fillna(0).astype("int64")
    return table


def notes(runs: Runs) -> dict[str, list[str]]:
    """Returns, for every run, what a reader of its numbers must know; an empty list for nothing."""
    train, evaluation = runs.tables["train"], runs.tables["eval"]
    rows = {name: set(table["run"].unique()) for name, table in (("train", train), ("eval", evaluation))}
    return {
        run.name: [
            *_state_notes(run),
            *_row_notes(run),
            *_missing_notes(run.name, rows),
            *_not_finite_notes(run),
            *run.notes,
        ]
        for run in runs.records
    }


def _state_notes(run: Run) -> Iterator[str]:
    if run.origin != "run":
        yield "from files of the original HyLo scripts, which do not write how a run ended"
    elif run.status is None:
        seen = f"its last row is of {run.last_utc}" if run.last_utc else "it has written no rows"
        yield f"has not ended, or ended without a word; {seen}"
    elif run.state != "completed":
        yield f"{run.state}: {run.reason or 'no reason recorded'}"
    if run.has_local_changes:
        yield "ran from a working tree with uncommitted changes"


def _row_notes(run: Run) -> Iterator[str]:
    for table, dropped in run.dropped_rows.items():
        if dropped and run.origin == "run":
            yield f"{table}: {_rows(dropped)} written again by a later attempt; the last counts"
    for file in run.unfinished_files:
        yield f"{file}: the last line is unfinished and was left out"


def _missing_notes(run: str, rows: Mapping[str, set[str]]) -> Iterator[str]:
    missing = [name for name, found in rows.items() if run not in found]
    if missing:
        yield f"no {' and no '.join(missing)} rows: absent from those curves"


def _not_finite_notes(run: Run) -> Iterator[str]:
    for table, found in run.not_finite.items():
        yield f"{table}: loss is not a finite number in {_rows(found.rows)}, first at step {found.first_step}"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def config_differences(runs: Runs) -> pd.DataFrame:
    """Returns the settings that differ between the runs.

    Nested keys are joined by dots. A list is one value. A section that is null in one run and filled in
    another is shown by its keys alone.

    Returns:
        Index ``run``; one text column per key of site or experiment whose value is not the same in all runs,
        in the order first met; `NOT_SET` where a run has no such key. No columns for a single run.
    """
    flat = [dict(flatten(run.config)) for run in runs.records]
    keys = list(dict.fromkeys(key for leaves in flat for key in leaves))
    differing = {}
    for key in keys:
        cells = [_cell(leaves, key) for leaves in flat]
        if len(set(cells)) > 1 and not _is_empty_section(key, keys, flat):
            differing[key] = [_shown(cell) for cell in cells]
    return pd.DataFrame(differing, index=pd.Index([run.name for run in runs.records], name="run"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested mappings with dotted keys; lists and empty mappings are leaves."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def _cell(leaves: Mapping[str, Any], key: str) -> str | None:
    # As JSON, so that the text "1" and the number 1 differ.
    return json.dumps(leaves[key], default=str, ensure_ascii=False) if key in leaves else None


def _shown(cell: str | None) -> str:
    if cell is None:
        return NOT_SET
    value = json.loads(cell)
    return value if isinstance(value, str) else cell


def _is_empty_section(key: str, keys: Sequence[str], flat: Sequence[Mapping[str, Any]]) -> bool:
    is_section = any(other.startswith(f"{key}.") for other in keys)
    return is_section and all(leaves.get(key) in (None, {}) for leaves in flat)
