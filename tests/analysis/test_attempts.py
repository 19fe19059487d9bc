"""Attempts: where the time of each went, on runs whose clocks were written by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hpcsngd.errors import RunDirError
from hpcsngd.rundir import Status, write_yaml
from hpcsngd_analysis.load import load
from tests.analysis.runs import at, clocked, make_run, resumed_run


def test_the_time_of_each_attempt_is_told_apart(tmp_path: Path) -> None:
    resumed_run(tmp_path)
    runs = load([tmp_path])
    first, second = (row for _, row in runs.attempts.iterrows())
    assert (first["job_id"], first["state"], first["nodes"], first["world_size"]) == ("7", "preempted", 3, 12)
    # submitted at 0, begun after 2 min, ended after 5; first row 40 s after the worker began, 30 trained
    expected = {
        "queue_s": 120,
        "charged_s": 180,
        "boot_s": 30,
        "startup_s": 40,
        "trained_s": 90,
        "redone_s": 0,
    }
    assert {name: first[name] for name in expected} == pytest.approx(expected)
    assert first["other_s"] == pytest.approx(180 - 40 - 90 - 5)
    # no new submission: waits from the end of the first; goes on from step 20, at 60 s of training
    expected = {
        "queue_s": 300,
        "charged_s": 240,
        "boot_s": 60,
        "startup_s": 70,
        "trained_s": 60,
        "redone_s": 30,
    }
    assert {name: second[name] for name in expected} == pytest.approx(expected)
    assert second["before_s"] == pytest.approx(180)
    assert runs.records[0].hardware == {"cpu": "POWER9"}


def test_what_no_file_says_is_nan(tmp_path: Path) -> None:
    run = make_run(tmp_path, tables={"train": [clocked(1, 10, 30, 40, 0.0)]})
    run.attempt(1).path.mkdir(parents=True)
    (found,) = (row for _, row in load([tmp_path]).attempts.iterrows())
    assert found["trained_s"] == 30
    assert found["ended_utc"] == at(40 / 60)  # its last row
    assert all(math.isnan(found[name]) for name in ("queue_s", "charged_s", "startup_s", "other_s"))


def test_an_attempt_without_rows_was_all_start(tmp_path: Path) -> None:
    run = make_run(tmp_path, status=Status("failed", "rendezvous", 1, at(3.0)))
    write_yaml(run.attempt(1).attempt_yaml, {"nodes": 1, "world_size": 1, "start": at(1.0)})
    (found,) = (row for _, row in load([tmp_path]).attempts.iterrows())
    assert (found["charged_s"], found["startup_s"], found["trained_s"], found["other_s"]) == (120, 120, 0, 0)


def test_a_time_that_is_none_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_yaml(run.attempt(1).attempt_yaml, {"start": "soon"})
    with pytest.raises(RunDirError, match="start is no ISO 8601 time: 'soon'"):
        load([tmp_path])
