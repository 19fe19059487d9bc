"""The best setting of a sweep: means over replicates, intervals, ties, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcsngd import rundir
from hpcsngd.rundir import Status
from hpcsngd_analysis import report, stats
from hpcsngd_analysis.load import load
from hpcsngd_analysis.sweeps import Sweep, sweeps
from tests.analysis.runs import make_run

DONE = Status("completed", "", 1, utc="2026-01-05T10:00:00.000+00:00")
FAILED = Status("failed", "nan: loss is nan", 1, utc="2026-01-05T10:00:00.000+00:00")


def add_cell(
    folder: Path,
    cell: Mapping[str, Any],
    accuracy: float | None,
    *,
    status: Status | None = DONE,
    folds: int | None = None,
) -> None:
    """Writes the run of one cell; its evaluation is a validation if it has folds."""
    split = "validation" if folds else "test"
    rows = [] if accuracy is None else [{"step": 1, "split": split, "accuracy": accuracy}]
    data = {"name": "digits", "folds": {"count": folds} if folds else None}
    name = "-".join(str(value) for value in cell.values())
    run = make_run(folder, name, settings={"data": data}, status=status, tables={"eval": rows})
    record = run.record() | {"sweep": {"cell": name, "axes": dict(cell)}}
    rundir.write_yaml(run.run_yaml, record)


def grid(folder: Path, results: Mapping[float, tuple[float | None, ...]], **options: Any) -> Sweep:
    """Returns the sweep over learning rates, with one seed per result; None stands for a failed run."""
    for lr, accuracies in results.items():
        for seed, accuracy in enumerate(accuracies):
            status = FAILED if accuracy is None else DONE
            add_cell(folder, {"optimizer.lr": lr, "seed": seed}, accuracy, status=status, **options)
    return only(folder)


def only(folder: Path) -> Sweep:
    (found,) = sweeps(load([folder], ("eval",)))
    return found


# from tables of the t distribution: 97.5 % and 95 % quantiles
@pytest.mark.parametrize(
    ("confidence", "freedom", "value"),
    [(0.95, 1, 12.7062), (0.95, 2, 4.30265), (0.95, 4, 2.77645), (0.95, 30, 2.04227), (0.9, 9, 1.83311)],
)
def test_students_quantile(confidence: float, freedom: int, value: float) -> None:
    # the table has six digits
    assert stats.student_quantile(confidence, freedom) == pytest.approx(value, rel=5e-6)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    found = [stats.mean_interval(generator.normal(size=4)) for _ in range(500)]
    share = np.mean([each.low <= 0 <= each.high for each in found])
    assert abs(share - 0.95) < 0.03  # three standard errors of 500 trials


def test_folds_widen_the_interval() -> None:
    values = [0.9, 0.92, 0.94, 0.91, 0.93]
    plain, folded = stats.mean_interval(values), stats.mean_interval(values, folds=5)
    assert (folded.mean, folded.n) == (plain.mean, 5)
    # sqrt((1/5 + 1/4) / (1/5))
    assert (folded.high - folded.mean) / (plain.high - plain.mean) == pytest.approx(1.5)


def test_the_best_setting_has_the_highest_mean(tmp_path: Path) -> None:
    sweep = grid(tmp_path / "sweep", {0.1: (0.80, 0.82, 0.81), 0.2: (0.90, 0.92, 0.91), 0.3: (0.5, 0.5, 0.5)})
    (best,) = sweep.best
    assert (str(best), sweep.split, sweep.replicates) == ("optimizer.lr=0.2", "test", ("seed",))
    assert best.interval is not None
    assert best.interval.mean == pytest.approx(0.91)
    assert best.interval.high - 0.91 == pytest.approx(4.30265 * 0.01 / math.sqrt(3), rel=1e-5)
    assert sweep.close == ()
    assert [line.replace("\u00a0", " ") for line in sweep.lines()] == [
        "sweep sweep: 3 settings, final test accuracy over seed",
        "best: optimizer.lr=0.2: 91.00 % [88.52 %, 93.48 %], 95% interval of the mean of 3 runs",
    ]


def test_an_interval_of_accuracies_stays_between_0_and_1(tmp_path: Path) -> None:
    (best,) = grid(tmp_path / "sweep", {0.1: (0.2, 0.9)}).best
    assert best.interval is not None
    assert (best.interval.low, best.interval.high) == (0.0, 1.0)


def test_a_setting_inside_the_interval_cannot_be_told_apart(tmp_path: Path) -> None:
    sweep = grid(tmp_path / "sweep", {0.1: (0.90, 0.91), 0.2: (0.89, 0.93), 0.3: (0.7, 0.7), 0.4: (0.1, 0.1)})
    assert [str(each) for each in sweep.best] == ["optimizer.lr=0.2"]
    assert [str(each) for each in sweep.close] == ["optimizer.lr=0.1", "optimizer.lr=0.3"]
    assert "cannot tell it from: optimizer.lr=0.1 (90.50\u00a0%); " in sweep.lines()[2]


def test_equal_settings_are_all_best(tmp_path: Path) -> None:
    sweep = grid(tmp_path / "sweep", {0.1: (0.9, 0.8), 0.2: (0.8, 0.9), 0.3: (0.1, 0.2)})
    assert [str(each) for each in sweep.best] == ["optimizer.lr=0.1", "optimizer.lr=0.2"]
    assert sweep.lines()[1].startswith("best, 2 equal: optimizer.lr=0.1: 85.00")


def test_without_replicates_there_is_no_interval(tmp_path: Path) -> None:
    for lr, accuracy in ((0.1, 0.9), (0.2, 0.8)):
        add_cell(tmp_path / "sweep", {"optimizer.lr": lr}, accuracy)
    sweep = only(tmp_path / "sweep")
    assert [str(each) for each in sweep.close] == ["optimizer.lr=0.2"]
    assert sweep.lines()[1] == "best: optimizer.lr=0.1: 90.00\u00a0%, one run: no interval"
    assert sweep.to_json()["settings"][0]["low"] is None


def test_a_setting_with_a_failed_run_is_not_ranked(tmp_path: Path) -> None:
    sweep = grid(tmp_path / "sweep", {0.1: (0.8, 0.82), 0.2: (0.95, None)})
    assert [str(each) for each in sweep.best] == ["optimizer.lr=0.1"]
    assert sweep.close == ()
    assert sweep.lines()[2] == (
        "incomplete, not ranked: optimizer.lr=0.2 (1 failed): 95.00\u00a0%, one run: no interval; "
        "its mean so far is higher"
    )


def test_with_every_setting_incomplete_none_is_best(tmp_path: Path) -> None:
    sweep = grid(tmp_path / "sweep", {0.1: (0.8, None), 0.2: (None, None)})
    assert sweep.best == sweep.close == ()
    assert sweep.lines()[1] == "best: cannot tell, because no setting is complete"
    assert sweep.lines()[3] == "incomplete, not ranked: optimizer.lr=0.2 (2 failed): no result"


def test_runs_that_go_on_are_absent_or_have_no_number_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    grid(folder, {0.1: (0.8, 0.81, 0.82)})
    add_cell(folder, {"optimizer.lr": 0.2, "seed": 0}, 0.99, status=None)
    add_cell(folder, {"optimizer.lr": 0.2, "seed": 1}, math.nan)
    (setting,) = only(folder).incomplete
    assert setting.missing == {"no status yet": 1, "without an accuracy": 1, "not there": 1}
    assert setting.interval is None


def test_folds_are_replicates_measured_on_held_out_data(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    for lr, base in ((0.1, 0.8), (0.2, 0.9)):
        for index in range(5):
            cell = {"experiment.optimizer.lr": lr, "data.folds.index": index}
            add_cell(folder, cell, base + index / 100, folds=5)
    sweep = only(folder)
    (best,) = sweep.best
    assert (sweep.split, sweep.replicates, str(best)) == (
        "validation",
        ("data.folds.index",),
        "optimizer.lr=0.2",
    )
    wanted = stats.mean_interval([0.9, 0.91, 0.92, 0.93, 0.94], folds=5)
    assert best.interval is not None
    assert (best.interval.low, best.interval.high) == pytest.approx((wanted.low, wanted.high))


def test_a_sweep_over_seeds_alone_is_one_setting(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.8, 0.9)):
        add_cell(tmp_path / "sweep", {"seed": seed}, accuracy)
    sweep = only(tmp_path / "sweep")
    assert sweep.lines()[0] == "sweep sweep: 1 setting, final test accuracy over seed"
    assert sweep.lines()[1].startswith("best: the one setting: 85.00")


def test_two_sweeps_and_a_single_run_stay_apart(tmp_path: Path) -> None:
    grid(tmp_path / "a", {0.1: (0.8,)})
    grid(tmp_path / "b", {0.1: (0.9,)})
    make_run(tmp_path / "c", status=DONE)
    found = sweeps(load([tmp_path / name for name in "abc"], ("eval",)))
    assert [(sweep.name, sweep.best[0].mean) for sweep in found] == [("a", 0.8), ("b", 0.9)]


def test_the_report_has_the_ranking(tmp_path: Path) -> None:
    grid(tmp_path / "sweep", {0.1: (0.80, 0.82), 0.2: (0.90, None)})
    page = report.write_report([tmp_path / "sweep"], tmp_path / "report.html").read_text()
    assert "Sweep sweep" in page
    assert "optimizer.lr=0.1: 81.00\u00a0%" in page
    assert "1 failed" in page
    (plain,) = report.to_json([tmp_path / "sweep"])["sweeps"]
    assert [(row["setting"], row["n"]) for row in plain["settings"]] == [
        ("optimizer.lr=0.1", 2),
        ("optimizer.lr=0.2", 1),
    ]
    assert plain["best"] == ["optimizer.lr=0.1"]
