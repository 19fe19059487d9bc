"""Performance profiles on four problems that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from hpcsngd_analysis.profiles import performance_profiles


def test_shares_and_scores() -> None:
    never = math.inf
    times = pd.DataFrame(
        {"a": [1.0, 6, never, never, 2], "b": [2.0, 3, 5, never, math.nan]},
        index=["p", "q", "r", "unsolved", "untried"],
    )
    found, problems = performance_profiles(times)
    assert problems == 3
    a, b = found
    # ratios of a: 1, 2, never; of b: 2, 1, 1
    assert (a.method, a.ratio.tolist()) == ("a", [1, 2])
    assert a.share == pytest.approx([1 / 3, 2 / 3])
    assert b.share == pytest.approx([2 / 3, 1])
    # over 1 to 4: one third of a factor of one, two thirds of two more
    assert a.score == pytest.approx((1 / 3 + 2 * 2 / 3) / 3)
    assert b.score == pytest.approx((2 / 3 + 2) / 3)


def test_a_ratio_beyond_the_score_is_drawn_and_does_not_count() -> None:
    found, _ = performance_profiles(pd.DataFrame({"a": [1.0], "b": [10.0]}))
    assert found[1].ratio.tolist() == [1, 10]
    assert found[1].share.tolist() == [0, 1]
    assert found[1].score == 0


def test_without_a_problem_there_is_no_share() -> None:
    found, problems = performance_profiles(pd.DataFrame({"a": [math.inf]}))
    assert problems == 0
    assert np.isnan(found[0].share).all()
    assert math.isnan(found[0].score)
