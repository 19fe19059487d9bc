"""What a page is made of: sections of words, grids (tables for people) and figures.

All of them are plain values. The page draws them, ``--json`` prints them, and both have the same numbers,
because the JSON of a figure is read off the figure itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

Kind = Literal["text", "name", "run", "state", "share", "number", "whole", "seconds", "bytes", "hours"]
"""How a cell is written; all but the first four are numbers and stand on the right."""

_TEXTS = ("text", "name", "run", "state")
# What a trace draws, in plotly's words.
_DRAWN = ("x", "y", "z", "lowerfence", "q1", "median", "q3", "upperfence", "text")


@dataclass(frozen=True)
class Column:
    """One column of a grid: its key in the rows, its heading, how its cells are written."""

    key: str
    title: str
    kind: Kind = "text"

    @property
    def is_number(self) -> bool:
        """Whether cells are numbers."""
        return self.kind not in _TEXTS


@dataclass(frozen=True)
class Grid:
    """A table for people. The first column names its rows.

    Attributes:
        id: unique on the page.
        title: heading above it; empty where the section's own says enough.
        columns: in order.
        rows: plain cells by column key; None means that there is no value.
        note: how to read it.
        is_filterable: whether it gets a box to filter by.
    """

    id: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]
    note: str = ""
    is_filterable: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns the grid as plain data."""
        return {"id": self.id, "title": self.title, "rows": [dict(row) for row in self.rows]}


@dataclass(frozen=True)
class Panel:
    """One figure of the page, with its title and how to read it; ``height_rem`` 0 is the usual height."""

    id: str
    title: str
    figure: go.Figure
    note: str = ""
    height_rem: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return len(self.figure.data) == 0

    @property
    def words(self) -> str:
        """Says what is drawn, for those who do not see it."""
        axes = " against ".join(filter(None, (_title(self.figure, "yaxis"), _title(self.figure, "xaxis"))))
        shown = [trace for trace in self.figure.data if trace.showlegend is not False]
        names = [str(trace.name) for trace in shown if trace.name]
        some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return ": ".join(filter(None, (self.title, axes, some)))

    def to_json(self) -> dict[str, Any]:
        """Returns every number that the figure draws, as plain data."""
        return {
            "id": self.id,
            "title": self.title,
            "x": _title(self.figure, "xaxis"),
            "y": _title(self.figure, "yaxis"),
            "series": [_series(trace) for trace in self.figure.data if _draws(trace)],
            "marks": [
                {"name": shape.name, "from": plain(shape.x0), "to": plain(shape.x1)}
                for shape in self.figure.layout.shapes
            ],
        }


@dataclass(frozen=True)
class Section:
    """One section of the page; empty parts are left out. ``texts`` are titles with longer texts to unfold."""

    id: str
    title: str
    words: tuple[str, ...] = ()
    grids: tuple[Grid, ...] = ()
    panels: tuple[Panel, ...] = ()
    note: str = ""
    texts: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the section as plain data."""
        return {
            "id": self.id,
            "title": self.title,
            "words": list(self.words),
            "grids": [grid.to_json() for grid in self.grids],
            "figures": [panel.to_json() for panel in self.panels],
            "texts": dict(self.texts),
        }


def bars_panel(id: str, title: str, figure: go.Figure, note: str = "") -> Panel:  # noqa: A002 - HTML's word
    """Returns a panel of lying bars, high enough for their names."""
    names = figure.data[0].y if figure.data else ()
    most_lines = max((name.count("<br>") + 1 for name in names), default=0)
    return Panel(id, title, figure, note, height_rem=round(11 + len(names) * (0.7 + 0.95 * most_lines), 1))


def grid_rows(table: pd.DataFrame, measured: Iterable[str] = ()) -> tuple[dict[str, Any], ...]:
    """Returns a frame's rows as plain cells.

    NaN is a missing cell, None, but for the columns ``measured``, where it stays ``nan``.
    """
    kept = set(measured)
    return tuple(
        {
            str(key): None if key not in kept and is_missing(value) else plain(value)
            for key, value in cells.items()
        }
        for cells in table.to_dict("records")
    )


def is_missing(value: Any) -> bool:
    """Returns whether a cell has no value; a list or a text has one."""
    return value is None or (not isinstance(value, str | list | tuple | dict) and bool(pd.isna(value)))


def plain(value: Any) -> Any:
    """Returns a value for JSON, which has no word for NaN and infinity: they become text."""
    if hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def numbers(values: Any) -> list[Any]:
    """Returns an array, or a sequence of texts, as plain data; the rows of a matrix stay lists."""
    if isinstance(values, np.ndarray) and values.ndim > 1:
        return [numbers(row) for row in values]
    if (
        isinstance(values, Sequence)
        and values
        and isinstance(values[0], Sequence)
        and not isinstance(values[0], str)
    ):
        return [numbers(row) for row in values]
    return [plain(value) for value in (values.tolist() if isinstance(values, np.ndarray) else values)]


def _draws(trace: Any) -> bool:
    """Whether a trace is more than an entry of the legend."""
    return "x" not in trace or trace.x is None or len(trace.x) != 1 or trace.x[0] is not None


def _series(trace: Any) -> dict[str, Any]:
    return {"name": trace.name, "type": trace.type, **dict(_arrays(trace))}


def _arrays(trace: Any) -> Iterator[tuple[str, list[Any]]]:
    for name in _DRAWN:
        values = _part(trace, name)
        if values is not None and not isinstance(values, str):
            yield name, numbers(values)
    for name in ("error_x", "error_y"):
        error = _part(trace, name)
        if error is not None and error.array is not None:
            yield name, numbers(error.array)
            if error.arrayminus is not None:
                yield f"{name}_minus", numbers(error.arrayminus)


def _part(trace: Any, name: str) -> Any:
    return trace[name] if name in trace else None  # noqa: SIM401 - a trace has no get


def _title(figure: go.Figure, name: str) -> str:
    return str(figure.layout[name].title.text or "")
