"""What runs reached with equal samples and in equal time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hpcsngd.rundir import Status, write_yaml
from hpcsngd_analysis.budgets import at_budget, compare_at
from hpcsngd_analysis.load import Runs, load
from hpcsngd_analysis.sections.budget import budgets
from hpcsngd_analysis.sections.context import Options, context
from tests.analysis.runs import make_run

#: Method -> samples per step, seconds per step, accuracy after steps 1, 2 and 3, ranks.
METHODS = {
    "sgd": (100, 1.0, (0.5, 0.7, 0.8), 1),
    "lbfgs": (300, 1.5, (0.6, 0.9, 0.95), 1),
    "wide": (100, 0.5, (0.5, 0.7, 0.8), 2),
}


def study(root: Path, cpu: str = "POWER9", state: str = "completed") -> Runs:
    for seed in (1, 2, 3):
        for name, (samples, seconds, reached, ranks) in METHODS.items():
            steps = [
                {"step": step, "samples": samples * step, "train_s": seconds * step, "split": "test"}
                | {"accuracy": accuracy + seed / 1000}
                for step, accuracy in enumerate(reached, 1)
            ]
            evaluated = [{key: cells[key] for key in cells if key != "samples"} for cells in steps]
            trained = [{key: cells[key] for key in cells if key != "split"} for cells in steps]
            settings: dict[str, Any] = {"seed": seed}
            run = make_run(
                root,
                f"{name}-{seed}",
                experiment=name,
                settings=settings,
                status=Status(state if name == "wide" else "completed", "", 1),
                tables={"eval": evaluated, "train": trained},
            )
            hardware = {"cpu": cpu if name == "lbfgs" else "POWER9", "cpus": 4}
            write_yaml(run.attempt(1).attempt_yaml, {"world_size": ranks, "hardware": hardware})
    return load([root])


def names(method: str) -> list[str]:
    return [f"{method}-{seed}" for seed in (1, 2, 3)]


def test_the_budget_is_what_all_have_used_and_accuracy_is_interpolated(tmp_path: Path) -> None:
    runs = study(tmp_path)
    samples, time = at_budget(runs, "samples"), at_budget(runs, "train_s")
    assert (samples.amount, time.amount) == (300, 1.5)
    assert samples.accuracy["sgd-1"] == pytest.approx(0.801)
    assert samples.accuracy["lbfgs-1"] == pytest.approx(0.601)
    assert time.accuracy["sgd-2"] == pytest.approx(0.602)
    assert time.accuracy["lbfgs-2"] == pytest.approx(0.602)


def test_what_was_first_evaluated_later_has_no_accuracy(tmp_path: Path) -> None:
    samples = {"a": (100, 200), "b": (300, 600)}
    for name, (first, last) in samples.items():
        rows = [{"step": 1, "samples": first}, {"step": 2, "samples": last}]
        steps = [{"step": row["step"], "split": "test"} for row in rows]
        status = Status("completed", "", 1)
        make_run(tmp_path, name, status=status, tables={"train": rows, "eval": steps})
    found = at_budget(load([tmp_path]), "samples")
    assert found.amount == 200
    assert math.isnan(found.accuracy["b"])


def test_a_run_that_failed_sets_no_budget(tmp_path: Path) -> None:
    runs = study(tmp_path, state="failed")
    found = at_budget(runs, "train_s")
    assert found.amount == 3.0
    assert set(found.accuracy.index) == {*names("sgd"), *names("lbfgs")}


def test_methods_are_compared_on_equal_seeds(tmp_path: Path) -> None:
    runs = study(tmp_path)
    verdict = compare_at(at_budget(runs, "samples"), runs, names("lbfgs"), names("sgd"))
    assert (verdict.word, verdict.n) == ("not supported", 3)
    assert verdict.estimate == pytest.approx(-0.2)
    verdict = compare_at(at_budget(runs, "train_s"), runs, names("wide"), names("sgd"))
    assert (verdict.word, verdict.estimate) == ("supported", pytest.approx(0.2))


def test_times_of_other_processors_and_repeated_seeds_are_refused(tmp_path: Path) -> None:
    runs = study(tmp_path, cpu="x86")
    by_time, by_samples = at_budget(runs, "train_s"), at_budget(runs, "samples")
    assert compare_at(by_time, runs, names("lbfgs"), names("sgd")).word == "refused"
    assert compare_at(by_samples, runs, names("lbfgs"), names("sgd")).word == "not supported"
    twice = compare_at(by_samples, runs, [*names("lbfgs"), *names("wide")], names("sgd"))
    assert "have the same seed" in twice.reason


def test_the_section_says_who_is_better_at_which_budget(tmp_path: Path) -> None:
    runs = study(tmp_path)
    options = Options(baseline="sgd", group_by=("exp_name",))
    section = budgets(context(runs, options))
    assert section is not None
    assert [grid.title for grid in section.grids] == ["At 300 samples", "At 1.5 s of training"]
    rows = {row["group"]: row for row in section.grids[0].rows}
    assert rows["lbfgs"]["verdict"] == "not supported"
    assert rows["lbfgs"]["mean"] == pytest.approx(0.602)
    assert (rows["sgd"]["verdict"], rows["sgd"]["difference"]) == ("baseline", None)
    assert any(
        word.startswith("Not supported: lbfgs is better than sgd at 300 samples") for word in section.words
    )
    assert [panel.id for panel in section.panels] == ["budget-samples", "budget-train_s"]


def test_a_single_setting_has_no_such_section(tmp_path: Path) -> None:
    make_run(tmp_path, status=Status("completed", "", 1), tables={"eval": [{"split": "test"}]})
    assert budgets(context(load([tmp_path]))) is None
