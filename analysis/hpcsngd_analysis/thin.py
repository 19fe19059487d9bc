"""Fewer points for the same picture: the extremes of each interval stay, so no spike is lost."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

POINTS = 1000
"""A curve with more rows is thinned to at most this many points, see `kept_points`."""

LOADED_ROWS = 2000
"""What a report asks `hpcsngd_analysis.load.load` for as ``train_rows``."""

PAGE_POINTS = 400_000
"""All curves of one page together have at most about this many points: some 6 MB as packed float32."""

_FEWEST = 40

Floats = npt.NDArray[np.float64]


def kept_points(values: Floats, points: int = POINTS) -> npt.NDArray[np.intp]:
    """Returns which points of a curve to draw: first, last, and lowest and highest of equal parts.

    NaN counts only where a part has nothing else, so that a diverged run keeps its last numbers.

    Args:
        values: the curve, any length.
        points: how many to keep at most; at least 4.

    Returns:
        Increasing positions in ``values``; all of them where there are no more than ``points``.
    """
    if len(values) <= points:
        return np.arange(len(values))
    is_nan = np.isnan(values)
    low, high = np.where(is_nan, np.inf, values), np.where(is_nan, -np.inf, values)
    # one argmin over a table of parts is much faster than one per part; the last part may be shorter
    parts = points // 2 - 1
    width = -(-len(values) // parts)
    rows = -(-len(values) // width)
    padding = (0, rows * width - len(values))
    lowest = np.pad(low, padding, constant_values=np.inf).reshape(rows, width).argmin(axis=1)
    highest = np.pad(high, padding, constant_values=-np.inf).reshape(rows, width).argmax(axis=1)
    starts = np.arange(rows) * width
    return np.unique(np.concatenate([[0, len(values) - 1], starts + lowest, starts + highest])).astype(
        np.intp
    )


def points_per_curve(curves: int) -> int:
    """Returns how many points each of the page's curves may have, from `POINTS` down to 40.

    Args:
        curves: number of curves on the whole page, over all figures.
    """
    return max(_FEWEST, min(POINTS, PAGE_POINTS // max(curves, 1)))
