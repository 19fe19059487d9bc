"""Files of the original HyLo scripts, written here as those scripts write them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hpcsngd.errors import RunDirError
from hpcsngd_analysis.load import NOT_RECORDED, Runs, load
from hpcsngd_analysis.report import to_json

ACCURACY = "resnet32-cifar10-lr1.8-d1.5-td0.1-wd0.00045-f13.csv"
TIMING = (
    "allgather_factors,compute_factors,compute_kernel,update_inv,broadcast_inv,precondition,memory_usage,"
    "compute_projection,id_time,\n"
)


def rows(runs: Runs, table: str, *columns: str) -> list[list[object]]:
    found: list[list[object]] = runs.tables[table][list(columns)].to_numpy().tolist()
    return found


def test_accuracy_and_time_become_evaluations_of_one_run(tmp_path: Path) -> None:
    text = "acc, time(ms), total_time(ms)\n0.5, 1500.0, 1500.0\n0.75, 500.0, 2000.0\n"
    (tmp_path / ACCURACY).write_text(text)
    runs = load([tmp_path / ACCURACY])
    assert rows(runs, "eval", "epoch", "step", "split", "accuracy", "train_s") == [
        [1.0, 1, "test", 0.5, 1.5],
        [2.0, 2, "test", 0.75, 2.0],
    ]
    assert math.isnan(runs.tables["eval"]["loss"][0])
    (run,) = runs.records
    assert (run.name, run.origin, run.state) == (ACCURACY.removesuffix(".csv"), "hylo", NOT_RECORDED)
    assert run.config["experiment"] == {
        "model": {"name": "resnet32"},
        "data": {"name": "cifar10"},
        "optimizer": {"lr": 1.8, "weight_decay": 0.00045},
        "preconditioner": {"name": "hylo", "damping": 1.5, "target_damping": 0.1, "refresh_every": 13},
    }
    assert "eval: step counts epochs" in run.notes


def test_a_data_set_with_a_dash_in_its_name(tmp_path: Path) -> None:
    name = "3c1f-fashion-mnist-lr0.1-d1e-3-td1e-3-wd0.0-f10.csv"
    (tmp_path / name).write_text("acc, time(ms), total_time(ms)\n")
    experiment = load([tmp_path]).records[0].config["experiment"]
    assert (experiment["model"]["name"], experiment["data"]["name"]) == ("3c1f", "fashion-mnist")
    assert experiment["preconditioner"]["damping"] == 1e-3


def test_a_header_that_says_seconds_is_read_as_milliseconds_and_said(tmp_path: Path) -> None:
    name = "unet-brain-lr0.1-d0.1-td0.1-wd0-f5.csv"
    (tmp_path / name).write_text("acc, time(s), total_time(s)\n0.9, 4000.0, 4000.0\n")
    runs = load([tmp_path])
    assert rows(runs, "eval", "train_s") == [[4.0]]
    assert any("the header says seconds" in note for note in runs.records[0].notes)


def test_timing_of_all_ranks_is_one_run_in_seconds(tmp_path: Path) -> None:
    cells = "1000,2000,3000,4000,5000,0,64,6000,7000,600,400\n"
    for rank in (0, 1):
        (tmp_path / f"kid-timing-r{rank}-n2.csv").write_text(TIMING + cells * (rank + 1))
    runs = load([tmp_path])
    (run,) = runs.records
    assert (run.name, run.world_size) == ("kid-timing-n2", 2)
    table = runs.tables["profiling"]
    first = table[(table["rank"] == 0)].set_index("phase")["seconds"]
    assert first.to_dict() == {
        "gather": 1.0,
        "factorise": 2.0,
        "kernel": 3.0,
        "invert": 4.0,
        "broadcast": 5.0,
        "precondition": 0.0,
        "project": 6.0,
    }
    assert any(
        "id_time and the columns without a name count time twice: left out" in note for note in run.notes
    )
    assert sorted(set(table[table["rank"] == 1]["step"])) == [1, 2]
    assert rows(runs, "memory", "step", "kind", "size_bytes") == [[1, "cached", 64]]


def test_a_single_rank_has_no_columns_without_a_name(tmp_path: Path) -> None:
    (tmp_path / "sngd-timing-r0-n1.csv").write_text(TIMING + "0,1,1,1,0,0,8,0,0\n")
    assert rows(load([tmp_path]), "memory", "size_bytes") == [[8]]


def test_ranks_that_are_repeated_by_every_line_count_once(tmp_path: Path) -> None:
    (tmp_path / "cifar10-128-rank-0.csv").write_text("rank\n7,5,\n7,5,\n7,5,6,4,\n")
    (tmp_path / "cifar10-128-rank-1.csv").write_text("rank\n")
    runs = load([tmp_path])
    assert rows(runs, "rank_analysis", "step", "layer", "share", "low_rank") == [
        [1, "layer 0", 0.9, 7],
        [1, "layer 1", 0.9, 5],
        [3, "layer 0", 0.9, 6],
        [3, "layer 1", 0.9, 4],
    ]
    (run,) = runs.records
    assert run.dropped_rows == {"rank_analysis": 4}
    assert any("4 repeated ones were left out" in note for note in run.notes)
    assert run.config["experiment"] == {"batch_size": 128, "data": {"name": "cifar10"}}


def test_gradient_norms_with_their_empty_header(tmp_path: Path) -> None:
    (tmp_path / "grad-norm.csv").write_text("\n0.5, 0.25,\n0.4, 0.2,\n")
    assert rows(load([tmp_path]), "grad_norm", "step", "layer", "norm") == [
        [1, "layer 0", 0.5],
        [1, "layer 1", 0.25],
        [2, "layer 0", 0.4],
        [2, "layer 1", 0.2],
    ]


def test_gradient_errors_of_both_methods_are_one_run(tmp_path: Path) -> None:
    (tmp_path / "grad-error-resnet32-cifar10-kid.txt").write_text("0.1\n0.2\n")
    (tmp_path / "grad-error-resnet32-cifar10-kis.txt").write_text("0.4\nnan\n")
    runs = load([tmp_path])
    assert [run.name for run in runs.records] == ["grad-error-resnet32-cifar10"]
    table = runs.tables["grad_error"]
    assert table[table["method"] == "kid"]["relative_error"].tolist() == [0.1, 0.2]
    assert table[["step", "method"]].iloc[-1].tolist() == [2, "kis"]
    assert math.isnan(table["relative_error"].iloc[-1])


def test_the_last_line_without_its_end_is_no_row_and_is_said(tmp_path: Path) -> None:
    (tmp_path / "grad-error-resnet32-cifar10-kis.txt").write_text("0.4\n0.3")
    runs = load([tmp_path])
    assert rows(runs, "grad_error", "relative_error") == [[0.4]]
    assert runs.records[0].unfinished_files == ("grad-error-resnet32-cifar10-kis.txt",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (ACCURACY, "accuracy,time\n", r"f13.csv:1: the line is 'accuracy,time'"),
        (ACCURACY, "acc, time(ms), total_time(ms)\n0.5, 1.0\n", r"f13.csv:2: 2 cells, expected 3"),
        (ACCURACY, "acc, time(ms), total_time(ms)\n0.5, 1.0, x\n", r"f13.csv:2: could not convert"),
        (
            ACCURACY,
            "acc, time(ms), total_time(ms)\n0.5, 9, 9\n0.5, 3, 3\n",
            r"f13.csv:3: total_time falls from 9 to 3 ms",
        ),
        ("kis-timing-r0-n4.csv", TIMING + "1,2,3\n", r"n4.csv:2: 3 cells, expected 9 or 11"),
        ("kis-timing-r0-n4.csv", TIMING + "1,2,3,4,5,6,0.5,8,9\n", r"n4.csv:2: 0.5 should be a whole number"),
        ("rank-0.csv", "rank\n5,\n6,7,\n", r"rank-0.csv:3: does not begin with the values"),
        ("grad-norm.csv", "\n1, 2,\n1,\n", r"grad-norm.csv:3: 1 cells, expected 2"),
        ("grad-error-resnet32-cifar10-kid.txt", "0.1\n\n", r"kid.txt:2: 0 cells, expected 1"),
    ],
)
def test_damage_is_named_with_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RunDirError, match=message):
        load([tmp_path])


def test_what_has_no_epoch_is_drawn_against_steps(tmp_path: Path) -> None:
    (tmp_path / "grad-error-resnet32-cifar10-kid.txt").write_text("0.1\n0.2\n")
    (tmp_path / "grad-norm.csv").write_text("\n3, 4,\n0, 2,\n")
    sections = {section["id"]: section for section in to_json([tmp_path])["sections"]}
    (error,) = sections["gradient-error"]["figures"]  # no file has the cosine, so there is no figure of it
    assert (error["x"], error["series"][0]["x"], error["series"][0]["y"]) == ("step", [1, 2], [0.1, 0.2])
    norm = sections["gradient-norm"]["figures"][0]
    assert (norm["x"], norm["series"][0]["x"], norm["series"][0]["y"]) == ("step", [1, 2], [5, 2])
