"""Performance profiles: how often a method is within a factor of the fastest (Dolan and Moré, 2002)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from hpcsngd_analysis.thin import Floats

LARGEST_RATIO = 4.0
"""The score integrates up to here, as AlgoPerf does (Dahl et al., "Benchmarking neural network training
algorithms", 2023, section 4.4)."""


@dataclass(frozen=True)
class Profile:
    """One method's profile, a step function.

    Attributes:
        method: its name.
        ratio: rising factors of the fastest time, from 1; the share holds from each to the next.
        share: of the problems that the method solves within the factor.
        score: mean of the share over factors 1 to `LARGEST_RATIO`.
    """

    method: str
    ratio: Floats
    share: Floats
    score: float


def performance_profiles(times: pd.DataFrame) -> tuple[list[Profile], int]:
    """Returns the profile of each method, in the order of the columns, and how many problems count.

    Args:
        times: one row per problem, one column per method: time to the target, or infinity where the method
            did not reach it. NaN means that the method was not tried, and the problem does not count. Nor
            does one that no method solved, or that somebody solved in no time.
    """
    values = times.to_numpy(dtype=np.float64)
    fastest = values.min(axis=1) if values.size else np.array([])
    counts = np.isfinite(fastest) & (fastest > 0)
    ratios = values[counts] / fastest[counts, None]
    found = [_profile(str(name), ratios[:, place]) for place, name in enumerate(times.columns)]
    return found, int(counts.sum())


def _profile(method: str, ratios: Floats) -> Profile:
    if not len(ratios):
        return Profile(method, np.array([1.0]), np.array([np.nan]), np.nan)
    steps = np.unique(np.append(ratios[np.isfinite(ratios)], 1.0))
    share = np.array([(ratios <= step).mean() for step in steps])
    inside = np.append(steps[steps < LARGEST_RATIO], LARGEST_RATIO)
    area = float((np.diff(inside) * share[: len(inside) - 1]).sum())
    return Profile(method, steps, share, area / (LARGEST_RATIO - 1))
