"""Line search for the strong Wolfe conditions, on any function of one number.

With phi(t) the objective at ``x + t d`` and phi'(t) its slope there, t is accepted when

    phi(t) <= phi(0) + c1 t phi'(0)     and     |phi'(t)| <= c2 |phi'(0)|

Source: Nocedal and Wright, Numerical Optimization, 2nd ed., algorithms 3.5 and 3.6, with the cubic of
equation 3.59. A value or slope that is not finite counts as infinitely high.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

#: What one evaluation returns: phi(t) and phi'(t).
Evaluate = Callable[[float], tuple[float, float]]


@dataclass(frozen=True)
class Point:
    """One evaluation.

    Attributes:
        t: where.
        value: phi(t); infinity where it is not finite.
        slope: phi'(t); NaN where it is not finite.
    """

    t: float
    value: float
    slope: float


@dataclass(frozen=True)
class Found:
    """How a search ended.

    Attributes:
        t: the step; 0.0 if no point was lower than the start.
        evaluations: of phi.
        is_wolfe: whether both conditions hold at t.
    """

    t: float
    evaluations: int
    is_wolfe: bool


@dataclass(frozen=True)
class Rule:
    """What is accepted, and after how many evaluations to give up.

    Attributes:
        c1: of the decrease, in (0, c2).
        c2: of the slope, in (c1, 1).
        max_evaluations: at least 1.

    Raises:
        ValueError: a number is out of its range.
    """

    c1: float = 1e-4
    c2: float = 0.9
    max_evaluations: int = 25

    def __post_init__(self) -> None:
        if not 0 < self.c1 < self.c2 < 1:
            raise ValueError(f"c1={self.c1}, c2={self.c2}: must be 0 < c1 < c2 < 1")
        if self.max_evaluations < 1:
            raise ValueError(f"max_evaluations={self.max_evaluations}: must be at least 1")


def search(evaluate: Evaluate, value: float, slope: float, first: float, rule: Rule) -> Found:
    """Returns a step that satisfies the conditions, else the lowest point that was seen.

    Args:
        evaluate: phi and its slope.
        value: phi(0), finite.
        slope: phi'(0), negative.
        first: the first t to try, positive.
        rule: the conditions.
    """
    return _Search(evaluate, Point(0.0, value, slope), rule).run(first)


class _Search:
    def __init__(self, evaluate: Evaluate, start: Point, rule: Rule) -> None:
        self._evaluate, self._start, self._rule = evaluate, start, rule
        self._lowest, self._count = start, 0

    def run(self, t: float) -> Found:
        """Widens the step until an interval holds an acceptable one, then narrows that."""
        before = self._start
        while self._has_more:
            now = self._at(t)
            if self._is_too_high(now) or (before.t > 0 and now.value >= before.value):
                return self._narrow(before, now)
            if self._is_flat(now):
                return self._found(now, is_wolfe=True)
            if now.slope >= 0:
                return self._narrow(now, before)
            wider = _cubic_minimum(before, now)
            before, t = now, min(max(wider or 0.0, 1.1 * now.t), 10 * now.t)
        return self._found(self._lowest, is_wolfe=False)

    def _narrow(self, low: Point, high: Point) -> Found:
        """Shrinks an interval; its end ``low`` is the best decrease yet, and downhill of it lies ``high``."""
        while self._has_more and abs(high.t - low.t) > 1e-9 * max(low.t, high.t):
            now = self._at(_inside(low, high))
            if self._is_too_high(now) or now.value >= low.value:
                high = now
                continue
            if self._is_flat(now):
                return self._found(now, is_wolfe=True)
            if now.slope * (high.t - low.t) >= 0:
                high = low
            low = now
        return self._found(self._lowest, is_wolfe=False)

    @property
    def _has_more(self) -> bool:
        return self._count < self._rule.max_evaluations

    def _at(self, t: float) -> Point:
        self._count += 1
        value, slope = self._evaluate(t)
        is_finite = math.isfinite(value) and math.isfinite(slope)
        point = Point(t, value, slope) if is_finite else Point(t, math.inf, math.nan)
        if point.value < self._lowest.value:
            self._lowest = point
        return point

    def _is_too_high(self, point: Point) -> bool:
        return point.value > self._start.value + self._rule.c1 * point.t * self._start.slope

    def _is_flat(self, point: Point) -> bool:
        return abs(point.slope) <= -self._rule.c2 * self._start.slope

    def _found(self, point: Point, *, is_wolfe: bool) -> Found:
        return Found(point.t, self._count, is_wolfe)


def _inside(a: Point, b: Point) -> float:
    """Returns a point well inside the interval: the cubic's minimum, or the middle."""
    low, high = min(a.t, b.t), max(a.t, b.t)
    margin = 0.1 * (high - low)
    t = _cubic_minimum(a, b)
    return (low + high) / 2 if t is None else min(max(t, low + margin), high - margin)


def _cubic_minimum(a: Point, b: Point) -> float | None:
    """Returns the minimum of the cubic through two values and slopes; None where it has none."""
    if not (math.isfinite(b.value) and math.isfinite(a.value)):
        return None
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    if not square >= 0:
        return None
    d2 = math.copysign(math.sqrt(square), b.t - a.t)
    divisor = b.slope - a.slope + 2 * d2
    return None if divisor == 0 else b.t - (b.t - a.t) * (b.slope + d2 - d1) / divisor
