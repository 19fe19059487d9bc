"""Scaling over ranks, and ranks that are slower than the others."""

from __future__ import annotations

import numpy as np
import pandas as pd

SLOW = 1.1
"""A rank that needs this much more than the median rank is a straggler."""


def efficiency(times: pd.Series, *, is_weak: bool) -> pd.DataFrame:
    """Returns speed-up and efficiency against the fewest ranks.

    Strong scaling keeps the problem: with p0 the fewest ranks, the speed-up of p ranks is t(p0)/t(p) and the
    efficiency t(p0) p0 / (t(p) p). Weak scaling grows it with the ranks: the efficiency is t(p0)/t(p) and the
    speed-up, in work per second, that times p/p0.

    Args:
        times: seconds for the same number of steps or epochs, index: ranks, each once.
        is_weak: whether the work per rank, instead of all work, is the same for all.

    Returns:
        Index ``ranks``, rising; ``seconds``, ``speedup``, ``efficiency``.

    Raises:
        ValueError: no time, or several for one number of ranks.
    """
    if times.empty or not times.index.is_unique:
        raise ValueError("scaling needs one time per number of ranks")
    ordered = times.sort_index().astype("float64")
    growth = ordered.index.to_numpy(dtype=np.float64) / ordered.index[0]
    ratio = ordered.iloc[0] / ordered
    speedup, share = (ratio * growth, ratio) if is_weak else (ratio, ratio / growth)
    found = pd.DataFrame({"seconds": ordered, "speedup": speedup, "efficiency": share})
    return found.rename_axis("ranks")


def step_seconds(profiling: pd.DataFrame) -> pd.DataFrame:
    """Returns the seconds of each step on each rank, all phases together.

    Phase ``capture`` lies within forward and backward and is not added again.

    Args:
        profiling: the table ``profiling``.

    Returns:
        Columns ``run, step, rank, seconds``.
    """
    rows = profiling[profiling["phase"] != "capture"]
    return rows.groupby(["run", "step", "rank"], sort=False, as_index=False)["seconds"].sum()


def stragglers(profiling: pd.DataFrame) -> pd.DataFrame:
    """Returns how the ranks of each run compare, over the steps that all of its ranks have measured.

    Ranks wait for each other in collectives, so what counts is the work before: phases ``data``, ``forward``
    and ``backward``. (In ``backward`` DDP waits, too; a slow rank is then told by ``forward``.)

    Args:
        profiling: the table ``profiling``.

    Returns:
        Columns ``run, rank, seconds`` (median of a step), ``ratio`` (to the median rank), ``slowest`` (share
        of the steps in which this rank was the slowest) and ``is_straggler`` (ratio of at least `SLOW`, among
        at least two ranks).
    """
    columns = ["run", "rank", "seconds", "ratio", "slowest", "is_straggler"]
    rows = profiling[profiling["phase"].isin(["data", "forward", "backward"])]
    parts = []
    for run, table in rows.groupby("run", sort=False):
        steps = table.pivot_table(index="step", columns="rank", values="seconds", aggfunc="sum").dropna()
        if not len(steps):
            continue
        median = steps.median()
        ratio = median / median.median()
        slowest = steps.idxmax(axis=1).value_counts(normalize=True).reindex(steps.columns, fill_value=0.0)
        found = pd.DataFrame({"run": run, "rank": steps.columns, "seconds": median.to_numpy()})
        found["ratio"], found["slowest"] = ratio.to_numpy(), slowest.to_numpy()
        found["is_straggler"] = (found["ratio"] >= SLOW) & (len(median) > 1)
        parts.append(found)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
