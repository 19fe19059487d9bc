"""The runs table, the notes and the settings that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hpcsngd.rundir import Status
from hpcsngd_analysis.load import Runs, load
from hpcsngd_analysis.tables import NOT_SET, config_differences, flatten, notes, runs_table
from tests.analysis.runs import EXAMPLES, make_run


@pytest.fixture(scope="module")
def examples() -> Runs:
    return load([EXAMPLES], ["train", "eval"])


def differences(tmp_path: Path, *settings: dict[str, Any]) -> dict[str, list[str]]:
    for number, values in enumerate(settings):
        make_run(tmp_path, f"run{number}", settings=values)
    return config_differences(load([tmp_path], [])).to_dict("list")


def test_every_run_has_a_row_in_the_order_loaded(examples: Runs) -> None:
    table = runs_table(examples)
    assert table["run"].tolist() == ["complete", "failed", "resumed", "running"]
    assert table["experiment"].tolist() == ["digits-sgd", "digits-sgd", "digits-hylo", "digits-sgd"]
    assert table["epochs"].tolist() == [3.0, 1.0, 3.0, 0.5]
    assert table["epochs_planned"].tolist() == [3.0, 3.0, 3.0, 3.0]
    assert table["train_s"].tolist() == [6.0, 2.0, 9.0, 1.0]
    assert table["evaluations"].tolist() == [3, 0, 3, 0]


def test_results_are_there_where_they_were_measured(examples: Runs) -> None:
    table = runs_table(examples).set_index("run")
    assert table.loc["complete", ["final_accuracy", "best_accuracy", "final_loss"]].tolist() == [
        0.825,
        0.85,
        0.6,
    ]
    assert table.loc["resumed", ["final_accuracy", "best_accuracy", "final_loss"]].tolist() == [
        0.975,
        0.975,
        0.3,
    ]
    assert pd.isna(table.loc[["failed", "running"], ["final_accuracy", "best_accuracy", "final_loss"]]).all(
        axis=None
    )


def test_the_table_of_runs_without_any_row(tmp_path: Path) -> None:
    make_run(tmp_path, settings={"seed": None, "epochs": None})
    (cells,) = runs_table(load([tmp_path])).to_dict("records")
    assert cells["evaluations"] == 0
    assert all(pd.isna(cells[name]) for name in ("seed", "epochs_planned", "epochs", "train_s", "wall_s"))


def test_notes_tell_what_a_reader_must_know(examples: Runs) -> None:
    assert notes(examples) == {
        "complete": [],
        "failed": [
            "failed: nan: loss is nan at step 4 (rank 0 on node1, 2026-01-05T12:00:04.000+00:00)",
            "no eval rows: absent from those curves",
            "train: loss is not a finite number in 1 row, first at step 4",
        ],
        "resumed": [
            "ran from a working tree with uncommitted changes",
            "train: 2 rows written again by a later attempt; the last counts",
            "eval: 1 row written again by a later attempt; the last counts",
        ],
        "running": [
            "has not ended, or ended without a word; its last row is of 2026-01-05T13:00:02.500+00:00",
            "train.csv: the last line is unfinished and was left out",
            "no eval rows: absent from those curves",
        ],
    }


def test_notes_of_runs_that_wrote_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, "silent")
    make_run(tmp_path, "wordless", status=Status("timeout", "", 1))
    assert notes(load([tmp_path])) == {
        "silent": [
            "has not ended, or ended without a word; it has written no rows",
            "no train and no eval rows: absent from those curves",
        ],
        "wordless": [
            "timeout: no reason recorded",
            "no train and no eval rows: absent from those curves",
        ],
    }


def test_only_settings_that_differ_are_listed(examples: Runs) -> None:
    table = config_differences(examples)
    assert table.index.tolist() == ["complete", "failed", "resumed", "running"]
    assert table.to_dict("list") == {
        "site.scheduler.kind": ["local", "local", "slurm", "local"],
        "site.launch.args": ["[]", "[]", '["--mpi=none"]', "[]"],
        "experiment.optimizer.lr": ["0.05", "50.0", "0.02", "0.05"],
        "experiment.seed": ["1", "1", "2", "3"],
        "experiment.preconditioner.name": [NOT_SET, NOT_SET, "hylo", NOT_SET],
        "experiment.preconditioner.damping": [NOT_SET, NOT_SET, "0.3", NOT_SET],
    }


def test_a_single_run_differs_from_nothing(tmp_path: Path) -> None:
    assert differences(tmp_path, {"lr": 1}) == {}


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    assert differences(tmp_path, {"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}) == {}


def test_null_and_a_missing_key_and_text_and_numbers_are_told_apart(tmp_path: Path) -> None:
    found = differences(tmp_path, {"a": None, "b": "1"}, {"b": 1})
    assert found == {"experiment.a": ["null", NOT_SET], "experiment.b": ["1", "1"]}


def test_an_empty_section_is_a_value_unless_others_fill_it(tmp_path: Path) -> None:
    found = differences(tmp_path, {"args": {}, "env": {}}, {"args": {"depth": 2}, "env": "none"})
    assert found == {"experiment.args.depth": [NOT_SET, "2"], "experiment.env": ["{}", "none"]}


def test_flatten_joins_keys_and_keeps_lists() -> None:
    assert dict(flatten({"a": {"b": [1, {"c": 2}], "d": {}}, "e": None})) == {
        "a.b": [1, {"c": 2}],
        "a.d": {},
        "e": None,
    }
