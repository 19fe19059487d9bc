"""Who reaches the target, when, and is one method better: the numbers and their drawings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hpcsngd_analysis.compare import Verdict
from hpcsngd_analysis.drawing import Floats, axis, empty, layout, plain, style, unit, wrapped
from hpcsngd_analysis.groups import Group
from hpcsngd_analysis.load import NO_STATUS, Run, Runs
from hpcsngd_analysis.profiles import LARGEST_RATIO, Profile


@dataclass(frozen=True)
class Arrivals:
    """When a group's runs reached the target: a step curve that knows of runs not watched to the end.

    Attributes:
        group: name.
        time: rising times (s) at which a run arrived, after a first 0.
        share: estimated share of runs that have arrived by then.
        censored: times at which runs ended without arriving.
    """

    group: str
    time: Floats
    share: Floats
    censored: Floats


def arrivals(reached: pd.DataFrame, group: Group) -> Arrivals:
    """Returns one minus the product-limit estimate of Kaplan and Meier (1958, equation 2b) for a group.

    A run that ended without arriving counts among those that might have until its end, and is left out after.

    Args:
        reached: of `stats.time_to_target`.
        group: its runs.
    """
    own = reached[reached.index.isin(group.runs)]
    seconds, arrived = own["train_s"].to_numpy(float), own["reached"].to_numpy(bool)
    times, left, remaining = [0.0], [1.0], 1.0
    for time in np.unique(seconds[arrived]):
        at_risk = int((seconds >= time).sum())
        remaining *= 1 - int((seconds[arrived] == time).sum()) / at_risk
        times.append(float(time))
        left.append(remaining)
    return Arrivals(group.name, np.array(times), 1 - np.array(left), np.sort(seconds[~arrived]))


def arrivals_figure(found: Sequence[Arrivals]) -> go.Figure:
    """Returns the drawing of `arrivals`: steps, and a cross at the end of each run that did not arrive."""
    if not found:
        return empty()
    ends = [max([*each.time, *each.censored]) for each in found]
    word, size = unit(max(ends))
    drawing = go.Figure(
        layout=layout(
            axis(f"training time ({word})", rangemode="tozero"),
            axis("runs that reached the target", tickformat=".0%", range=[-0.03, 1.03]),
            has_legend=False,
        )
    )
    for place, each in enumerate(found):
        look, meta = style(place), {"group": place}
        drawing.add_trace(
            go.Scatter(
                x=np.append(each.time, max(ends)) / size,
                y=np.append(each.share, each.share[-1]),
                name=plain(each.group),
                mode="lines",
                line={"color": look.color, "width": 2, "shape": "hv"},
                meta=meta,
                hovertemplate="<b>%{fullData.name}</b><br>%{y:.0%} by %{x:.4~g}<extra></extra>",
            )
        )
        if len(each.censored):
            places = np.searchsorted(each.time, each.censored, side="right") - 1
            drawing.add_trace(
                go.Scatter(
                    x=each.censored / size,
                    y=each.share[places],
                    name=f"{plain(each.group)}, ended without",
                    mode="markers",
                    marker={
                        "symbol": "cross-thin-open",
                        "size": 10,
                        "color": look.color,
                        "line": {"width": 2},
                    },
                    meta=meta,
                )
            )
    return drawing


def target_rows(reached: pd.DataFrame, groups: Sequence[Group]) -> list[dict[str, object]]:
    """Returns, for each group, how many runs reached the target and the median of when.

    A run that did not counts as infinitely late, as AlgoPerf counts it, so that it moves the median
    instead of leaving it: with half of the runs or more missing there is none.
    """
    rows = []
    for group in groups:
        own = reached[reached.index.isin(group.runs)]
        late = {name: own[name].where(own["reached"], math.inf).median() for name in ("epochs", "train_s")}
        rows.append(
            {
                "group": group.name,
                "runs": len(own),
                "reached": int(own["reached"].sum()),
                "censored": int((~own["reached"]).sum()),
                "epochs": _or_none(late["epochs"]),
                "train_s": _or_none(late["train_s"]),
            }
        )
    return rows


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def problem_times(runs: Runs, groups: Sequence[Group], reached: pd.DataFrame) -> pd.DataFrame:
    """Returns the times that performance profiles are made of.

    A problem is a data set, a model and a seed; a method is a group, or with several data sets or models the
    preconditioner's and optimizer's names. Several runs of one method on one problem count by their median.

    Args:
        runs: for what each run solved.
        groups: methods, where all runs solve one problem.
        reached: of `stats.time_to_target`, a row for every run. A run that may still arrive does not count.

    Returns:
        One row per problem, one column per method; infinity where the target was not reached, NaN where the
        method was not tried.
    """
    workloads = {run.name: _workload(run) for run in runs.records}
    group_of = {name: group.name for group in groups for name in group.runs}
    is_one = len(set(workloads.values())) == 1
    rows = [
        (
            f"{workloads[run.name]}, seed {run.config['experiment'].get('seed')}",
            group_of[run.name] if is_one else _method(run),
            float(reached["train_s"][run.name]) if reached["reached"][run.name] else math.inf,
        )
        for run in runs.records
        if reached["reached"][run.name] or run.state not in (NO_STATUS, "cancelled")
    ]
    table = pd.DataFrame(rows, columns=["problem", "method", "time"])
    wide = table.pivot_table(index="problem", columns="method", values="time", aggfunc="median", sort=False)
    return wide[list(dict.fromkeys(table["method"]))]


def _workload(run: Run) -> str:
    experiment = run.config["experiment"]
    names = [(experiment.get(part) or {}).get("name") for part in ("data", "model")]
    return " ".join(str(name) for name in names if name) or run.experiment


def _method(run: Run) -> str:
    experiment = run.config["experiment"]
    preconditioner = experiment.get("preconditioner") or {}
    optimizer = (experiment.get("optimizer") or {}).get("name")
    names = (preconditioner.get("name"), preconditioner.get("method"), optimizer)
    return " ".join(str(name) for name in names if name) or run.experiment


def profile_figure(found: Sequence[Profile]) -> go.Figure:
    """Returns the drawing of performance profiles, up to the factor at which AlgoPerf's score ends."""
    if not found:
        return empty()
    drawing = go.Figure(
        layout=layout(
            axis("times the fastest", range=[1, LARGEST_RATIO]),
            axis("problems solved", tickformat=".0%", range=[-0.03, 1.03]),
        )
    )
    for place, each in enumerate(found):
        look = style(place)
        drawing.add_trace(
            go.Scatter(
                x=np.append(each.ratio, max(LARGEST_RATIO, each.ratio[-1])),
                y=np.append(each.share, each.share[-1]),
                name=f"{plain(each.method)} ({each.score:.2f})",
                mode="lines",
                line={"color": look.color, "width": 2, "shape": "hv"},
                hovertemplate="<b>%{fullData.name}</b><br>%{y:.0%} within %{x:.3~g} times<extra></extra>",
            )
        )
    return drawing


def verdict_figure(found: Mapping[str, Verdict], x_title: str, nothing: float) -> go.Figure:
    """Returns the estimates of verdicts with their intervals, and a line where there is no difference.

    Args:
        found: name -> verdict; those without an estimate are left out.
        x_title: what is estimated.
        nothing: the estimate that means no difference: 0 of differences, 1 of ratios.
    """
    shown = {name: verdict for name, verdict in found.items() if math.isfinite(verdict.estimate)}
    if not shown:
        return empty()
    drawing = go.Figure(
        layout=layout(
            axis(x_title, tickformat=".3~g"),
            axis("", type="category", autorange="reversed", gridcolor="white", tickfont={"size": 11}),
            has_legend=False,
        )
    )
    estimates = np.array([verdict.estimate for verdict in shown.values()])
    drawing.add_trace(
        go.Scatter(
            x=estimates,
            y=[wrapped(name) for name in shown],
            error_x={
                "array": np.array([verdict.high for verdict in shown.values()]) - estimates,
                "arrayminus": estimates - np.array([verdict.low for verdict in shown.values()]),
            },
            name="estimate",
            mode="markers",
            marker={"size": 9, "color": style(0).color},
            text=[verdict.word for verdict in shown.values()],
            hovertemplate="<b>%{y}</b><br>%{x:.4~g}: %{text}<extra></extra>",
        )
    )
    drawing.add_vline(x=nothing, name="no difference", line={"color": "#555", "dash": "dash", "width": 1})
    return drawing
