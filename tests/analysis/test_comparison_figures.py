"""Arrivals, medians with runs that missed the target, profiles and verdicts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hpcsngd.rundir import Status
from hpcsngd_analysis import comparison_figures as figures
from hpcsngd_analysis.compare import Verdict
from hpcsngd_analysis.groups import Group, groups
from hpcsngd_analysis.load import load
from hpcsngd_analysis.profiles import performance_profiles
from tests.analysis.runs import make_run

GROUP = Group("g", ("a", "b", "c", "d"))


def reached(**runs: tuple[bool, float]) -> pd.DataFrame:
    rows = {name: (arrived, seconds / 10, seconds) for name, (arrived, seconds) in runs.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["reached", "epochs", "train_s"])


def test_arrivals_are_kaplan_and_meiers() -> None:
    found = figures.arrivals(reached(a=(True, 10), b=(False, 15), c=(True, 20), d=(True, 20)), GROUP)
    assert found.time.tolist() == [0.0, 10.0, 20.0]
    # 1/4 by 10; then two of the two still watched arrive
    assert found.share.tolist() == pytest.approx([0.0, 0.25, 1.0])
    assert found.censored.tolist() == [15.0]


def test_without_censoring_arrivals_are_the_share_of_runs() -> None:
    found = figures.arrivals(reached(a=(True, 1), b=(True, 2), c=(True, 3), d=(True, 4)), GROUP)
    assert found.share.tolist() == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert found.censored.tolist() == []


def test_the_figure_draws_steps_and_ends() -> None:
    curve = figures.arrivals(reached(a=(True, 10), b=(False, 15), c=(False, 30)), GROUP)
    steps, ends = figures.arrivals_figure([curve]).data
    assert (list(steps.x), list(steps.y)) == ([0.0, 10.0, 30.0], pytest.approx([0.0, 1 / 3, 1 / 3]))
    assert steps.line.shape == "hv"
    assert (list(ends.x), list(ends.y)) == ([15.0, 30.0], pytest.approx([1 / 3, 1 / 3]))


def test_a_run_that_missed_the_target_moves_the_median() -> None:
    (row,) = figures.target_rows(reached(a=(True, 10), b=(True, 20), c=(False, 5)), [GROUP])
    assert row == {"group": "g", "runs": 3, "reached": 2, "censored": 1, "epochs": 2.0, "train_s": 20.0}
    (row,) = figures.target_rows(reached(a=(True, 10), b=(False, 20), c=(False, 5)), [GROUP])
    assert row["train_s"] is None


def test_problems_are_seeds_and_methods_are_groups(tmp_path: Path) -> None:
    for name, experiment, seed in (("a", "x", 1), ("b", "y", 1), ("c", "x", 2), ("d", "y", 2)):
        status = None if name == "d" else Status("completed", "", 1)
        make_run(
            tmp_path,
            name,
            experiment=experiment,
            settings={"seed": seed, "data": {"name": "digits"}},
            status=status,
        )
    runs = load([tmp_path])
    times = figures.problem_times(
        runs, groups(runs), reached(a=(True, 10), b=(True, 20), c=(False, 9), d=(False, 9))
    )
    assert list(times.columns) == ["x", "y"]
    first, second = times.to_numpy().tolist()
    assert first == [10.0, 20.0]
    assert second[0] == math.inf
    assert math.isnan(second[1])  # still running: it may yet arrive
    found, problems = performance_profiles(times)
    assert problems == 1
    fast, slow = figures.profile_figure(found).data
    assert (fast.name, slow.name) == ("x (1.00)", "y (0.67)")  # within 2 times of 1 to 4
    assert (list(slow.x), list(slow.y)) == ([1.0, 2.0, 4.0], [0.0, 1.0, 1.0])


def test_verdicts_are_drawn_with_their_intervals() -> None:
    found = {
        "m": Verdict("supported", "", 3, 0.02, 0.01, 0.05),
        "refused": Verdict("refused", "too few"),
    }
    drawing = figures.verdict_figure(found, "difference", 0.0)
    (points,) = drawing.data
    assert (list(points.x), list(points.y), list(points.text)) == ([0.02], ["m"], ["supported"])
    assert np.array(points.error_x.array).tolist() == pytest.approx([0.03])
    assert np.array(points.error_x.arrayminus).tolist() == pytest.approx([0.01])
    assert [shape.x0 for shape in drawing.layout.shapes] == [0.0]
    assert not figures.verdict_figure({"r": Verdict("refused", "")}, "difference", 0.0).data
