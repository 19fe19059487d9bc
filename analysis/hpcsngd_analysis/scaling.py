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
    rows = profiling[profiling["phase"].isin(["data", "forward", "backward"])]
    worked = rows.groupby(["run", "step", "rank"], sort=False, as_index=False)["seconds"].sum()
    ranks = worked.groupby("run")["rank"].transform("nunique")
    is_whole = worked.groupby(["run", "step"])["rank"].transform("size") == ranks
    steps = worked[is_whole].sort_values(["run", "rank"], kind="stable")
    slowest = steps.loc[steps.groupby(["run", "step"], sort=False)["seconds"].idxmax()]
    wins = slowest.groupby(["run", "rank"]).size().rename("slowest")
    found = steps.groupby(["run", "rank"], sort=False)["seconds"].agg(["median", "size"]).join(wins)
    middle = found.groupby(level="run")["median"].transform("median")
    is_many = found.groupby(level="run")["median"].transform("size") > 1
    found["seconds"], found["ratio"] = found["median"], found["median"] / middle
    found["slowest"] = found["slowest"].fillna(0.0) / found["size"]
    found["is_straggler"] = (found["ratio"] >= SLOW) & is_many
    return found.reset_index()[["run", "rank", "seconds", "ratio", "slowest", "is_straggler"]]
