"""The readers of the original HyLo scripts' files: lines in, rows of our tables out; errors name the line.

A row of the timing files is written before the step's own preconditioning, so its ``precondition`` is that
of the last step before, and 0 in the first row. Phases are disjoint in our tables, so three columns that
count time twice are left out: ``id_time`` (the last layer's decomposition alone, part of it in
``compute_factors``) and the two without a name (parts of ``allgather_factors``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcsngd.errors import RunDirError

# header of the timing files -> our phase; times are milliseconds
_PHASES = {
    "allgather_factors": "gather",
    "compute_factors": "factorise",
    "compute_kernel": "kernel",
    "update_inv": "invert",
    "broadcast_inv": "broadcast",
    "precondition": "precondition",
    "memory_usage": "",
    "compute_projection": "project",
    "id_time": "",
}
_UNNAMED = 2  # with several ranks each row has two more columns, which the header does not name

_LAYER = "layer {}"
_SHARE = 0.9  # of the singular values, fixed in the scripts


@dataclass
class Found:
    """What the files of one run hold.

    Attributes:
        rows: table -> rows, without the columns that the files do not have.
        dropped: table -> rows left out because they are there before.
        notes: what was interpreted or left out, in sentences.
    """

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, table: str) -> list[dict[str, Any]]:
        """Returns the rows of a table, to be added to."""
        return self.rows.setdefault(table, [])


def _numbers(
    path: Path, line: int, text: str, separator: str, counts: Sequence[int] | None = None
) -> list[float]:
    """Returns the numbers of a line; a separator at its end is the scripts' habit.

    Raises:
        RunDirError: a cell is no number, or there are not as many as allowed.
    """
    cells = [cell.strip() for cell in text.split(separator)]
    if cells and not cells[-1]:
        cells.pop()
    if counts is not None and len(cells) not in counts:
        allowed = " or ".join(map(str, counts))
        raise RunDirError(f"{path}:{line}: {len(cells)} cells, expected {allowed}")
    try:
        return [float(cell) for cell in cells]
    except ValueError as error:
        raise RunDirError(f"{path}:{line}: {error}") from error


def _whole(path: Path, line: int, value: float) -> int:
    if not value.is_integer():
        raise RunDirError(f"{path}:{line}: {value:g} should be a whole number")
    return int(value)


def _header(path: Path, lines: Sequence[str], pattern: str, expected: str) -> Iterator[tuple[int, str]]:
    """Yields number and text of the lines after the first, which must fit a pattern."""
    if lines and not re.fullmatch(pattern, lines[0]):
        raise RunDirError(f"{path}:1: the line is {lines[0]!r}; the original scripts write {expected}")
    yield from enumerate(lines[1:], 2)


def _accuracy(path: Path, lines: Sequence[str], facts: Mapping[str, str], found: Found) -> None:
    pattern = r"acc, *time\((ms|s)\), *total_time\((ms|s)\)"
    rows = found.of("eval")
    total = 0.0
    for line, text in _header(path, lines, pattern, "acc, time(ms), total_time(ms)"):
        accuracy, _, total_ms = _numbers(path, line, text, ",", (3,))
        if total_ms < total:
            raise RunDirError(
                f"{path}:{line}: total_time falls from {total:g} to {total_ms:g} ms; every rank writes this "
                "file, and here they wrote over each other"
            )
        total, epoch = total_ms, len(rows) + 1
        here = {"epoch": float(epoch), "step": epoch, "split": "test"}
        rows.append(here | {"accuracy": accuracy, "train_s": total_ms / 1000})
    if lines and "(s)" in lines[0]:
        found.notes.append(
            f"{path.name}: the header says seconds, the scripts write milliseconds: read as those"
        )


def _timing(path: Path, lines: Sequence[str], facts: Mapping[str, str], found: Found) -> None:
    header = ",".join(_PHASES)
    phases, memory = found.of("profiling"), found.of("memory")
    rank = int(facts["rank"])
    counts = (len(_PHASES), len(_PHASES) + _UNNAMED)
    for line, text in _header(path, lines, re.escape(header) + ",?", header):
        cells = dict(zip(_PHASES, _numbers(path, line, text, ",", counts), strict=False))
        step = line - 1
        for name, phase in _PHASES.items():
            if phase:
                row = {
                    "step": step,
                    "rank": rank,
                    "refresh": 1,
                    "phase": phase,
                    "seconds": cells[name] / 1000,
                }
                phases.append(row)
        if rank == 0:  # the table is of rank 0
            size = _whole(path, line, cells["memory_usage"])
            memory.append({"step": step, "kind": "cached", "size_bytes": size})
    found.notes.append(f"{path.name}: id_time and the columns without a name count time twice: left out")


def _rank(path: Path, lines: Sequence[str], facts: Mapping[str, str], found: Found) -> None:
    rows = found.of("rank_analysis")
    known: list[float] = []
    repeated = 0
    for line, text in _header(path, lines, "rank", "rank"):
        cells = _numbers(path, line, text, ",")
        if cells[: len(known)] != known:
            raise RunDirError(f"{path}:{line}: does not begin with the values of the line before")
        for position, value in enumerate(cells[len(known) :]):
            layer = _LAYER.format(position)
            rows.append(
                {"step": line - 1, "layer": layer, "share": _SHARE, "low_rank": _whole(path, line, value)}
            )
        repeated += len(known)
        known = cells
    if repeated:
        found.dropped["rank_analysis"] = found.dropped.get("rank_analysis", 0) + repeated
        found.notes.append(
            f"{path.name}: each line repeats all earlier values; {repeated:,} repeated ones were left out"
        )


def _grad_norm(path: Path, lines: Sequence[str], facts: Mapping[str, str], found: Found) -> None:
    rows = found.of("grad_norm")
    width: tuple[int, ...] | None = None
    for line, text in _header(path, lines, r"(\d+, *)*", "an empty line or the layers' numbers"):
        cells = _numbers(path, line, text, ",", width)
        width = (len(cells),)
        for position, value in enumerate(cells):
            rows.append({"step": line - 1, "layer": _LAYER.format(position), "norm": value})


def _grad_error(path: Path, lines: Sequence[str], facts: Mapping[str, str], found: Found) -> None:
    rows = found.of("grad_error")
    for line, text in enumerate(lines, 1):
        (value,) = _numbers(path, line, text, ",", (1,))
        here = {"step": line, "layer": "all layers", "method": facts["method"]}
        rows.append(here | {"relative_error": value})


READERS: dict[str, Callable[[Path, Sequence[str], Mapping[str, str], Found], None]] = {
    "accuracy": _accuracy,
    "timing": _timing,
    "rank": _rank,
    "grad-norm": _grad_norm,
    "grad-error": _grad_error,
}
"""Kind of file -> what adds its rows: path, complete lines, what the name says, where to."""
