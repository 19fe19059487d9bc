"""Bootstrap intervals of means over replicates, such as the seeds of a study."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from hpcsngd_analysis.stats import Interval, student_quantile
from hpcsngd_analysis.thin import Floats

RESAMPLES = 2000


def bootstrap_mean(
    values: Floats,
    *,
    generator: np.random.Generator,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Returns the mean of replicates with its bootstrap interval, see `bootstrap_band`.

    Args:
        values: shape ``(n,)``, one per replicate.
        generator: source of randomness.
        confidence: that the interval covers the mean, between 0 and 1.
        resamples: number of bootstrap samples.

    Raises:
        ValueError: no value.
    """
    mean, low, high = bootstrap_band(
        np.asarray(values, dtype=np.float64)[:, None],
        generator=generator,
        confidence=confidence,
        resamples=resamples,
    )
    return Interval(float(mean[0]), float(low[0]), float(high[0]), len(values))


def bootstrap_band(
    values: Floats,
    *,
    generator: np.random.Generator,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> tuple[Floats, Floats, Floats]:
    """Returns mean, lower and upper end of the interval at each point of curves, one curve per replicate.

    Percentile bootstrap with expanded percentiles: with n values the plain percentiles are too narrow by
    sqrt((n - 1)/n) and by taking normal for Student's quantiles (Hesterberg, "What teachers should know about
    the bootstrap", 2015, section 4.1). Whole curves are drawn, so the points of a resample belong together.
    Few values can give no more than their range: with n = 2 that misses the mean in every second case.

    Args:
        values: shape ``(n, m)``: n replicates at m points.
        generator: source of randomness.
        confidence: that the interval of a point covers its mean.
        resamples: number of bootstrap samples.

    Returns:
        Three arrays of shape ``(m,)``; the ends are NaN for a single replicate.

    Raises:
        ValueError: no replicate.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no value to take the mean of")
    mean: Floats = values.mean(axis=0)
    if n == 1:
        return mean, np.full_like(mean, math.nan), np.full_like(mean, math.nan)
    # how often each replicate is drawn; a matrix product then makes all means at once
    counts = generator.multinomial(n, np.full(n, 1 / n), size=resamples)
    means = counts @ values / n
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_quantile(confidence, n - 1))
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return mean, low, high
