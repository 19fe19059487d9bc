"""`load`: which runs are found, which rows count, and what is refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from hpcsngd.errors import RunDirError
from hpcsngd.rundir import RunDir, Status
from hpcsngd.tables import TABLES
from hpcsngd_analysis.load import NO_STATUS, Run, Runs, load
from tests.analysis.runs import EXAMPLES, copy_of, make_run


@pytest.fixture(scope="module")
def examples() -> Runs:
    return load([EXAMPLES])


def record(runs: Runs, name: str) -> Run:
    (found,) = [run for run in runs.records if run.name == name]
    return found


def of(runs: Runs, table: str, run: str) -> pd.DataFrame:
    frame = runs.tables[table]
    return frame[frame["run"] == run]


def test_a_folder_gives_its_runs_by_name_and_leaves_out_other_folders(examples: Runs) -> None:
    # `damaged` holds a run directory of an unknown schema, but is none and is one level too deep.
    assert [run.name for run in examples.records] == ["complete", "failed", "resumed", "running"]
    assert examples.runs["run"].tolist() == ["complete", "failed", "resumed", "running"]


def test_every_table_is_there_with_the_declared_columns_and_types(examples: Runs) -> None:
    kinds = {"int": "i", "float": "f"}
    assert set(examples.tables) == set(TABLES)
    for name, frame in examples.tables.items():
        assert frame.columns.tolist() == ["run", *TABLES[name].header]
        for column in TABLES[name].columns:
            assert column.dtype == "str" or frame[column.name].dtype.kind == kinds[column.dtype], column
    assert len(examples.tables["grad_norm"]) == 0


def test_rows_of_a_complete_run_are_its_file(examples: Runs) -> None:
    train = of(examples, "train", "complete")
    assert train["step"].tolist() == [2, 4, 6, 8, 10, 12]
    assert train["loss"].tolist() == [2.1, 1.5, 1.0, 0.8, 0.5, 0.4]
    assert train["utc"].iloc[0] == "2026-01-05T10:00:02.500+00:00"


def test_files_of_all_ranks_are_one_table(examples: Runs) -> None:
    profiling = examples.tables["profiling"]
    assert profiling[["rank", "phase", "seconds"]].to_numpy().tolist() == [
        [0, "forward", 0.01],
        [0, "backward", 0.02],
        [1, "forward", 0.03],
        [1, "backward", 0.04],
    ]


def test_after_a_resume_the_last_attempt_counts_and_dropped_rows_are_counted(examples: Runs) -> None:
    train, evaluation = of(examples, "train", "resumed"), of(examples, "eval", "resumed")
    assert train["step"].tolist() == [2, 4, 6, 8, 10, 12]
    assert train["attempt"].tolist() == [1, 1, 2, 2, 2, 2]
    assert train["loss"].tolist() == [1.9, 0.9, 0.6, 0.4, 0.3, 0.2]
    assert evaluation["accuracy"].tolist() == [0.8, 0.925, 0.975]
    run = record(examples, "resumed")
    assert {name: count for name, count in run.dropped_rows.items() if count} == {"train": 2, "eval": 1}


def test_rows_that_only_the_earlier_attempt_wrote_stay_in_step_order(tmp_path: Path) -> None:
    steps = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (2, 3)]  # the second attempt was lost before step 4
    make_run(tmp_path, tables={"train": [{"attempt": a, "step": s, "loss": 10 * a + s} for a, s in steps]})
    train = load([tmp_path]).tables["train"]
    assert train["loss"].tolist() == [11, 22, 23, 14]


def test_the_same_step_on_two_ranks_is_two_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path, tables={"profiling": [{"attempt": 1, "rank": 0, "phase": "data"}]})
    text = run.metrics("profiling", 0).read_text()
    run.metrics("profiling", 11).write_text(text.replace("1,1,0,", "1,1,11,"))
    loaded = load([tmp_path])
    assert loaded.tables["profiling"]["rank"].tolist() == [0, 11]
    assert loaded.records[0].dropped_rows["profiling"] == 0


def test_facts_of_each_run(examples: Runs) -> None:
    facts = examples.runs.set_index("run")
    assert facts["state"].to_dict() == {
        "complete": "completed",
        "failed": "failed",
        "resumed": "completed",
        "running": NO_STATUS,
    }
    assert facts["site"].tolist() == ["local", "local", "slurm", "local"]
    assert facts["seed"].tolist() == [1, 1, 2, 3]
    assert facts.loc["failed", "reason"].startswith("nan: loss is nan at step 4")
    assert facts["attempts"].tolist() == [1, 1, 2, 1]
    assert facts["dropped_rows"].tolist() == [0, 0, 3, 0]
    # Of the last attempt that started; `running` was submitted only.
    assert facts["world_size"].tolist()[:3] == [2, 1, 2]
    assert pd.isna(facts.loc["running", "world_size"])


def test_wall_time_counts_work_that_a_later_attempt_did_again(examples: Runs) -> None:
    # complete: last row 7.75 s. resumed: 6.25 s of the first attempt, ending in a dropped row, and 6.75 s.
    wall = examples.runs.set_index("run")["wall_s"]
    assert wall["complete"] == 7.75
    assert wall["resumed"] == 6.25 + 6.75


def test_provenance_is_optional(examples: Runs) -> None:
    assert record(examples, "running").provenance == {}
    assert record(examples, "running").revision is None
    assert record(examples, "resumed").revision == "1f0e3dad99908345f7439f8ffabdffc4f8a1b2c3"
    assert [run.has_local_changes for run in examples.records] == [False, False, True, False]


def test_provenance_outside_a_repository(tmp_path: Path) -> None:
    make_run(tmp_path, provenance={"git": None})
    (run,) = load([tmp_path]).records
    assert run.revision is None


def test_nan_stays_nan(examples: Runs) -> None:
    loss = of(examples, "train", "failed")["loss"].tolist()
    assert loss[0] == 300.0
    assert loss[1] != loss[1]


def test_a_last_line_without_newline_is_not_a_row_and_is_reported(examples: Runs) -> None:
    assert of(examples, "train", "running")["step"].tolist() == [2]
    assert record(examples, "running").unfinished_files == ("train.csv",)
    assert record(examples, "complete").unfinished_files == ()


def test_a_row_that_lacks_only_its_newline_is_not_a_row_yet(tmp_path: Path) -> None:
    path = copy_of("complete", tmp_path)
    file = RunDir(path).metrics("train")
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    loaded = load([path])
    assert loaded.tables["train"]["step"].tolist() == [2, 4, 6, 8, 10]
    assert loaded.records[0].unfinished_files == ("train.csv",)


def test_a_run_without_metrics_is_loaded(tmp_path: Path) -> None:
    make_run(tmp_path, status=Status("cancelled", "by the user", 1))
    loaded = load([tmp_path])
    (run,) = loaded.records
    assert (run.state, run.reason, run.attempts, run.wall_s, run.last_utc) == (
        "cancelled",
        "by the user",
        0,
        None,
        None,
    )
    assert all(len(frame) == 0 for frame in loaded.tables.values())


def test_only_the_tables_asked_for_are_read(tmp_path: Path) -> None:
    run = make_run(tmp_path, tables={"train": [{"step": 1}]})
    run.metrics("grad_norm").write_text("damaged\n")
    assert set(load([tmp_path], ["train"]).tables) == {"train"}
    with pytest.raises(RunDirError, match="grad_norm"):
        load([tmp_path])
    with pytest.raises(ValueError, match="unknown table 'trian'; did you mean 'train'"):
        load([tmp_path], ["trian"])


def test_a_run_found_twice_is_loaded_once_in_the_order_given(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path, name)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    loaded = load([tmp_path / "b", tmp_path, str(tmp_path / "link")])
    assert [run.name for run in loaded.records] == ["b", "a"]


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        make_run(tmp_path / folder, "same", tables={"train": [{"step": 1}]})
    loaded = load([tmp_path / "one", tmp_path / "two"])
    assert loaded.tables["train"]["run"].tolist() == ["one/same", "two/same"]


def test_nothing_to_load_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no run directory was given"):
        load([])
    with pytest.raises(RunDirError, match="absent does not exist"):
        load([tmp_path / "absent"])
    with pytest.raises(RunDirError, match="is no run directory and holds none"):
        load([tmp_path])
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match="file is no directory and no file of the original HyLo scripts"):
        load([tmp_path / "file"])


def test_an_unknown_schema_names_the_file_and_the_way_out() -> None:
    with pytest.raises(RunDirError, match=r"unknown-schema/run.yaml: schema 2.*upgrade hpcsngd"):
        load([EXAMPLES / "damaged"])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.yaml", "schema: 1\n", r"run.yaml is damaged: config.exp_name is missing"),
        ("run.yaml", "schema: 1\nconfig: [1]\n", r"run.yaml is damaged: config should be a mapping"),
        ("status.yaml", "state: completed\n", r"status.yaml is damaged: .*missing"),
        ("status.yaml", "{state: done, reason: '', attempt: 1}\n", r"status.yaml: unknown state 'done'"),
        (
            "attempts/1/attempt.yaml",
            "world_size: two\n",
            r"attempt.yaml: world_size should be a whole number",
        ),
    ],
)
def test_damaged_yaml_is_refused(tmp_path: Path, file: str, text: str, message: str) -> None:
    path = copy_of("complete", tmp_path)
    (path / file).write_text(text)
    with pytest.raises(RunDirError, match=message):
        load([path])
