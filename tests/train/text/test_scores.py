from __future__ import annotations

import math

import numpy as np
import pytest

from hpcsngd.train.text.glue import LAYOUTS
from hpcsngd.train.text.scores import METRICS

PREDICTED, TRUE = np.array([1.0, 1, 0, 1, 0, 0]), np.array([1.0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", 3 / 6),
        # 2 right of 3 said, of 4 true
        ("f1", 2 * 2 / (3 + 4)),
        # (2 * 1 - 1 * 2) / sqrt(3 * 4 * 2 * 3)
        ("matthews", 0.0),
    ],
)
def test_classes_are_scored_as_by_hand(name: str, expected: float) -> None:
    assert METRICS[name](PREDICTED, TRUE) == pytest.approx(expected)


def test_the_matthews_coefficient_of_other_counts() -> None:
    predicted, true = np.array([1.0, 1, 1, 0]), np.array([1.0, 1, 0, 0])
    assert METRICS["matthews"](predicted, true) == pytest.approx((2 * 1 - 1 * 0) / math.sqrt(3 * 2 * 2 * 1))


def test_correlations_are_those_of_values_and_of_ranks() -> None:
    predicted, true = np.array([1.0, 2, 3, 10]), np.array([1.0, 3, 2, 4])
    centered, others = predicted - 4, true - 2.5
    by_hand = (centered @ others) / math.sqrt((centered @ centered) * (others @ others))
    assert METRICS["pearson"](predicted, true) == pytest.approx(by_hand)
    # ranks 1 2 3 4 against 1 3 2 4
    assert METRICS["spearman"](predicted, true) == pytest.approx(1 - 6 * 2 / (4 * 15))


@pytest.mark.parametrize(
    ("name", "expected"), [("f1", 0), ("matthews", 0), ("pearson", None), ("spearman", None)]
)
def test_constant_predictions_have_a_score_or_nan_and_no_warning(name: str, expected: float | None) -> None:
    found = METRICS[name](np.zeros(4), np.array([0.0, 1, 0, 1]))
    assert math.isnan(found) if expected is None else found == expected


def test_the_tasks_of_glue_are_scored_as_their_paper_says() -> None:
    assert {name: tuple(layout.metrics) for name, layout in LAYOUTS.items()} == {
        "cola": ("matthews",),
        "sst2": ("accuracy",),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "stsb": ("spearman", "pearson"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
    }
