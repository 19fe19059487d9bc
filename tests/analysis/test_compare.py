"""Verdicts on hand-computed answers, and the refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hpcsngd.rundir import Status, write_yaml
from hpcsngd_analysis.compare import Arrival, compare_runs, compare_times, compare_values
from hpcsngd_analysis.load import Runs, load
from tests.analysis.runs import make_run

ZEROS = dict.fromkeys(range(1, 10), 0.0)
POWER = {"cpu": "POWER9", "cpus": 128, "gpus": [{"name": "V100"}]}


def seeds(values: Sequence[float]) -> dict[int, float]:
    return dict(enumerate(values, 1))


def arrivals(values: Sequence[float | tuple[float, bool]]) -> dict[int, Arrival]:
    pairs = [value if isinstance(value, tuple) else (value, True) for value in values]
    return {seed: Arrival(*pair) for seed, pair in enumerate(pairs, 1)}


def test_an_interval_around_zero_cannot_tell_and_says_how_many_seeds_would() -> None:
    found = compare_values(seeds([1, 2, 3]), ZEROS)
    # mean 2, deviation 1, t(2) = 4.3027: half-width 4.3027 / sqrt(3) = 2.4841
    assert (found.word, found.n, found.estimate) == ("cannot tell", 3, 2)
    assert (found.low, found.high) == pytest.approx((-0.4841, 4.4841), abs=1e-4)
    # four pairs: t(3) / sqrt(4) = 3.1824 / 2 = 1.59 < 2
    assert found.more_seeds == 1


def test_supported_and_not_supported() -> None:
    values = seeds([2.0, 2.5, 1.5])  # half-width 4.3027 * 0.5 / sqrt(3) = 1.2421
    better = compare_values(values, ZEROS)
    assert (better.word, better.more_seeds) == ("supported", None)
    assert (better.low, better.high) == pytest.approx((0.7579, 3.2421), abs=1e-4)
    assert compare_values(values, ZEROS, is_less_better=True).word == "not supported"
    assert compare_values(ZEROS, values).word == "not supported"
    assert compare_values(ZEROS, values, is_less_better=True).word == "supported"


def test_equal_values_are_not_better() -> None:
    assert compare_values(ZEROS, ZEROS).word == "not supported"


def test_a_mean_of_zero_would_never_decide() -> None:
    found = compare_values(seeds([-1, 0, 1]), ZEROS)
    assert (found.word, found.more_seeds) == ("cannot tell", None)


def test_too_few_pairs_are_refused() -> None:
    found = compare_values({1: 0.9, 2: math.nan, 3: 0.9}, {1: 0.8, 2: 0.8})
    assert (found.word, found.n, found.more_seeds) == ("refused", 1, 2)
    assert "1 pair has a seed in common" in found.reason
    assert math.isnan(found.estimate)


def test_times_are_compared_by_ratio() -> None:
    found = compare_times(arrivals([1, 2, 4]), arrivals([2, 4, 8]))
    assert found.word == "supported"
    assert (found.estimate, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    # logs -1, 0, 1 times log 2: mean 0
    found = compare_times(arrivals([1, 2, 4]), arrivals([2, 2, 2]))
    assert (found.word, found.estimate) == ("cannot tell", pytest.approx(1.0))


def test_runs_that_never_arrive_are_judged_by_who_came_first() -> None:
    never = (math.inf, False)
    three = compare_times(arrivals([5, 5, 5]), arrivals([never, 9, 9]))
    # 3 of 3: p = 2 / 2^3; 6 of 6 is the first with p = 2 / 2^6 below 0.05
    assert (three.word, three.n, three.censored, three.more_seeds) == ("cannot tell", 3, 1, 3)
    six = compare_times(arrivals([5] * 6), arrivals([never] * 6))
    assert six.word == "supported"
    assert compare_times(arrivals([never] * 6), arrivals([5] * 6)).word == "not supported"
    assert math.isnan(six.estimate)


def test_a_run_that_was_not_watched_long_enough_decides_nothing() -> None:
    watched = compare_times(arrivals([100] * 6), arrivals([(120.0, False)] * 6))
    assert watched.word == "supported"
    stopped = compare_times(arrivals([100] * 6), arrivals([(50.0, False)] * 6))
    assert (stopped.word, stopped.more_seeds) == ("cannot tell", None)
    assert "sooner in 0, later in 0 of 6 pairs" in stopped.reason


def study(root: Path, **changes: Any) -> Runs:
    """Four seeds of a method that ends higher and gets to 0.8 in half the time."""
    for seed in (1, 2, 3, 4):
        for name, end, pace in (("hylo", 0.9, 1.0), ("sgd", 0.85, 2.0)):
            rows = [
                {"step": 1, "accuracy": 0.7, "train_s": pace * seed, "split": "test"},
                {"step": 2, "accuracy": end + seed / 1000, "train_s": 3 * pace * seed, "split": "test"},
            ]
            run = make_run(
                root,
                f"{name}-{seed}",
                settings={"seed": changes.get("seed", seed)},
                status=Status("completed", "", 1),
                tables={"eval": rows},
            )
            hardware = changes.get("hardware", {}).get(name, POWER)
            write_yaml(run.attempt(1).attempt_yaml, {"world_size": 2, "hardware": hardware})
    return load([root])


HYLO, SGD = ([f"{name}-{seed}" for seed in (1, 2, 3, 4)] for name in ("hylo", "sgd"))


def test_runs_by_final_accuracy_and_by_time(tmp_path: Path) -> None:
    runs = study(tmp_path)
    final = compare_runs(runs, HYLO, SGD)
    assert (final.word, final.n, final.estimate) == ("supported", 4, pytest.approx(0.05))
    sooner = compare_runs(runs, HYLO, SGD, target=0.8)
    assert (sooner.word, sooner.n) == ("supported", 4)
    assert sooner.estimate < 0.5
    assert compare_runs(runs, SGD, HYLO, target=0.8).word == "not supported"
    # only HyLo gets there; four pairs are too few for signs
    never = compare_runs(runs, HYLO, SGD, target=0.88)
    assert (never.word, never.censored, never.more_seeds) == ("cannot tell", 4, 2)


def test_times_from_different_or_unknown_hardware_are_refused(tmp_path: Path) -> None:
    other = study(tmp_path / "other", hardware={"sgd": {**POWER, "gpus": [{"name": "A100"}]}})
    found = compare_runs(other, HYLO, SGD, target=0.8)
    assert found.word == "refused"
    assert "V100" in found.reason
    assert "A100" in found.reason
    assert compare_runs(other, HYLO, SGD).word == "supported"  # accuracy is the same anywhere
    unknown = study(tmp_path / "unknown", hardware={"sgd": {}})
    assert "is not recorded" in compare_runs(unknown, HYLO, SGD, target=0.8).reason


def test_runs_of_one_seed_cannot_be_paired(tmp_path: Path) -> None:
    found = compare_runs(study(tmp_path, seed=7), HYLO, SGD)
    assert found.word == "refused"
    assert "have the same seed (7)" in found.reason


def test_a_failed_run_never_arrives_and_a_cancelled_one_does_not_count(tmp_path: Path) -> None:
    study(tmp_path)
    for seed, state in ((1, "failed"), (2, "cancelled")):
        run = tmp_path / f"sgd-{seed}"
        (run / "metrics" / "eval.csv").unlink()
        write_yaml(run / "status.yaml", {"state": state, "reason": "", "attempt": 1, "utc": "2026-01-05"})
    found = compare_runs(load([tmp_path]), HYLO, SGD, target=0.8)
    assert (found.word, found.n, found.censored) == ("cannot tell", 3, 1)
    assert "sooner in 3, later in 0" in found.reason
