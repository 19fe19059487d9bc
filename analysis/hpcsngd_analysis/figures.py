"""Curves of runs as plotly figures.

A run has one color and one marker in every figure made from the same `Runs`.

The data of a curve is separate from its drawing (`curves`, then `figure`), so that a report can print every
number it draws and tests can check them.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hpcsngd_analysis.load import Runs
from hpcsngd_analysis.thin import POINTS, Floats, kept_points

Metric = Literal["accuracy", "loss"]
Clock = Literal["epoch", "train_s"]

# Okabe and Ito, "Color universal design" (2008), without yellow, which is hard to see on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# plotly's name of the marker, and the same shape as a character for the page's key.
SYMBOLS = (
    ("circle", "●"),
    ("square", "■"),
    ("diamond", "◆"),
    ("triangle-up", "▲"),
    ("x", "✖"),
    ("cross", "✚"),
    ("star", "★"),
    ("triangle-down", "▼"),
)
MANY = 8
"""With more runs than this the training curves start hidden, because they would cover the test curves."""

_DASHES = {"train": "dot", "test": "solid", "validation": "dash"}
_LOG_FROM = np.log10(50.0)
_TIME_UNITS = (("h", 3600.0), ("min", 60.0), ("s", 1.0))


@dataclass(frozen=True)
class Style:
    """How a run looks: color, plotly marker and the marker's shape as a character."""

    color: str
    symbol: str
    glyph: str


@dataclass(frozen=True)
class Curve:
    """One line of a figure: ``x`` and ``y`` of one run on one split, ordered by step, in the axes' units."""

    run: str
    split: str
    x: Floats
    y: Floats


@dataclass(frozen=True)
class Curves:
    """The data of one figure, with its axis titles.

    Attributes:
        metric: what is drawn upwards.
        clock: what is drawn to the right.
        x_title: with its unit.
        y_title: with its unit.
        decades: powers of ten that the logarithmic vertical axis spans; 0 for a linear axis.
        lines: the curves in drawing order: training first, so that others lie above; then by run.
    """

    metric: Metric
    clock: Clock
    x_title: str
    y_title: str
    decades: float
    lines: tuple[Curve, ...]


def style(position: int) -> Style:
    """Returns the look of the run at a position among the runs loaded; 56 runs look different."""
    symbol, glyph = SYMBOLS[position // len(PALETTE) % len(SYMBOLS)]
    return Style(PALETTE[position % len(PALETTE)], symbol, glyph)


def curves(runs: Runs, metric: Metric, clock: Clock, points: int = POINTS) -> Curves:
    """Returns a metric of all runs, on training data and on each split evaluated, against epoch or time.

    Args:
        runs: with the tables ``train`` and ``eval``.
        metric: ``accuracy`` as a share, or ``loss``.
        clock: ``epoch``, or ``train_s``: training time without evaluation, checkpoints and queueing, shown in
            seconds, minutes or hours, whichever suits the longest run.
        points: a longer curve is thinned to at most this many points.

    Returns:
        One curve per run and split that has rows. The loss gets a logarithmic axis where all values drawn are
        positive and span a factor above 50, so that one diverging run does not flatten the others.
    """
    tables = [runs.tables["train"].assign(split="train"), runs.tables["eval"]]
    unit, divisor = _time_unit([*tables]) if clock == "train_s" else ("", 1.0)
    parts = [_lines(table, metric, clock, divisor, points) for table in tables if len(table)]
    order = {run.name: position for position, run in enumerate(runs.records)}
    lines = sorted(
        (line for part in parts for line in part), key=lambda line: (line.split != "train", order[line.run])
    )
    decades = _decades(lines) if metric == "loss" else 0.0
    is_log = decades > _LOG_FROM
    x_title = f"training time ({unit})" if clock == "train_s" else "epoch"
    y_title = f"{metric}{' (log scale)' if is_log else ''}"
    return Curves(metric, clock, x_title, y_title, decades if is_log else 0.0, tuple(lines))


def _time_unit(tables: Sequence[pd.DataFrame]) -> tuple[str, float]:
    longest = max((float(table["train_s"].max()) for table in tables if len(table)), default=0.0)
    return next(((unit, size) for unit, size in _TIME_UNITS if longest >= 2 * size), _TIME_UNITS[-1])


def _lines(table: pd.DataFrame, metric: Metric, clock: Clock, divisor: float, points: int) -> list[Curve]:
    found = []
    for (run, split), rows in table.groupby(["run", "split"], sort=False):
        x, y = (rows[column].to_numpy(dtype=np.float64) for column in (clock, metric))
        keep = kept_points(y, points)
        found.append(Curve(str(run), str(split), x[keep] / divisor, y[keep]))
    return found


def _decades(lines: Sequence[Curve]) -> float:
    """Returns the powers of ten between smallest and largest number; 0 where a logarithm makes no sense."""
    values = np.concatenate([line.y for line in lines]) if lines else np.array([])
    values = values[np.isfinite(values)]
    return float(np.log10(values.max() / values.min())) if len(values) and values.min() > 0 else 0.0


def _log_tick(decades: float) -> str | int:
    # plotly's words: "D2" labels 1, 2 and 5 of each decade; a number n labels every n-th decade.
    return "D2" if decades < 4 else max(1, round(decades / 8))


def figure(data: Curves, runs: Runs) -> go.Figure:
    """Returns the drawing of `curves`: test solid, validation dashed, training dotted, thin and below.

    Each trace carries ``meta = {"run": position of the run, "split": name}`` for programs, and belongs to the
    legend group of its run. With more than `MANY` runs the training curves start hidden. Without any curve
    the figure says so.
    """
    position = {run.name: place for place, run in enumerate(runs.records)}
    drawing = go.Figure(layout=_layout(data))
    is_crowded = len(runs.records) > MANY
    drawing.add_traces([_trace(line, position[line.run], data, is_crowded=is_crowded) for line in data.lines])
    if not data.lines:
        drawing.add_annotation(text="no rows", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    return drawing


def _trace(line: Curve, position: int, data: Curves, *, is_crowded: bool) -> go.Scatter:
    look, is_train = style(position), line.split == "train"
    return go.Scatter(
        x=line.x,
        y=line.y,
        # plotly reads a small HTML dialect in names; a run's name is text.
        name=f"{html.escape(line.run, quote=False)}, {html.escape(line.split, quote=False)}",
        legendgroup=str(position),
        meta={"run": position, "split": line.split},
        # A lone number, as before a NaN, has no line to be seen by.
        mode="lines" if is_train and np.isfinite(line.y).sum() > 1 else "lines+markers",
        line={
            "color": look.color,
            "width": 1.2 if is_train else 2,
            "dash": _DASHES.get(line.split, "dashdot"),
        },
        marker={"symbol": look.symbol, "size": 6},
        opacity=0.6 if is_train else 1,
        visible="legendonly" if is_train and is_crowded else True,
        hovertemplate=_hover(data),
    )


def _hover(data: Curves) -> str:
    x = "epoch %{x:.4~g}" if data.clock == "epoch" else f"{data.x_title}: %{{x:.4~g}}"
    y = "accuracy %{y:.2%}" if data.metric == "accuracy" else "loss %{y:.4~g}"
    return f"<b>%{{fullData.name}}</b><br>{y}<br>{x}<extra></extra>"


def _layout(data: Curves) -> go.Layout:
    axis = {
        "showline": True,
        "linecolor": "#888",
        "gridcolor": "#e6e6e6",
        "ticks": "outside",
        "zeroline": False,
    }
    is_share = data.metric == "accuracy"
    return go.Layout(
        template=go.layout.Template(),
        xaxis={**axis, "title": {"text": data.x_title}, "rangemode": "tozero"},
        yaxis={
            **axis,
            "title": {"text": data.y_title},
            "tickformat": ".2~%" if is_share else ".3~g",  # per cent stands at each tick
            "type": "log" if data.decades else "linear",
            # Left alone, plotly labels all of 1 to 9 over two decades, and the labels overlap.
            "dtick": _log_tick(data.decades) if data.decades else None,
            "automargin": True,
        },
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#222"},
        margin={"l": 60, "r": 16, "t": 16, "b": 52},
        plot_bgcolor="white",
        paper_bgcolor="white",
        hovermode="closest",
        hoverlabel={"namelength": -1, "bgcolor": "white"},
    )
