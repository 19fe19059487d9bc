"""Clocks of whole runs: the sums over attempts, and the time charged at each row."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hpcsngd_analysis.clocks import charged_time, clocks
from hpcsngd_analysis.load import load
from tests.analysis.runs import EXAMPLES, clocked, make_run, resumed_run


def test_clocks_of_a_resumed_run(tmp_path: Path) -> None:
    resumed_run(tmp_path)
    runs = load([tmp_path])
    found = clocks(runs).loc["run"]
    # 3 nodes; attempts of 180 and 240 s; 90 s trained, 30 of them again, 30 more
    expected = {
        "queue_s": 420,
        "train_s": 120,
        "redone_s": 30,
        "eval_s": 10,
        "charged_s": 420,
        "node_hours": 3 * 420 / 3600,
        "lost_node_hours": 3 * 30 / 3600,
        "goodput": 120 / 420,
        "restarts": 1,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["train_s"] == runs.tables["train"]["train_s"].max()
    parts = found[["startup_s", "train_s", "redone_s", "eval_s", "other_s"]].sum()
    assert parts == pytest.approx(found["charged_s"])


def test_charged_time_at_rows_goes_on_over_attempts(tmp_path: Path) -> None:
    resumed_run(tmp_path)
    runs = load([tmp_path])
    train = runs.tables["train"]
    assert train["step"].tolist() == [10, 20, 30, 40]
    # the workers began 30 s after the first start, and 60 s after the second, which began after 180 charged s
    assert charged_time(runs, train).tolist() == pytest.approx([70, 105, 180 + 60 + 38, 180 + 60 + 70])


def test_what_is_not_known_is_nan_and_not_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, tables={"train": [clocked(1, 10, 30, 40, 0.0)]})
    run.attempt(1).path.mkdir(parents=True)
    runs = load([tmp_path])
    found = clocks(runs).loc["run"]
    assert found["train_s"] == 30
    assert all(math.isnan(found[name]) for name in ("queue_s", "charged_s", "node_hours", "goodput"))
    assert math.isnan(charged_time(runs, runs.tables["train"])[0])


def test_examples_have_clocks() -> None:
    found = clocks(load([EXAMPLES]))
    assert found.index.tolist() == ["complete", "failed", "resumed", "running"]
    assert found["restarts"].tolist() == [0, 0, 1, 0]
    assert found.loc["resumed", "redone_s"] > 0
