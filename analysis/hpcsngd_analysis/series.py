"""Anything a run measures, over time: its median and range, per run or, of many runs, per group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hpcsngd_analysis.drawing import (
    DASHES,
    Floats,
    axis,
    color_of_many,
    decades,
    empty,
    faint,
    layout,
    plain,
    style,
    wrapped,
)
from hpcsngd_analysis.groups import Group
from hpcsngd_analysis.load import Runs

LINES = 40
"""With more runs than this, figures draw groups instead of runs: nobody can follow a thousand lines."""

POINTS = 300
"""A series has at most this many points; rows between two of them count together."""


@dataclass(frozen=True)
class Member:
    """What is drawn as one thing: a run, or a group of runs.

    Attributes:
        name: of the run or group.
        position: among the runs or groups; decides the color.
        is_run: whether it is a single run.
        runs: names of its runs.
    """

    name: str
    position: int
    is_run: bool
    runs: tuple[str, ...]

    @property
    def meta(self) -> dict[str, int]:
        """What its traces carry, so that the page can hide them."""
        return {"run" if self.is_run else "group": self.position}


@dataclass(frozen=True)
class Spread:
    """One series: at each ``x`` the median, the lowest and the highest of the rows there.

    ``kind`` tells apart several series of one member, such as two methods; ``""`` where there is one.
    """

    member: Member
    kind: str
    x: Floats
    median: Floats
    low: Floats
    high: Floats


def members(runs: Runs, groups: Sequence[Group]) -> tuple[Member, ...]:
    """Returns what figures draw: each run, or with more than `LINES` of them each group."""
    if len(runs.records) <= LINES:
        records = enumerate(runs.records)
        return tuple(Member(run.name, position, True, (run.name,)) for position, run in records)
    return tuple(Member(group.name, place, False, group.runs) for place, group in enumerate(groups))


def clock_of(table: pd.DataFrame) -> str:
    """Returns the clock to draw a table against: ``epoch``, or ``step`` where no row says its epoch."""
    return "epoch" if table.empty or table["epoch"].notna().any() else "step"


def spreads(
    table: pd.DataFrame, drawn: Sequence[Member], y: str, *, x: str = "epoch", kind: str | None = None
) -> list[Spread]:
    """Returns a column over time.

    Rows of one member at one ``x``, such as those of all layers, count together; so do those of neighboring
    ``x`` where there are more than `POINTS` of them. Rows that are NaN are left out.

    Args:
        table: with the columns ``run``, ``x`` and ``y``.
        drawn: see `members`.
        y: the column.
        x: the clock's column.
        kind: a column whose values make series of their own.

    Returns:
        In the order of the members, then of the kinds as first met.
    """
    found = []
    for member in drawn:
        own = table[table["run"].isin(member.runs)]
        for name, rows in own.groupby(kind, sort=False) if kind else [("", own)]:
            if rows[[x, y]].notna().all(axis=1).any():
                found.append(_spread(member, str(name), rows[x].to_numpy(float), rows[y].to_numpy(float)))
    return found


def _spread(member: Member, kind: str, x: Floats, y: Floats) -> Spread:
    readings = np.unique(x)
    if len(readings) > POINTS:
        edges = np.linspace(readings[0], readings[-1], POINTS + 1)
        place = np.clip(np.digitize(x, edges) - 1, 0, POINTS - 1)
        x = ((edges[:-1] + edges[1:]) / 2)[place]
    at_each = pd.Series(y).groupby(x).agg(["median", "min", "max"])
    low, high = at_each["min"].to_numpy(), at_each["max"].to_numpy()
    return Spread(member, kind, at_each.index.to_numpy(float), at_each["median"].to_numpy(), low, high)


def figure(
    data: Sequence[Spread],
    y_title: str,
    *,
    x_title: str = "epoch",
    is_log: bool | None = None,
    tickformat: str = ".4~g",
    has_zero: bool = False,
) -> go.Figure:
    """Returns the drawing of `spreads`: the median as a line, lowest to highest as an area.

    Args:
        data: what `spreads` returned.
        y_title: with its unit.
        x_title: with its unit.
        is_log: whether the vertical axis is logarithmic; default: where that shows more, see `decades`.
        tickformat: of the vertical axis, in d3's words.
        has_zero: whether the vertical axis begins at zero.
    """
    if not data:
        return empty()
    values = np.concatenate([each.median for each in data])
    span = decades(values) if is_log is None else decades(values) * is_log
    kinds = list(dict.fromkeys(each.kind for each in data))
    zero = {"rangemode": "tozero"} if has_zero else {}
    drawing = go.Figure(
        layout=layout(
            axis(x_title, rangemode="tozero"),
            axis(f"{y_title}{' (log scale)' if span else ''}", decades=span, tickformat=tickformat, **zero),
            # The page's key names runs and groups; kinds are told apart here.
            has_legend=len(kinds) > 1,
        )
    )
    if len(kinds) > 1:
        drawing.add_traces([_kind_trace(place, kind) for place, kind in enumerate(kinds)])
    for each in data:
        drawing.add_traces(list(_traces(each, kinds)))
    return drawing


def _kind_trace(place: int, kind: str) -> go.Scatter:
    """Returns the legend's entry of a kind; it draws nothing, and its group is hidden with it."""
    line = {"color": "#444", "width": 2, "dash": DASHES[place % len(DASHES)]}
    return go.Scatter(x=[None], y=[None], name=plain(kind), legendgroup=kind, mode="lines", line=line)


def _traces(each: Spread, kinds: Sequence[str]) -> Iterator[go.Scatter]:
    name = plain(f"{each.member.name}, {each.kind}" if each.kind else each.member.name)
    common = {"x": each.x, "legendgroup": each.kind, "meta": each.member.meta, "showlegend": False}
    look = style(each.member.position)
    if (each.low < each.high).any():
        edge = {**common, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        yield go.Scatter(y=each.low, name=f"{name}, lowest", **edge)
        yield go.Scatter(
            y=each.high,
            name=f"{name}, highest",
            fill="tonexty",
            fillcolor=faint(each.member.position, 0.12),
            **edge,
        )
    yield go.Scatter(
        y=each.median,
        name=name,
        mode="lines+markers" if len(each.x) <= 30 else "lines",
        line={
            "color": look.color,
            "width": 2,
            "dash": DASHES[kinds.index(each.kind) % len(DASHES)],
        },
        marker={"symbol": look.symbol, "size": 6},
        hovertemplate="<b>%{fullData.name}</b><br>%{y:.4~g}<br>at %{x:.4~g}<extra></extra>",
        **common,
    )


def stacked(parts: pd.DataFrame, x_title: str, order: Sequence[str] = ()) -> go.Figure:
    """Returns a chart of stacked bars that lie, so that their names can be read.

    Args:
        parts: index: what is stacked, from the left; columns: one bar each, from the top; NaN for nothing.
        x_title: with its unit.
        order: names that have the same color in all figures, by their place here.
    """
    if parts.empty:
        return empty()
    drawing = go.Figure(
        layout=layout(
            axis(x_title, tickformat=".4~g"),
            axis("", type="category", autorange="reversed", gridcolor="white", tickfont={"size": 11}),
            barmode="stack",
        )
    )
    places = {name: place for place, name in enumerate(dict.fromkeys([*order, *map(str, parts.index)]))}
    for part, row in parts.iterrows():
        drawing.add_trace(
            go.Bar(
                orientation="h",
                # As a list: plotly.js restarts a stack after a NaN in a packed array, but steps over a null.
                x=[None if np.isnan(value) else float(value) for value in row],
                y=[wrapped(column) for column in parts.columns],
                name=plain(part),
                marker={"color": color_of_many(places[str(part)]), "line": {"color": "white", "width": 0.5}},
                hovertemplate="<b>%{fullData.name}</b><br>%{y}<br>%{x:.4~g}<extra></extra>",
            )
        )
    return drawing


@dataclass(frozen=True)
class Box:
    """A distribution: lowest, quartiles, highest, and how many values."""

    low: float
    q1: float
    median: float
    q3: float
    high: float
    n: int


def box(values: Floats) -> Box:
    """Returns the distribution of at least one value."""
    low, q1, median, q3, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    return Box(float(low), float(q1), float(median), float(q3), float(high), len(values))


def boxes(
    data: Mapping[str, Mapping[str, Box]], y_title: str, *, x_title: str = "", is_log: bool = False
) -> go.Figure:
    """Returns box plots whose whiskers reach the lowest and highest value.

    Args:
        data: series -> category on the horizontal axis -> box.
        y_title: with its unit.
        x_title: what the categories are.
        is_log: whether the vertical axis is logarithmic.
    """
    if not data:
        return empty()
    values = np.array([[each.low, each.high] for found in data.values() for each in found.values()])
    span = decades(values.ravel()) if is_log else 0.0
    drawing = go.Figure(
        layout=layout(
            axis(x_title, type="category"),
            axis(y_title, decades=span, tickformat=".4~g"),
            boxmode="group",
            has_legend=len(data) > 1,
        )
    )
    for place, (name, by_category) in enumerate(data.items()):
        found = list(by_category.values())
        drawing.add_trace(
            go.Box(
                x=[plain(category) for category in by_category],
                lowerfence=[each.low for each in found],
                q1=[each.q1 for each in found],
                median=[each.median for each in found],
                q3=[each.q3 for each in found],
                upperfence=[each.high for each in found],
                customdata=[each.n for each in found],
                name=plain(name),
                marker={"color": style(place).color},
            )
        )
    return drawing
