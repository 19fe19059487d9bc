"""One metrics file: what is read, what is refused with which line, and that both readers agree."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from hpcsngd.errors import RunDirError
from hpcsngd.rundir import CsvWriter, read_rows
from hpcsngd.tables import TABLES
from hpcsngd_analysis import csv_table
from hpcsngd_analysis.csv_table import read_file
from tests.analysis.runs import row

MEMORY = TABLES["memory"]  # attempt,step,kind,size_bytes
HEADER = b"attempt,step,kind,size_bytes\n"
NORM = TABLES["grad_norm"]  # attempt,epoch,step,layer,norm


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "memory.csv"
    path.write_bytes(data)
    return path


def test_numbers_come_back_as_written(tmp_path: Path) -> None:
    generator = random.Random(0)
    values = [generator.uniform(-1, 1) * 10.0 ** generator.randint(-300, 300) for _ in range(500)]
    values += [math.nan, math.inf, -math.inf, 0.0, 5e-324, 1.7976931348623157e308]
    path = tmp_path / "grad_norm.csv"
    writer = CsvWriter(path, NORM)
    for step, value in enumerate(values):
        writer.write(**row("grad_norm", step=step, norm=value))
    writer.close()
    frame, is_unfinished = read_file(path, NORM)
    assert frame["norm"].tolist() == pytest.approx(values, rel=0, abs=0, nan_ok=True)
    assert frame["step"].tolist() == list(range(len(values)))
    assert not is_unfinished


@pytest.mark.parametrize("name", ["NA", "null", "None", "", "nan", "a,b", 'say "x"', "层"])
def test_text_is_never_taken_for_a_missing_value(tmp_path: Path, name: str) -> None:
    path = tmp_path / "grad_norm.csv"
    writer = CsvWriter(path, NORM)
    writer.write(**row("grad_norm", layer=name, norm=2.5))
    writer.close()
    frame, _ = read_file(path, NORM)
    assert frame[["layer", "norm"]].to_numpy().tolist() == [[name, 2.5]]


@pytest.mark.parametrize("data", [b"", b"attempt,st", HEADER])
def test_a_file_that_has_just_begun_has_no_rows(tmp_path: Path, data: bytes) -> None:
    frame, is_unfinished = read_file(written(tmp_path, data), MEMORY)
    assert frame.columns.tolist() == MEMORY.header
    assert len(frame) == 0
    assert frame["size_bytes"].dtype == "int64"
    assert is_unfinished == (data == b"attempt,st")


@pytest.mark.parametrize(
    ("rows", "line", "words"),
    [
        (b"1,1,rows,10\n1,2,rows\n1,3,rows,10\n", 3, "shorter"),
        (b"1,1,rows,10\n1,2,rows,10,9\n", 3, "longer"),
        (b"1,1,rows,10,9\n1,2,rows\n", 2, "longer"),
        (b"1,1,rows,10\n\n1,2,rows,10\n", 3, "shorter"),
        (b"1,1,rows,10\n1,two,rows,10\n", 3, "two"),
        (b"1,1,rows,10\n1,2,rows,\n", 3, "''"),
        (b"1,1,rows,1.5\n", 2, "1.5"),
        (b"1,1,rows,nan\n", 2, "nan"),
        (b"1,1,rows,10\n1,2,rows,10\0\0\0\n", 3, "NUL"),
        (b"1,1,rows,10\r\n", 2, "carriage return"),
        (b"1,1,rows,10\n1,2,\xff,10\n", 3, "UTF-8"),
        (b'1,1,"rows,10\n1,2,rows,10\n', 3, "shorter"),
    ],
)
def test_a_damaged_row_is_refused_with_file_and_line(
    tmp_path: Path, rows: bytes, line: int, words: str
) -> None:
    path = written(tmp_path, HEADER + rows)
    with pytest.raises(RunDirError) as caught:
        read_file(path, MEMORY)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert words in str(caught.value)


def test_a_row_that_lacks_its_last_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    header = ",".join(TABLES["train"].header)
    path.write_text(f"{header}\n1,1.0,1,1,1.0,1.0,1.0,1.0,1.0\n1,1.0,2,1,1.0,1.0,1.0,1.0,1.0,utc\n")
    with pytest.raises(RunDirError, match=r"train.csv:2: .*shorter"):
        read_file(path, TABLES["train"])


def test_a_number_too_large_for_any_column_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER + b"1,1,rows,123456789012345678901234567890\n")
    with pytest.raises(RunDirError, match=r"memory.csv"):
        read_file(path, MEMORY)


def test_another_header_is_refused_and_shown_beside_the_right_one(tmp_path: Path) -> None:
    path = written(tmp_path, b"attempt,step,size_bytes,kind\n1,1,10,rows\n")
    with pytest.raises(
        RunDirError, match=r"memory.csv:1: columns are attempt,step,size_bytes,kind; schema 1"
    ):
        read_file(path, MEMORY)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"cannot read .*absent.csv: No such file"):
        read_file(tmp_path / "absent.csv", MEMORY)


def test_a_regular_file_never_takes_the_slow_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("the strict reader was asked about a regular file")

    monkeypatch.setattr(csv_table, "read_rows", refuse)
    frame, _ = read_file(written(tmp_path, HEADER + b"1,1,rows,10\n" * 3), MEMORY)
    assert len(frame) == 3


def test_both_readers_give_the_same_rows(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER + b"1,1,rows,10\n1,2,kernels,-3\n2,007,,0\n1,2,cut")
    frame, is_unfinished = read_file(path, MEMORY)
    assert frame.to_dict("records") == list(read_rows(path, MEMORY))
    assert is_unfinished
