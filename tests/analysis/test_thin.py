"""Thinning: extremes stay, ends stay, limits hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpcsngd_analysis.load import load
from hpcsngd_analysis.thin import PAGE_POINTS, POINTS, kept_points, points_per_curve
from tests.analysis.runs import make_run


@pytest.mark.parametrize("length", [101, 997, 1000, 1001, 12_345])
@pytest.mark.parametrize("points", [4, 10, 100])
def test_extremes_and_ends_of_every_length_stay_within_the_limit(length: int, points: int) -> None:
    values = np.random.default_rng(length).normal(size=length)
    kept = kept_points(values, points)
    assert len(kept) <= points
    assert {0, length - 1, values.argmin(), values.argmax()} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()


def test_lowest_and_highest_of_each_part() -> None:
    values = np.array([0.0, 5, 1, 2, 9, 3, -4, 3])  # parts of two
    assert kept_points(values, 6).tolist() == [0, 1, 4, 6, 7]


def test_a_part_with_numbers_drops_its_nan_and_one_without_keeps_one() -> None:
    values = np.array([1.0, np.nan, 3, np.nan, np.nan, np.nan, np.nan, np.nan, 2, np.inf, -np.inf, 0])
    kept = kept_points(values, 8)  # three parts of four
    assert kept.tolist() == [0, 2, 4, 9, 10, 11]


def test_a_page_of_many_curves_gives_each_fewer_points() -> None:
    assert points_per_curve(0) == points_per_curve(1) == POINTS
    assert points_per_curve(4000) * 4000 <= PAGE_POINTS
    assert points_per_curve(10**9) >= 4


def test_loading_fewer_rows_keeps_extremes_and_true_counts(tmp_path: Path) -> None:
    loss = np.linspace(2, 1, 500)
    loss[123], loss[321], loss[400] = 50, 0.01, np.nan
    accuracy = np.linspace(0, 0.5, 500)
    accuracy[77] = 0.9
    rows = [
        {"step": i + 1, "loss": x, "accuracy": y}
        for i, (x, y) in enumerate(zip(loss.tolist(), accuracy.tolist(), strict=True))
    ]
    make_run(tmp_path, tables={"train": rows})
    runs = load([tmp_path], train_rows=40)
    train = runs.tables["train"]
    assert len(train) <= 40
    assert {1, 78, 124, 322, 500} <= set(train["step"])
    assert train["step"].is_monotonic_increasing
    (run,) = runs.records
    assert run.rows["train"] == 500
    assert run.not_finite["train"] == (1, 401)
    assert len(load([tmp_path]).tables["train"]) == 500
