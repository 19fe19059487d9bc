"""One metrics file: strict, and fast where the file is as its writer left it.

A file is read by pandas when every line has the declared number of cells. Anything else goes through
`hpcsngd.rundir.read_rows`, which is slow but knows quoting and names the line of a damaged row. Both accept
the same files, so speed never decides what counts as a row.
"""

from __future__ import annotations

import csv
import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hpcsngd.errors import RunDirError
from hpcsngd.rundir import SCHEMA, read_rows
from hpcsngd.tables import Dtype, Table

# pandas 2 rounds the last digits unless told not to; 3.1 reads exactly and deprecates asking for it.
_IS_EXACT = tuple(int(part) for part in pd.__version__.split(".")[:2]) >= (3, 1)
_EXACT: dict[str, Any] = {} if _IS_EXACT else {"float_precision": "round_trip"}

_DTYPES: dict[Dtype, str] = {"int": "int64", "float": "float64", "str": "str"}


def dtypes(table: Table) -> dict[str, str]:
    """Returns the pandas dtype of each column of a table, in file order."""
    return {column.name: _DTYPES[column.dtype] for column in table.columns}


@functools.cache
def empty(table: Table) -> pd.DataFrame:
    """Returns the frame with the table's columns and no row; always the same one, so never change it."""
    # Most runs write few of the tables, and making typed columns costs more than reading a small file.
    return pd.DataFrame({name: pd.Series([], dtype=dtype) for name, dtype in dtypes(table).items()})


def with_declared_text(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """Returns rows of `read_file` with the declared dtype for text, too."""
    return frame.astype({name: kind for name, kind in dtypes(table).items() if kind == "str"})


def _reading_dtypes(table: Table) -> dict[str, str]:
    # pandas takes as long to type a column of text as to read it; that is done once for all files instead
    return {name: "object" if kind == "str" else kind for name, kind in dtypes(table).items()}


def read_file(path: Path, table: Table) -> tuple[pd.DataFrame, bool]:
    """Reads one metrics file.

    Args:
        path: the CSV file.
        table: its declaration in `hpcsngd.tables`.

    Returns:
        The rows in file order, text as plain objects (see `with_declared_text`), and whether a last line
        without newline was left out: it is not a row yet.

    Raises:
        RunDirError: unreadable, another header, or a damaged row; the message names file and line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunDirError(f"cannot read {path}: {error.strerror}") from error
    end = data.rfind(b"\n") + 1
    whole, is_unfinished = data[:end], end < len(data)
    if not whole:
        return empty(table), is_unfinished
    _check_bytes(path, whole)
    _check_header(path, table, whole)
    return _parse(path, table, whole), is_unfinished


def _check_bytes(path: Path, data: bytes) -> None:
    # A node that dies while a parallel file system flushes leaves blocks of NUL; our lines end with \n alone.
    for byte, name in ((b"\0", "a NUL byte"), (b"\r", "a carriage return")):
        position = data.find(byte)
        if position >= 0:
            raise RunDirError(f"{path}:{_line(data, position)}: {name}; the file is damaged")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RunDirError(f"{path}:{_line(data, error.start)}: not UTF-8; the file is damaged") from error


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def _check_header(path: Path, table: Table, data: bytes) -> None:
    found = data[: data.find(b"\n")].decode("utf-8")
    expected = ",".join(table.header)
    if found != expected:
        raise RunDirError(f"{path}:1: columns are {found}; schema {SCHEMA} has {expected}")


def _parse(path: Path, table: Table, data: bytes) -> pd.DataFrame:
    frame = _fast(table, data)
    if frame is not None:
        return frame
    try:
        rows = pd.DataFrame(list(read_rows(path, table)), columns=table.header)
        return rows.astype(_reading_dtypes(table))
    except (csv.Error, OverflowError, ValueError) as error:
        raise RunDirError(f"{path}: {error}") from error


def _is_rectangular(data: bytes, columns: int) -> bool:
    """Returns whether every line has the same number of cells; pandas would fill up short ones."""
    characters = np.frombuffer(data, dtype=np.uint8)
    ends, commas = np.flatnonzero(characters == ord("\n")), np.flatnonzero(characters == ord(","))
    expected = np.arange(1, len(ends) + 1) * (columns - 1)
    return bool((np.searchsorted(commas, ends) == expected).all())


def _fast(table: Table, data: bytes) -> pd.DataFrame | None:
    """Returns the rows by pandas' own parser, or None when the strict reader should look."""
    if b'"' in data or not _is_rectangular(data, len(table.columns)):
        return None
    kinds = _reading_dtypes(table)
    # Only our writer's "nan" is NaN: an empty cell is damage, and the text "NA" may be a layer's name.
    nan = {name: ["nan"] for name, kind in kinds.items() if kind == "float64"}
    try:
        return pd.read_csv(
            io.BytesIO(data),
            dtype=kinds,
            na_values=nan,
            keep_default_na=False,
            skip_blank_lines=False,
            **_EXACT,
        )
    except (ValueError, OverflowError):
        return None
