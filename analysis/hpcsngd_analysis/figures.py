"""Curves of training: a metric of each run, or the mean of a group's runs, against a clock.

A run has one color and one marker in every figure made from the same `Runs`. The data of a curve is separate
from its drawing (`curves`, then `figure`), so that it can be checked and used in a notebook.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hpcsngd_analysis import clocks
from hpcsngd_analysis.drawing import (
    TIME_UNITS,
    Floats,
    axis,
    decades,
    empty,
    faint,
    layout,
    plain,
    style,
    unit,
)
from hpcsngd_analysis.groups import Group
from hpcsngd_analysis.load import Runs
from hpcsngd_analysis.resampling import bootstrap_band
from hpcsngd_analysis.thin import POINTS, kept_points

Metric = Literal["accuracy", "loss"]
Clock = Literal["epoch", "samples", "train_s", "charged_s"]

MANY = 8
"""With more runs than this the training curves start hidden, because they would cover the test curves."""

BAND_POINTS = 200
"""A mean over runs is drawn at no more clock readings than this."""

_DASHES = {"train": "dot", "test": "solid", "validation": "dash"}
_CLOCKS: dict[Clock, str] = {
    "epoch": "epoch",
    "samples": "samples",
    "train_s": "training time",
    "charged_s": "charged time",
}


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

    metric: str
    clock: Clock
    x_title: str
    y_title: str
    decades: float
    lines: tuple[Curve, ...]


@dataclass(frozen=True)
class Band:
    """The mean of a group's runs with its interval, at common readings of the clock.

    Attributes:
        group: the group's name.
        split: which data.
        x: readings of the clock at which every run of ``n`` has a value.
        mean: over the runs.
        low: lower end of the interval; NaN for a single run.
        high: upper end.
        n: how many runs.
    """

    group: str
    split: str
    x: Floats
    mean: Floats
    low: Floats
    high: Floats
    n: int


def curves(runs: Runs, metric: Metric, clock: Clock, points: int = POINTS) -> Curves:
    """Returns a metric of all runs, on training data and on each split evaluated, against a clock.

    Args:
        runs: with the tables ``train`` and ``eval``.
        metric: ``accuracy`` as a share, or ``loss``.
        clock: ``epoch``; ``samples``: training samples used; ``train_s``: training alone, without evaluation,
            checkpoints, queueing and work done twice; or ``charged_s``: what the site charges to all attempts
            so far, without queueing. Times are shown in seconds, minutes or hours, whichever suits the
            longest run. Rows whose clock nobody knows are left out.
        points: a longer curve is thinned to at most this many points.

    Returns:
        One curve per run and split that has rows. The loss gets a logarithmic axis where all values drawn are
        positive and span a factor above 50, so that one diverging run does not flatten the others.
    """
    tables = list(clocked(runs))
    x_title, divisor = _clock_axis(tables, clock)
    lines = [
        _line(run, split, rows[clock].to_numpy(float) / divisor, rows[metric].to_numpy(float), points)
        for table in tables
        for (run, split), rows in table[table[clock].notna()].groupby(["run", "split"], sort=False)
    ]
    order = {run.name: position for position, run in enumerate(runs.records)}
    lines.sort(key=lambda line: (line.split != "train", order[line.run]))
    span = _span([line.y for line in lines]) if metric == "loss" else 0.0
    return Curves(metric, clock, x_title, f"{metric}{' (log scale)' if span else ''}", span, tuple(lines))


def score_curves(runs: Runs, metric: str, points: int = POINTS) -> Curves:
    """Returns a score of all runs (perplexity, BLEU) on each split evaluated, against epochs.

    Args:
        runs: with the table ``scores``.
        metric: one of its column ``metric``.
        points: a longer curve is thinned to at most this many points.
    """
    table = runs.tables["scores"]
    order = {run.name: position for position, run in enumerate(runs.records)}
    lines = [
        _line(run, split, rows["epoch"].to_numpy(float), rows["value"].to_numpy(float), points)
        for (run, split), rows in table[table["metric"] == metric].groupby(["run", "split"], sort=False)
    ]
    lines.sort(key=lambda line: order[line.run])
    span = _span([line.y for line in lines])
    return Curves(metric, "epoch", "epoch", f"{metric}{' (log scale)' if span else ''}", span, tuple(lines))


def clocked(runs: Runs) -> Iterator[pd.DataFrame]:
    """Yields training and evaluation rows with ``split`` and all clocks."""
    train, evaluation = runs.tables["train"], runs.tables["eval"]
    with_samples = evaluation.assign(samples=samples_at(train, evaluation))
    for table in (train.assign(split="train"), with_samples):
        yield table.assign(charged_s=clocks.charged_time(runs, table))


def samples_at(train: pd.DataFrame, evaluation: pd.DataFrame) -> pd.Series:
    """Returns the training samples used at each evaluation, from the training rows around its step.

    Between two rows samples grow evenly with steps. Before the first row they are 0 at step 0; where a run
    has no training row they are NaN.

    Returns:
        Aligned with ``evaluation``.
    """
    found = pd.Series(np.nan, index=evaluation.index)
    training = dict(iter(train.groupby("run", sort=False)))
    for run, rows in evaluation.groupby("run", sort=False):
        if run in training:
            steps, samples = (np.r_[0.0, training[run][name].to_numpy(float)] for name in ("step", "samples"))
            found[rows.index] = np.interp(rows["step"].to_numpy(float), steps, samples)
    return found


def _clock_axis(tables: Sequence[pd.DataFrame], clock: Clock) -> tuple[str, float]:
    if clock not in ("train_s", "charged_s"):
        return _CLOCKS[clock], 1.0
    longest = max((float(table[clock].max()) for table in tables if table[clock].notna().any()), default=0.0)
    word, size = unit(longest, TIME_UNITS)
    return f"{_CLOCKS[clock]} ({word})", size


def _span(values: Sequence[Floats]) -> float:
    return decades(np.concatenate(values)) if values else 0.0


def _line(run: Any, split: Any, x: Floats, y: Floats, points: int) -> Curve:
    keep = kept_points(y, points)
    return Curve(str(run), str(split), x[keep], y[keep])


def figure(data: Curves, runs: Runs) -> go.Figure:
    """Returns the drawing of `curves`: test solid, validation dashed, training dotted, thin and below.

    Each trace carries ``meta = {"run": position of the run, "split": name}`` for programs, and belongs to the
    legend group of its run. With more than `MANY` runs the training curves start hidden. Without any curve
    the figure says so.
    """
    if not data.lines:
        return empty()
    position = {run.name: place for place, run in enumerate(runs.records)}
    drawing = go.Figure(layout=_layout(data))
    is_crowded = len(runs.records) > MANY
    drawing.add_traces([_trace(line, position[line.run], data, is_crowded=is_crowded) for line in data.lines])
    return drawing


def _trace(line: Curve, position: int, data: Curves, *, is_crowded: bool) -> go.Scatter:
    look, is_train = style(position), line.split == "train"
    return go.Scatter(
        x=line.x,
        y=line.y,
        name=f"{plain(line.run)}, {plain(line.split)}",
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
        hovertemplate=_hover(data.metric, data.clock, data.x_title),
    )


def _hover(metric: str, clock: Clock, x_title: str) -> str:
    x = {"epoch": "epoch %{x:.4~g}", "samples": "%{x:.4~s} samples"}.get(clock, f"{x_title}: %{{x:.4~g}}")
    y = "accuracy %{y:.2%}" if metric == "accuracy" else f"{metric} %{{y:.4~g}}"
    return f"<b>%{{fullData.name}}</b><br>{y}<br>{x}<extra></extra>"


def _layout(data: Curves) -> go.Layout:
    # Of runs and groups the page has one key for all figures, so these have no legend.
    return layout(
        axis(data.x_title, rangemode="tozero"),
        axis(data.y_title, decades=data.decades, tickformat=".2~%" if data.metric == "accuracy" else ".3~g"),
        has_legend=False,
    )


def bands(
    runs: Runs,
    groups: Sequence[Group],
    metric: Metric,
    clock: Clock,
    *,
    generator: np.random.Generator,
    split: str = "test",
) -> list[Band]:
    """Returns the mean of each group's runs, with a bootstrap interval over the runs.

    Runs are compared at common readings of the clock: those of the run with most rows, thinned to
    `BAND_POINTS`, as far as the shortest run went; between its rows a run's curve is a straight line. A run
    with a value that is not finite makes the mean not finite there: what diverged is not left out.

    Args:
        runs: with the tables ``train`` and ``eval``.
        groups: the runs that belong together.
        metric: what is averaged.
        clock: against what; ``train_s`` in seconds.
        generator: draws the resamples.
        split: ``train``, or a split evaluated.

    Returns:
        One band per group that has rows, in the order of the groups.
    """
    by_run = {
        str(run): rows
        for table in clocked(runs)
        for run, rows in table[(table["split"] == split) & table[clock].notna()].groupby("run", sort=False)
    }
    found = []
    for group in groups:
        members = [by_run[run] for run in group.runs if run in by_run]
        if members:
            x, values = _common(
                [(each[clock].to_numpy(float), each[metric].to_numpy(float)) for each in members]
            )
            mean, low, high = bootstrap_band(values, generator=generator)
            found.append(Band(group.name, split, x, mean, low, high, len(members)))
    return found


def _common(curves: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Returns common clock readings, and the values of all curves there with shape (curves, readings)."""
    begin, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    finest = max((x for x, _ in curves), key=len)
    inside = finest[(finest >= begin) & (finest <= end)]
    grid = np.unique(np.r_[begin, inside, end]) if begin <= end else np.array([])
    if len(grid) > BAND_POINTS:
        grid = grid[np.linspace(0, len(grid) - 1, BAND_POINTS).round().astype(int)]
    return grid, np.array([np.interp(grid, x, y) for x, y in curves])


def band_figure(found: Sequence[Band], metric: Metric, clock: Clock) -> go.Figure:
    """Returns the drawing of `bands`: a line per group, and its interval as an area of the same color.

    Each trace carries ``meta = {"group": position, "split": name}``; the area's ends are traces of their own.
    """
    if not found:
        return empty()
    title, size = _clock_axis([pd.DataFrame({clock: band.x}) for band in found], clock)
    span = _span([band.mean for band in found]) if metric == "loss" else 0.0
    data = Curves(metric, clock, title, f"mean {metric}{' (log scale)' if span else ''}", span, ())
    drawing = go.Figure(layout=_layout(data))
    names = list(dict.fromkeys(band.group for band in found))
    for band in found:
        drawing.add_traces(list(_band_traces(band, names.index(band.group), data, size)))
    return drawing


def _band_traces(band: Band, position: int, data: Curves, size: float) -> Iterator[go.Scatter]:
    common = {"x": band.x / size, "legendgroup": band.group, "meta": {"group": position, "split": band.split}}
    if band.n > 1:
        edge = {**common, "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        name = plain(band.group)
        yield go.Scatter(y=band.low, name=f"{name}, lower end", **edge)
        yield go.Scatter(
            y=band.high, name=f"{name}, upper end", fill="tonexty", fillcolor=faint(position), **edge
        )
    look = style(position)
    yield go.Scatter(
        y=band.mean,
        name=f"{plain(band.group)} ({band.n} run{'s' if band.n > 1 else ''})",
        mode="lines+markers" if len(band.x) <= 30 else "lines",
        line={"color": look.color, "width": 2, "dash": _DASHES.get(band.split, "dashdot")},
        marker={"symbol": look.symbol, "size": 6},
        hovertemplate=_hover(data.metric, data.clock, data.x_title),
        **common,
    )
