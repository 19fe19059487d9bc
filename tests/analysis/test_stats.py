"""Numbers of runs, against values worked out by hand from tests/data/runs."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from hpcsngd_analysis import stats
from hpcsngd_analysis.load import Runs, load
from tests.analysis.runs import EXAMPLES


@pytest.fixture(scope="module")
def examples() -> Runs:
    return load([EXAMPLES], ["train", "eval"])


def evaluations(*rows: tuple[str, int, str, float]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["run", "step", "split", "accuracy"])
    return frame.assign(loss=1 - frame["accuracy"], epoch=frame["step"].astype(float))


def test_elapsed_is_the_furthest_row_of_any_table(examples: Runs) -> None:
    found = stats.elapsed(examples.tables["train"], examples.tables["eval"])
    assert found["epochs"].to_dict() == {"complete": 3.0, "failed": 1.0, "resumed": 3.0, "running": 0.5}
    # The first attempt of `resumed` claims 9.5 s in rows that were dropped; 9 s is what counts.
    assert found["train_s"].to_dict() == {"complete": 6.0, "failed": 2.0, "resumed": 9.0, "running": 1.0}


def test_last_and_best_evaluation(examples: Runs) -> None:
    found = stats.split_results(examples.tables["eval"])
    assert found.loc["complete"].to_dict() == {
        "evaluations": 3,
        "final_accuracy": 0.825,
        "final_loss": 0.6,
        "best_accuracy": 0.85,
        "best_epoch": 2.0,
    }
    assert found.loc["resumed", "best_epoch"] == 3.0
    assert set(found.index) == {"complete", "resumed"}


def test_splits_are_apart() -> None:
    frame = evaluations(("a", 1, "test", 0.5), ("a", 1, "validation", 0.9), ("b", 1, "validation", 0.7))
    assert stats.split_results(frame)["best_accuracy"].to_dict() == {"a": 0.5}
    assert stats.split_results(frame, "validation")["final_accuracy"].to_dict() == {"a": 0.9, "b": 0.7}


def test_the_first_of_equal_accuracies_is_the_best() -> None:
    frame = evaluations(("a", 1, "test", 0.5), ("a", 2, "test", 0.75), ("a", 3, "test", 0.75))
    assert stats.split_results(frame).loc["a", "best_epoch"] == 2.0


def test_nan_is_a_final_value_but_never_the_best() -> None:
    frame = evaluations(("a", 1, "test", 0.5), ("a", 2, "test", math.nan), ("b", 1, "test", math.nan))
    found = stats.split_results(frame)
    assert found["evaluations"].to_dict() == {"a": 2, "b": 1}
    assert np.isnan(found["final_accuracy"]).all()
    assert found.loc["a", "best_accuracy"] == 0.5
    assert math.isnan(found.loc["b", "best_accuracy"])


def test_no_rows_give_no_results(examples: Runs) -> None:
    nothing = examples.tables["eval"].iloc[:0]
    assert len(stats.split_results(nothing)) == 0
    assert len(stats.elapsed(examples.tables["train"].iloc[:0], nothing)) == 0
    assert len(stats.not_finite(nothing)) == 0


def test_where_a_loss_stops_being_a_number(examples: Runs) -> None:
    assert stats.not_finite(examples.tables["train"]).to_dict("index") == {
        "failed": {"rows": 1, "first_step": 4}
    }
    frame = pd.DataFrame({"run": "a", "step": [1, 2, 3], "loss": [1.0, math.inf, math.nan]})
    assert stats.not_finite(frame).to_dict("index") == {"a": {"rows": 2, "first_step": 2}}


def test_time_to_target_lies_between_evaluations() -> None:
    frame = evaluations(
        *(("up", step, "test", accuracy) for step, accuracy in enumerate([0.2, 0.6, 0.4, 0.9], start=1)),
        *(("low", 1, "test", 0.3), ("low", 2, "test", 0.4), ("first", 1, "test", 0.5)),
        *(("gap", 1, "test", math.nan), ("gap", 2, "test", 0.8)),
    ).assign(train_s=lambda rows: 10 * rows["epoch"])
    found = stats.time_to_target(frame, 0.5)
    # `up` first crosses 0.5 at three quarters of the way from 0.2 to 0.6; falling back later changes nothing.
    assert found["reached"].to_dict() == {"up": True, "low": False, "first": True, "gap": True}
    assert found["epochs"].to_dict() == pytest.approx({"up": 1.75, "low": 2, "first": 1, "gap": 2})
    assert found["train_s"].to_dict() == pytest.approx({"up": 17.5, "low": 20, "first": 10, "gap": 20})
    assert len(stats.time_to_target(frame, 0.5, "validation")) == 0


def test_mean_with_students_interval() -> None:
    # standard deviation 1; t of two degrees of freedom is 4.30265
    found = stats.mean_interval([1, 2, 3])
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414), abs=1e-4)
    alone = stats.mean_interval([5])
    assert (alone.mean, math.isnan(alone.low), math.isnan(alone.high)) == (5, True, True)
