"""Where the time of runs went, over all attempts, and what it cost.

Queue, restarts and work done again are clocks of their own: a run that was requeued twice has the same
training time as one that never was, and another charged time.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from hpcsngd_analysis.load import Runs
from hpcsngd_analysis.thin import Floats

COLUMNS = {
    "queue_s": "waiting in the queue, all attempts",
    "startup_s": "from each start to the first training step",
    "train_s": "training that counts",
    "redone_s": "training that was lost and done again",
    "eval_s": "evaluations",
    "other_s": "the rest of charged_s: checkpoints, waiting, leaving",
    "charged_s": "from start to end of each attempt, summed",
    "node_hours": "charged time times nodes, h",
    "lost_node_hours": "training done again times the nodes of the attempt that lost it, h",
    "goodput": "train_s over charged_s",
    "restarts": "attempts after the first",
}
"""Column of `clocks` -> meaning; seconds unless said otherwise."""


def clocks(runs: Runs) -> pd.DataFrame:
    """Returns the clocks of each run that has an attempt, index ``run``, columns as in `COLUMNS`.

    A clock that one attempt does not know is NaN for the run. An attempt that has not ended counts up to its
    last row. The parts of ``charged_s`` are ``startup_s, train_s, redone_s, eval_s`` and ``other_s``.
    """
    rows = runs.attempts
    hours = rows["nodes"].astype("float64") / 3600
    # what an attempt does again was lost by the one before it
    nodes_before = hours.groupby(rows["run"], sort=False).shift(1)
    lost = (rows["redone_s"] * nodes_before).where(rows["redone_s"] > 0, 0.0)
    derived = rows.assign(node_hours=rows["charged_s"] * hours, lost_node_hours=lost)
    summed = ["queue_s", "startup_s", "trained_s", "redone_s", "eval_s", "other_s", "charged_s"]
    grouped = derived.groupby("run", sort=False)
    total = grouped[[*summed, "node_hours", "lost_node_hours"]].agg(lambda column: column.sum(skipna=False))
    total["train_s"] = total["trained_s"] - total["redone_s"]
    total["goodput"] = total["train_s"] / total["charged_s"].where(total["charged_s"] > 0)
    total["restarts"] = grouped.size() - 1
    return total[list(COLUMNS)]


def charged_time(runs: Runs, table: pd.DataFrame) -> Floats:
    """Returns the time charged to its run at each row, in seconds, earlier attempts included.

    Args:
        runs: where the rows are from.
        table: rows with the columns ``run``, ``attempt`` and ``wall_s``, such as ``train`` or ``eval``.

    Returns:
        One number per row; NaN where an attempt does not say when it began.
    """
    begun = runs.attempts.set_index(["run", "attempt"])
    offset = begun["before_s"] + begun["boot_s"]
    places = offset.index.get_indexer(pd.MultiIndex.from_frame(table[["run", "attempt"]]))
    values = np.append(offset.to_numpy(float), np.nan)  # -1, the place of none, is the last
    found: Floats = values[places] + table["wall_s"].to_numpy(float)
    return found
