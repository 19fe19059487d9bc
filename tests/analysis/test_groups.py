"""Which runs belong together, and what a group is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcsngd.errors import HpcsngdError
from hpcsngd.rundir import write_yaml
from hpcsngd_analysis.groups import GROUPS, groups, named
from hpcsngd_analysis.load import Runs, load
from tests.analysis.runs import make_run


def runs_of(root: Path, settings: dict[str, dict[str, object]], ranks: dict[str, int] | None = None) -> Runs:
    for name, each in settings.items():
        run = make_run(root, name, settings=each)
        if ranks and name in ranks:
            write_yaml(run.attempt(1).attempt_yaml, {"world_size": ranks[name]})
    return load([root])


def shape(found: object) -> dict[str, tuple[str, ...]]:
    return {group.name: group.runs for group in found}  # type: ignore[attr-defined]


def test_seeds_and_words_do_not_part_runs(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"a": {"seed": 1, "description": "x"}, "b": {"seed": 2, "description": "y"}})
    assert shape(groups(runs)) == {"digits-sgd": ("a", "b")}


def test_a_group_is_named_by_few_settings_that_tell_it_apart(tmp_path: Path) -> None:
    def lr(value: float, momentum: float) -> dict[str, object]:
        return {"optimizer": {"lr": value, "momentum": momentum}}

    runs = runs_of(tmp_path, {"a": lr(0.1, 0.9), "b": lr(0.2, 0.8), "c": {**lr(0.2, 0.8), "seed": 2}})
    assert shape(groups(runs)) == {"digits-sgd, lr 0.1": ("a",), "digits-sgd, lr 0.2": ("b", "c")}


def test_ranks_part_runs_and_one_that_never_started_joins_those_like_it(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"a": {}, "b": {"seed": 2}, "c": {"seed": 3}}, ranks={"a": 2, "b": 2})
    assert shape(groups(runs)) == {"digits-sgd": ("a", "b", "c")}
    make_run(tmp_path, "d", settings={"seed": 4})
    write_yaml(tmp_path / "d" / "attempts" / "1" / "attempt.yaml", {"world_size": 4})
    found = groups(load([tmp_path]))
    assert shape(found) == {
        "digits-sgd, ranks 2": ("a", "b"),
        "digits-sgd, ranks none": ("c",),
        "digits-sgd, ranks 4": ("d",),
    }
    assert shape(groups(load([tmp_path]), without=("ranks",))) == {"digits-sgd": ("a", "b", "c", "d")}


def test_a_reader_may_say_what_groups(tmp_path: Path) -> None:
    runs = runs_of(
        tmp_path, {"a": {"batch_size": 8}, "b": {"batch_size": 16}, "c": {"batch_size": 8, "lr": 1}}
    )
    assert shape(groups(runs, ["experiment.batch_size"])) == {
        "batch_size 8": ("a", "c"),
        "batch_size 16": ("b",),
    }
    assert shape(groups(runs, ["exp_name"])) == {"digits-sgd": ("a", "b", "c")}


def test_too_many_groups_fall_back_to_experiments(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {f"run{number:02}": {"lr": number} for number in range(GROUPS + 1)})
    assert [len(group.runs) for group in groups(runs)] == [GROUPS + 1]


def test_a_baseline_is_found_by_group_or_experiment(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"a": {"lr": 1}, "b": {"lr": 2}})
    make_run(tmp_path, "c", experiment="other")
    runs = load([tmp_path])
    found = groups(runs)
    assert named(found, runs, "digits-sgd, lr 2").runs == ("b",)
    assert named(found, runs, "other").runs == ("c",)
    with pytest.raises(
        HpcsngdError, match="baseline 'digits-sgd': there are 2 groups of it; give one of: digits"
    ):
        named(found, runs, "digits-sgd")
    with pytest.raises(HpcsngdError, match="baseline 'none': no run is of it"):
        named(found, runs, "none")
