"""The numbers of the Fashion-MNIST study: from run directories to what each cell reached, and to text.

Pure but for reading the run directories, which is `hpcsngd_analysis.load`'s work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import pandas as pd

from hpcsngd.rundir import RunDir
from hpcsngd_analysis import stats
from hpcsngd_analysis.load import load


def outcomes(runs: Sequence[RunDir], target: float) -> pd.DataFrame:
    """Returns what each run reached, one row per run in the order given.

    Returns:
        ``state``; ``reached`` (whether the target was), ``epochs`` and ``train_s`` (to the target, or to the
        last evaluation where it was not reached), ``final_accuracy`` (share; NaN unless the run completed).
    """
    loaded = load([run.path for run in runs], ["eval"])
    order = [run.name for run in loaded.records]
    evaluation = loaded.tables["eval"]
    found = stats.time_to_target(evaluation, target).reindex(order)
    found["reached"] = found["reached"].eq(True)  # a run that died before its first evaluation has no entry
    found.insert(0, "state", [run.state for run in loaded.records])
    final = stats.split_results(evaluation)["final_accuracy"].reindex(order)
    found["final_accuracy"] = final.where(found["state"] == "completed")
    return found.reset_index(drop=True)


def grid_table(
    cells: Sequence[tuple[str, Mapping[str, float]]], runs: Sequence[RunDir], target: float
) -> pd.DataFrame:
    """Returns the cells of the grid with what they reached and whether they were chosen, ordered by method.

    Args:
        cells: method and tuned keys of each run.
        runs: the run of each cell.
        target: accuracy, a share.
    """
    keys = list(dict.fromkeys(chain.from_iterable(tuned for _, tuned in cells)))
    settings = pd.DataFrame([{"method": label, **tuned} for label, tuned in cells], columns=["method", *keys])
    table = pd.concat([settings, outcomes(runs, target)], axis=1)
    table["chosen"] = False
    table.loc[[_choice(group) for _, group in table.groupby("method", sort=False)], "chosen"] = True
    labels = list(dict.fromkeys(table["method"]))
    return table.sort_values("method", key=lambda column: column.map(labels.index), kind="stable")


def _choice(group: pd.DataFrame) -> int:
    """Returns the index of the cell with the fewest epochs to the target, or else the best final accuracy."""
    reached = group[group["reached"]]
    best = reached["epochs"] if len(reached) else -group["final_accuracy"].fillna(0.0)
    ordered: list[int] = best.sort_values(kind="stable").index.to_list()
    return ordered[0]


@dataclass(frozen=True)
class Quantity:
    """A number of a run that methods are compared by.

    Attributes:
        column: in the frame of `outcomes`.
        title: what the table calls it.
        unit: factor from the column to what is printed.
        digits: decimals printed.
        better: 1 where larger is better, -1 where smaller is.
    """

    column: str
    title: str
    unit: float
    digits: int
    better: int


EPOCHS = Quantity("epochs", "epochs to target", 1, 2, -1)
SECONDS = Quantity("train_s", "s to target", 1, 0, -1)
FINAL = Quantity("final_accuracy", "final accuracy %", 100, 2, 1)
QUANTITIES = (EPOCHS, SECONDS, FINAL)


def usable(results: pd.DataFrame, quantity: Quantity) -> pd.Series[float]:
    """Returns a quantity of each run, NaN where the run has no such number: target not reached, or died."""
    values = results[quantity.column]
    return values if quantity is FINAL else values.where(results["reached"])


def compare(results: pd.DataFrame, method: str, baseline: str, quantity: Quantity) -> stats.Interval | None:
    """Returns the mean difference of a method to the baseline over the seeds that both have, with interval.

    Returns:
        None where a run of either has no such number: leaving it out would flatter the method that failed.
    """
    values = results.assign(value=usable(results, quantity))
    by_seed = values.pivot_table(index="seed", columns="method", values="value", dropna=False)
    both = by_seed.reindex(columns=[method, baseline])
    if both.isna().to_numpy().any():
        return None
    return stats.mean_interval((both[method] - both[baseline]).to_list())


def verdict(difference: stats.Interval | None, better: int) -> str:
    """Returns whether the difference supports that a method is better than the baseline.

    Args:
        difference: method less baseline; None if it cannot be formed.
        better: 1 where larger is better, -1 where smaller is.
    """
    if difference is None or math.isnan(difference.low) or difference.low <= 0 <= difference.high:
        return "cannot tell"
    return "supported" if difference.mean * better > 0 else "not supported"


def render(results: pd.DataFrame, target: float, baseline: str) -> str:
    """Returns the two tables of the study: each method by itself, and each other against the baseline.

    Args:
        results: the frame of `outcomes` with the columns ``method`` and ``seed`` added.
        target: accuracy, a share.
        baseline: the method that the others are compared with.
    """
    methods = list(dict.fromkeys(results["method"]))
    alone = [_alone(method, results[results["method"] == method]) for method in methods]
    against = [_against(results, method, baseline) for method in methods if method != baseline]
    return "\n".join(
        [
            f"Target {100 * target:g} %; mean over seeds [95 % interval, Student's t].",
            *_aligned(["method", "reached", *(quantity.title for quantity in QUANTITIES)], alone),
            "",
            f"Method less {baseline} on the same seed; is it better?",
            *_aligned(["method", *chain.from_iterable((q.title, "better?") for q in QUANTITIES)], against),
        ]
    )


def _alone(method: str, rows: pd.DataFrame) -> list[str]:
    cells = [method, f"{rows['reached'].sum()}/{len(rows)}"]
    for quantity in QUANTITIES:
        values = usable(rows, quantity)
        whole = values.notna().all()
        cells.append(_shown(stats.mean_interval(values.to_list()), quantity) if whole else "-")
    return cells


def _against(results: pd.DataFrame, method: str, baseline: str) -> list[str]:
    cells = [method]
    for quantity in QUANTITIES:
        difference = compare(results, method, baseline, quantity)
        cells.append("-" if difference is None else _shown(difference, quantity, sign="+"))
        cells.append(verdict(difference, quantity.better))
    return cells


def _shown(interval: stats.Interval, quantity: Quantity, sign: str = "") -> str:
    scaled = (quantity.unit * value for value in (interval.mean, interval.low, interval.high))
    mean, low, high = (f"{value:{sign}.{quantity.digits}f}" for value in scaled)
    return f"{mean} [{low}, {high}]"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
