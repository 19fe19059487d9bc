"""The numbers of the Fashion-MNIST study: from run directories to what each cell reached, and to text.

Pure but for reading the run directories, which is `hpcsngd_analysis.load`'s work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    order = [run.name for run in loaded.runs]
    evaluation = loaded.tables["eval"]
    found = stats.time_to_target(evaluation, target).reindex(order)
    found["reached"] = found["reached"].eq(True)  # a run that died before its first evaluation has no entry
    found.insert(0, "state", [run.state for run in loaded.runs])
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
    best = reached["epochs"].idxmin() if len(reached) else group["final_accuracy"].fillna(-1.0).idxmax()
    return int(best)


def render(outcomes: pd.DataFrame, target: float) -> str:
    """Returns the table of the study."""
    return outcomes.to_string()
