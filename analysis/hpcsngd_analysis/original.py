"""Files of the original HyLo scripts, as rows of the tables of `hpcsngd.tables`.

The scripts of "HyLo: A Hybrid Low-Rank Natural Gradient Descent Method" (Mu et al., SC 2022) write plain text
into their working directory; what a file is stands in its name alone:

==================================================  =====================  ===========
file                                                table                  step counts
==================================================  =====================  ===========
``<model>-<dataset>-lr*-d*-td*-wd*-f*.csv``         eval                   epochs
``<hylo|sngd|kid|kis>-timing-r<rank>-n<ranks>.csv`` profiling, memory      refreshes
``[<dataset>-<local batch>-]rank-<rank>.csv``       rank_analysis          steps
``grad-norm.csv``                                   grad_norm              steps
``grad-error-<model>-<dataset>-<kid|kis>.txt``      grad_error             steps
==================================================  =====================  ===========

Files that belong together (all ranks of one timing, KID and KIS of one model) make one run. Milliseconds
become seconds. A number that the files do not have is NaN, a count 0, a text empty; the attempt is 1. Layers
go by their position: ``layer 0``. As everywhere, a last line without newline is not a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hpcsngd.errors import RunDirError
from hpcsngd.tables import TABLES
from hpcsngd_analysis.csv_table import dtypes, empty
from hpcsngd_analysis.original_files import READERS, Found
from hpcsngd_analysis.records import Run

_NUMBER = r"[-+.e\d]+"
_NAMES = {
    "accuracy": rf"(?P<model>.+?)-(?P<data>fashion-mnist|[^-]+)-lr(?P<lr>{_NUMBER})-d(?P<damping>{_NUMBER})"
    rf"-td(?P<target_damping>{_NUMBER})-wd(?P<weight_decay>{_NUMBER})-f(?P<refresh_every>\d+)\.csv",
    "timing": r"(?P<method>hylo|sngd|kid|kis)-timing-r(?P<rank>\d+)-n(?P<ranks>\d+)\.csv",
    "rank": r"(?:(?P<data>.+)-(?P<batch_size>\d+)-)?rank-(?P<rank>\d+)\.csv",
    "grad-norm": r"grad-norm\.csv",
    "grad-error": r"grad-error-(?P<model>.+?)-(?P<data>fashion-mnist|[^-]+)-(?P<method>kid|kis)\.txt",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _NAMES.items()}
_KNOWN = (
    "<model>-<dataset>-lr*-d*-td*-wd*-f*.csv, <method>-timing-r<rank>-n<ranks>.csv, [<dataset>-<batch>-]rank-"
    "<rank>.csv, grad-norm.csv and grad-error-<model>-<dataset>-<method>.txt"
)


@dataclass(frozen=True)
class Source:
    """Files that make one run.

    Attributes:
        folder: where they lie.
        name: what the run is called in the folder.
        kind: key of the readers.
        files: their names, ordered.
    """

    folder: Path
    name: str
    kind: str
    files: tuple[str, ...]


def of_file(path: Path) -> Source:
    """Returns the source that is one file.

    Raises:
        RunDirError: the name is none of the original scripts'.
    """
    found = _kind(path.name)
    if found is None:
        raise RunDirError(f"{path} is no directory and no file of the original HyLo scripts: {_KNOWN}")
    kind, match = found
    return Source(path.parent, _run_name(kind, match), kind, (path.name,))


def in_folder(folder: Path) -> list[Source]:
    """Returns the sources that lie directly in a folder, ordered by name."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path in sorted(folder.iterdir()):
        found = _kind(path.name) if path.is_file() else None
        if found:
            groups.setdefault((_run_name(*found), found[0]), []).append(path.name)
    return [Source(folder, name, kind, tuple(files)) for (name, kind), files in sorted(groups.items())]


def _kind(name: str) -> tuple[str, re.Match[str]] | None:
    for kind, pattern in _PATTERNS.items():
        match = pattern.fullmatch(name)
        if match:
            return kind, match
    return None


def _run_name(kind: str, match: re.Match[str]) -> str:
    parts = match.groupdict()
    if kind == "timing":
        return f"{parts['method']}-timing-n{parts['ranks']}"
    if kind == "rank":
        return f"{parts['data']}-{parts['batch_size']}-rank" if parts["data"] else "rank"
    if kind == "grad-error":
        return f"grad-error-{parts['model']}-{parts['data']}"
    return match.string.removesuffix(".csv")


def read(source: Source, name: str) -> tuple[Run, dict[str, pd.DataFrame]]:
    """Returns the run that the files of a source make, and its tables.

    Args:
        source: the files.
        name: what to call the run.

    Raises:
        RunDirError: unreadable or damaged; the message names file and line.
    """
    found = Found()
    unfinished: list[str] = []
    facts: dict[str, str] = {}
    for file in source.files:
        path = source.folder / file
        match = _PATTERNS[source.kind].fullmatch(file)
        facts |= {key: value for key, value in (match.groupdict() if match else {}).items() if value}
        lines, is_unfinished = _lines(path)
        unfinished += [file] if is_unfinished else []
        READERS[source.kind](path, lines, facts, found)
    tables = {table: _frame(table, rows) for table, rows in found.rows.items()}
    return _run(source, name, facts, found, unfinished), tables


def _lines(path: Path) -> tuple[list[str], bool]:
    """Returns the complete lines, without their ends, and whether another one is not complete."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirError(f"cannot read {path}: {error}") from error
    *whole, rest = text.split("\n")
    return whole, bool(rest)


def _frame(table: str, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Returns rows as the table's frame; columns that they do not have are NaN, 0 or empty."""
    plain: dict[str, Any] = {"int": 0, "float": float("nan"), "str": ""}
    filled = {column.name: plain[column.dtype] for column in TABLES[table].columns} | {"attempt": 1}
    if not rows:
        return empty(TABLES[table])
    return pd.DataFrame([filled | dict(row) for row in rows]).astype(dtypes(TABLES[table]))


def _run(source: Source, name: str, facts: Mapping[str, str], found: Found, unfinished: Sequence[str]) -> Run:
    counts = {"eval": "epochs", "profiling": "refreshes"}
    said = [f"{table}: step counts {counts[table]}" for table in found.rows if table in counts]
    return Run(
        name=name,
        path=source.folder,
        experiment=source.name,
        site="",
        config={"site": {}, "experiment": _experiment(facts)},
        provenance={},
        status=None,
        attempts=0,
        world_size=int(facts["ranks"]) if "ranks" in facts else None,
        wall_s=None,
        last_utc=None,
        dropped_rows=found.dropped,
        unfinished_files=tuple(unfinished),
        origin="hylo",
        notes=(*said, *found.notes),
        rows={table: len(rows) for table, rows in found.rows.items()},
    )


def _experiment(facts: Mapping[str, str]) -> dict[str, Any]:
    """Returns what file names say, by the keys of our experiments."""
    preconditioner = {
        "name": "hylo" if "refresh_every" in facts else facts.get("method"),
        "damping": _float(facts.get("damping")),
        "target_damping": _float(facts.get("target_damping")),
        "refresh_every": int(facts["refresh_every"]) if "refresh_every" in facts else None,
    }
    optimizer = {"lr": _float(facts.get("lr")), "weight_decay": _float(facts.get("weight_decay"))}
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": facts.get("model")},
        "data": {"name": facts.get("data")},
        "optimizer": optimizer,
        "preconditioner": preconditioner,
    }
    known = {
        section: {key: value for key, value in keys.items() if value is not None}
        for section, keys in sections.items()
    }
    batch = {"batch_size": int(facts["batch_size"])} if "batch_size" in facts else {}
    return batch | {section: keys for section, keys in known.items() if keys}


def _float(text: str | None) -> float | None:
    return None if text is None else float(text)
