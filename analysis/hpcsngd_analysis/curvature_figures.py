"""What second-order methods do: ranks, errors, norms, damping, scale and rotation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hpcsngd_analysis.critical import periods
from hpcsngd_analysis.drawing import Floats, axis, color, decades, empty, layout, plain
from hpcsngd_analysis.groups import Group
from hpcsngd_analysis.series import Box, box, boxes, clock_of

LAYERS = 7
"""Of a deeper net a figure of layers draws this many, evenly spread, the first and the last included."""


def rank_boxes(rank_analysis: pd.DataFrame, groups: Sequence[Group]) -> dict[str, dict[str, Box]]:
    """Returns how the matrix rank of the kernels is distributed over layers and refreshes (HyLo, figure 10).

    Returns:
        Group and share -> samples in the global batch -> distribution of ``low_rank``.
    """
    found: dict[str, dict[str, Box]] = {}
    for group in groups:
        own = rank_analysis[rank_analysis["run"].isin(group.runs)]
        for (share, samples), rows in own.groupby(["share", "samples"]):
            name = f"{group.name}, share {share:g}"
            found.setdefault(name, {})[str(samples)] = box(rows["low_rank"].to_numpy(float))
    return found


def rank_figure(data: dict[str, dict[str, Box]]) -> go.Figure:
    """Returns the drawing of `rank_boxes`."""
    highest = max((each.high for by_batch in data.values() for each in by_batch.values()), default=0)
    return boxes(data, "matrix rank", x_title="samples in the kernel", is_log=highest > 50)


def total_norm(grad_norm: pd.DataFrame) -> pd.DataFrame:
    """Returns the norm of the gradient of all covered layers: columns ``run, step, epoch, norm``."""
    squares = grad_norm.assign(norm=grad_norm["norm"] ** 2)
    summed = squares.groupby(["run", "step", "epoch"], sort=False, dropna=False)["norm"].sum().reset_index()
    return summed.assign(norm=np.sqrt(summed["norm"]))


def some_layers(names: Sequence[str], count: int = LAYERS) -> list[str]:
    """Returns evenly spread layers, the first and the last included; all of them where there are few."""
    if len(names) <= count:
        return list(names)
    places = np.linspace(0, len(names) - 1, count).round().astype(int)
    return [names[place] for place in places]


def critical_epochs(switches: pd.DataFrame) -> list[tuple[float, float]]:
    """Returns the epochs that one hybrid run took for critical: from, to.

    Args:
        switches: rows of one run, ordered by step; the last period ends one epoch after its last decision.
    """
    epochs = [int(epoch) for epoch in switches["epoch"]]
    ends = [*epochs[1:], epochs[-1] + 1]
    critical = [
        epoch
        for method, begin, end in zip(switches["method"], epochs, ends, strict=True)
        if method == "kid"
        for epoch in range(begin, end)
    ]
    return [(float(first), float(end)) for first, end in periods(critical)]


def norm_figure(
    grad_norm: pd.DataFrame, critical: Sequence[tuple[float, float]], lr_drops: Sequence[float] = ()
) -> go.Figure:
    """Returns the gradient norm of some layers of one run, with critical periods shaded (HyLo, figure 11).

    Args:
        grad_norm: rows of one run.
        critical: periods, see `critical_epochs`; drawn as shapes named ``critical``.
        lr_drops: epochs at which the learning rate fell at once; drawn as vertical lines.
    """
    if grad_norm.empty:
        return empty()
    span = decades(grad_norm["norm"].to_numpy(float))
    drawing = go.Figure(
        layout=layout(
            axis(clock_of(grad_norm), rangemode="tozero"),
            axis(f"gradient norm{' (log scale)' if span else ''}", decades=span, tickformat=".3~g"),
        )
    )
    layers = some_layers(list(dict.fromkeys(grad_norm["layer"])))
    drawing.add_traces(list(_layer_lines(grad_norm, layers)))
    for begin, end in critical:
        drawing.add_vrect(
            x0=begin, x1=end, name="critical", fillcolor="#E69F00", opacity=0.22, line_width=0, layer="below"
        )
    for epoch in lr_drops:
        drawing.add_vline(
            x=epoch, name="learning rate falls", line={"color": "#555", "dash": "dash", "width": 1}
        )
    return drawing


def _layer_lines(grad_norm: pd.DataFrame, layers: Sequence[str]) -> Iterator[go.Scatter]:
    clock = clock_of(grad_norm)
    for place, layer in enumerate(layers):
        rows = grad_norm[grad_norm["layer"] == layer]
        yield go.Scatter(
            x=rows[clock].to_numpy(float),
            y=rows["norm"].to_numpy(float),
            name=f"layer {plain(layer)}",
            mode="lines",
            line={"color": color(place), "width": 1.5},
            hovertemplate=f"<b>%{{fullData.name}}</b><br>%{{y:.4~g}}<br>{clock} %{{x:.4~g}}<extra></extra>",
        )


def lr_drops(train: pd.DataFrame, factor: float = 0.5) -> list[float]:
    """Returns the epochs at which the learning rate of one run fell to ``factor`` of itself or less, at once.

    The end of a cosine, where each row is much below the one before, is a slope and no drop.
    """
    lr: Floats = train["lr"].to_numpy(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = lr[1:] / lr[:-1]
    before = np.r_[1.0, ratio[:-1]]
    drops = np.flatnonzero((ratio <= factor) & (before > 0.9)) + 1
    return [float(epoch) for epoch in train["epoch"].to_numpy(float)[drops]]


def eigenvalue_over_damping(rank_analysis: pd.DataFrame) -> pd.DataFrame:
    """Returns ``rank_analysis`` with a column ``strength``: the kernel's top eigenvalue over the damping.

    Below one, damping outweighs all curvature of the layer, and the method is little more than SGD there.
    """
    return rank_analysis.assign(strength=rank_analysis["top_eigenvalue"] / rank_analysis["damping"])


def worker_boxes(staleness: pd.DataFrame, groups: Sequence[Group]) -> dict[str, dict[str, Box]]:
    """Returns how staleness is distributed: group -> worker -> distribution."""
    found: dict[str, dict[str, Box]] = {}
    for group in groups:
        for worker, rows in staleness[staleness["run"].isin(group.runs)].groupby("worker"):
            found.setdefault(group.name, {})[str(worker)] = box(rows["staleness"].to_numpy(float))
    return found


def worker_figure(data: dict[str, dict[str, Box]]) -> go.Figure:
    """Returns the drawing of `worker_boxes`."""
    return boxes(data, "updates", x_title="worker")


def evaluations_per_step(lbfgs: pd.DataFrame) -> pd.DataFrame:
    """Returns ``lbfgs`` with a column ``per_step``: evaluations since the run's last row (NaN in its first).

    The first row of an attempt that resumed counts on from its checkpoint, as the counters do.
    """
    ordered = lbfgs.sort_values(["run", "step"], kind="stable")
    return ordered.assign(per_step=ordered.groupby("run", sort=False)["evaluations"].diff())


def pairs(lbfgs: pd.DataFrame, groups: Sequence[Group]) -> pd.DataFrame:
    """Returns what became of the curvature pairs until the end of each run.

    Returns:
        Index: ``stored as they were``, ``damped and stored``, ``skipped``; columns: groups that have rows;
        the median over runs, in pairs.
    """
    last = lbfgs.sort_values("step", kind="stable").groupby("run", sort=False).last()
    parts = pd.DataFrame(
        {
            "stored as they were": last["kept"] - last["damped"],
            "damped and stored": last["damped"],
            "skipped": last["skipped"],
        }
    )
    found = {group.name: parts[parts.index.isin(group.runs)] for group in groups}
    return pd.DataFrame({name: rows.median() for name, rows in found.items() if len(rows)}, dtype=float)
