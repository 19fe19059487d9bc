"""Bootstrap intervals: cases that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hpcsngd_analysis.resampling import bootstrap_band, bootstrap_mean


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_few_values_give_their_range() -> None:
    # three values: the expanded tail is 7e-8, so the ends are the smallest and largest resample
    found = bootstrap_mean(np.array([0.0, 3.0, 6.0]), generator=generator())
    assert (found.mean, found.low, found.high, found.n) == (3.0, pytest.approx(0), pytest.approx(6), 3)


def test_many_values_give_students_interval() -> None:
    values = np.tile([0.0, 1.0], 50)
    found = bootstrap_mean(values, generator=generator(), resamples=20_000)
    # standard error with n - 1 below: 0.5 / sqrt(99); t(99) = 1.984
    half = 1.984 * 0.5 / math.sqrt(99)
    assert found.low == pytest.approx(0.5 - half, abs=0.005)
    assert found.high == pytest.approx(0.5 + half, abs=0.005)


def test_equal_values_have_no_width_and_one_has_no_interval() -> None:
    equal = bootstrap_mean(np.full(5, 2.0), generator=generator())
    assert (equal.low, equal.high) == pytest.approx((2.0, 2.0))
    single = bootstrap_mean(np.array([2.0]), generator=generator())
    assert single.mean == 2.0
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    with pytest.raises(ValueError, match="no value"):
        bootstrap_mean(np.array([]), generator=generator())


def test_a_band_is_the_interval_at_each_point_and_the_same_for_the_same_seed() -> None:
    values = np.random.default_rng(1).normal(size=(8, 3))
    mean, low, high = bootstrap_band(values, generator=generator())
    assert mean == pytest.approx(values.mean(axis=0))
    assert (low < mean).all()
    assert (high > mean).all()
    again = bootstrap_band(values, generator=generator())
    assert (again[1] == low).all()
    one = bootstrap_mean(values[:, 1], generator=generator())
    assert one.low == pytest.approx(low[1])
