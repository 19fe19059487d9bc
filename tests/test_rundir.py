"""The run directory: what is written is what is read, damage is named, nothing is silently repaired."""

from __future__ import annotations

import math
import os
import stat
from contextlib import closing
from pathlib import Path

import pytest

from hpcsngd import rundir
from hpcsngd.errors import PreflightError, RunDirError
from hpcsngd.rundir import CsvWriter, Fault, Status
from hpcsngd.tables import TABLES, Column, Table

TABLE = Table(
    "demo",
    ("step",),
    (Column("step", "int", "", ""), Column("loss", "float", "", ""), Column("name", "str", "", "")),
)


def test_rows_read_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "m" / "demo.csv"
    writer = CsvWriter(path, TABLE)
    rows = [
        {"step": 1, "loss": 0.1 + 0.2, "name": 'a,"b"'},
        {"step": 2, "loss": float("inf"), "name": ""},
        {"step": 3, "loss": 1e-300, "name": "layer.0"},
    ]
    for row in rows:
        writer.write(**row)
    assert list(rundir.read_rows(path, TABLE)) == rows  # flushed: readable while the writer is open
    writer.close()
    assert rundir.last_row(path, TABLE) == rows[-1]


def test_nan_is_written_as_nan(tmp_path: Path) -> None:
    with closing(CsvWriter(tmp_path / "demo.csv", TABLE)) as writer:
        writer.write(step=1, loss=-float("nan"), name="x")
    assert (tmp_path / "demo.csv").read_text() == "step,loss,name\n1,nan,x\n"
    assert math.isnan(next(rundir.read_rows(tmp_path / "demo.csv", TABLE))["loss"])


def test_wrong_columns_are_refused(tmp_path: Path) -> None:
    with (
        closing(CsvWriter(tmp_path / "demo.csv", TABLE)) as writer,
        pytest.raises(TypeError, match=r"\['lr', 'name'\]"),
    ):
        writer.write(step=1, loss=0.0, lr=0.1)


def test_append_after_a_kill_removes_the_unfinished_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "demo.csv"
    path.write_text("step,loss,name\n1,0.5,x\n2,0.2")
    assert [row["step"] for row in rundir.read_rows(path, TABLE)] == [1]
    assert rundir.last_row(path, TABLE) == {"step": 1, "loss": 0.5, "name": "x"}
    with closing(CsvWriter(path, TABLE)) as writer:
        writer.write(step=2, loss=0.25, name="y")
    assert path.read_text() == "step,loss,name\n1,0.5,x\n2,0.25,y\n"
    assert "removed an unfinished last line of 5 bytes" in caplog.text


def test_another_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "demo.csv"
    path.write_text("step,accuracy\n1,0.5\n")
    with pytest.raises(
        RunDirError, match=r"demo.csv:1: columns are step,accuracy; schema 1 has step,loss,name"
    ):
        CsvWriter(path, TABLE)


@pytest.mark.parametrize("bad", ["1,0.5", "one,0.5,x", "1,0.5,x,y", "1,,x"])
def test_a_damaged_row_is_named_by_file_and_line(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "demo.csv"
    path.write_text(f"step,loss,name\n0,0.1,a\n{bad}\n2,0.1,b\n")
    with pytest.raises(RunDirError, match=r"demo.csv:3: "):
        list(rundir.read_rows(path, TABLE))


def test_last_row_of_nothing(tmp_path: Path) -> None:
    assert rundir.last_row(tmp_path / "none.csv", TABLE) is None
    (tmp_path / "demo.csv").write_text("step,loss,name\n")
    assert rundir.last_row(tmp_path / "demo.csv", TABLE) is None


def test_create_and_open(tmp_path: Path) -> None:
    run = rundir.create(tmp_path / "deep" / "runs", "digits", {"config": {"a": 1, "walltime": "12:00:00"}})
    assert rundir.open_run(run.path).record() == {"schema": 1, "config": {"a": 1, "walltime": "12:00:00"}}
    assert run.status() is None
    assert run.attempts() == []
    assert run.name.startswith("digits-")


def test_two_runs_of_the_same_second_differ(tmp_path: Path) -> None:
    names = {rundir.create(tmp_path, "x", {}).name for _ in range(8)}
    assert len(names) == 8


@pytest.mark.parametrize(
    ("schema", "advice"),
    [("7", "upgrade hpcsngd"), ("0", "not written by any known"), ("x", "not written by any")],
)
def test_unknown_schema_says_what_to_do(tmp_path: Path, schema: str, advice: str) -> None:
    (tmp_path / "run.yaml").write_text(f"schema: {schema}\n")
    with pytest.raises(RunDirError, match=advice):
        rundir.open_run(tmp_path)


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="it is not a run directory"):
        rundir.open_run(tmp_path)
    with pytest.raises(RunDirError, match="does not exist"):
        rundir.open_run(tmp_path / "nothing")
    (tmp_path / "run.yaml").write_text("- a list\n")
    with pytest.raises(RunDirError, match="damaged: expected a mapping"):
        rundir.open_run(tmp_path)


def test_a_damaged_status_and_a_file_are_named(tmp_path: Path) -> None:
    run = rundir.create(tmp_path, "x", {})
    rundir.write_yaml(run.status_yaml, {"foo": 1})
    with pytest.raises(RunDirError, match=r"status\.yaml is damaged: .*foo"):
        run.status()
    with pytest.raises(RunDirError, match=r"run\.yaml is not a directory"):
        rundir.open_run(run.run_yaml)


def test_unwritable_run_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match=r"cannot write the run root .*--run-root"):
        rundir.create(tmp_path / "file" / "runs", "x", {})
    if os.geteuid() != 0:
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(PreflightError, match="cannot write"):
            rundir.create(tmp_path, "x", {})


def test_status_reads_back_and_knows_its_states(tmp_path: Path) -> None:
    run = rundir.create(tmp_path, "x", {})
    run.write_status(Status("failed", "nan: loss (rank 0)", 1))
    found = run.status()
    assert found is not None
    assert (found.state, found.reason, found.attempt) == ("failed", "nan: loss (rank 0)", 1)
    with pytest.raises(ValueError, match="unknown state 'fine'"):
        run.write_status(Status("fine", "", 1))


def test_the_first_cause_comes_first(tmp_path: Path) -> None:
    attempt = rundir.RunDir(tmp_path).attempt(1)
    attempt.write_fault(Fault("unknown", "exit code 1", "n2", utc="2026-01-01T00:00:01", node=1))
    attempt.write_fault(Fault("rendezvous", "lost rank 3", "n1", utc="2026-01-01T00:00:00", rank=0))
    attempt.write_fault(Fault("out_of_memory", "CUDA", "n2", utc="2026-01-01T00:00:02", rank=3))
    attempt.write_fault(Fault("unknown", "KeyError", "n1", utc="2026-01-01T00:00:00", rank=1))
    assert [fault.rank for fault in attempt.faults()] == [0, 3, 1, None]
    assert attempt.faults()[1].line() == "out of memory: CUDA (rank 3 on n2, 2026-01-01T00:00:02)"
    with pytest.raises(ValueError, match="unknown fault kind 'bad'"):
        attempt.write_fault(Fault("bad", "", "h"))


def test_attempts_are_in_numeric_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / "attempts" / str(number)).mkdir(parents=True)
    assert [attempt.number for attempt in rundir.RunDir(tmp_path).attempts()] == [1, 2, 10]


def test_write_yaml_leaves_no_temporary_file(tmp_path: Path) -> None:
    rundir.write_yaml(tmp_path / "a.yaml", {"text": "1e-3", "list": [1, 2]})
    assert [file.name for file in tmp_path.iterdir()] == ["a.yaml"]
    assert rundir.read_yaml(tmp_path / "a.yaml") == {"text": "1e-3", "list": [1, 2]}


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_declared_tables_are_sound(table: Table) -> None:
    assert set(table.key) <= set(table.header)
    assert len(set(table.header)) == len(table.header)
    belongs_to_the_run = table.name in ("layers", "landscape", "landscape_path")
    assert (table.header[0] == "attempt") is not belongs_to_the_run
    assert table.doc
    assert all(column.doc for column in table.columns)
