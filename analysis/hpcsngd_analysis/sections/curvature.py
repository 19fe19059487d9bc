"""What methods do inside: rank, gradient norm and error, damping, staleness, scale, rotation, pairs."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from hpcsngd_analysis import critical, series
from hpcsngd_analysis import curvature_figures as figures
from hpcsngd_analysis.panels import Panel, Section, bars_panel
from hpcsngd_analysis.sections.context import Context, drawn_note

NORMS = 6
"""At most this many runs have their layers' gradient norms drawn, one figure each."""


def low_rank(context: Context) -> Section | None:
    """Returns the matrix rank of the kernels, and how many samples a compressed method kept."""
    table, kept = context.table("rank_analysis"), context.table("kept")
    if table.empty and kept.empty:
        return None
    panels = (
        Panel(
            "rank-distribution",
            "Rank over layers and refreshes",
            figures.rank_figure(figures.rank_boxes(table, context.groups)),
            note="Whiskers reach the lowest and the highest.",
        ),
        Panel(
            "rank-epoch",
            "Rank over time",
            _over_time(context, "rank_analysis", "low_rank", "matrix rank", "share"),
        ),
        Panel(
            "kept-epoch",
            "Samples kept over time",
            _over_time(context, "kept", "kept", "samples kept", "rule", has_zero=True),
        ),
    )
    note = (
        "The rank is the number of singular values that make up a share of their sum, as in figure 10 of "
        "HyLo. "
        f"Lines are medians over layers, areas their range. {drawn_note(context)}"
    ).strip()
    return Section("low-rank", "Matrix rank", panels=panels, note=note)


def gradient_norm(context: Context) -> Section | None:
    """Returns the gradient norm, with the periods that the hybrid took for critical and its switches."""
    table, switches, train = (context.table(name) for name in ("grad_norm", "switches", "train"))
    if table.empty:
        return None
    clock = series.clock_of(table)
    total = series.spreads(figures.total_norm(table), context.members, "norm", x=clock)
    drawn = series.figure(total, "gradient norm", x_title=clock)
    panels = [Panel("gradient-norm", "Norm over all covered layers", drawn)]
    shown = list(dict.fromkeys(table["run"]))
    for place, run in enumerate(shown[:NORMS]):
        own = switches[switches["run"] == run]
        drawing = figures.norm_figure(
            table[table["run"] == run],
            figures.critical_epochs(own) if len(own) else _by_norm(table[table["run"] == run]),
            figures.lr_drops(train[train["run"] == run]),
        )
        panels.append(Panel(f"gradient-norm-{place}", f"Layers of {run}", drawing))
    left = len(shown) - NORMS
    note = (
        "Norms are taken before preconditioning. Shaded: epochs in which the hybrid took training for "
        "critical and used "
        f"KID; of other runs those in which the norm changes by {critical.ETA:.0%} or more from the epoch "
        "before (the rule "
        "of Accordion, Agarwal et al., 2021); dashed: the learning rate fell to half or less at once (HyLo, "
        "figure 11). "
        + (f"Layers of {left} more runs are not drawn. " if left > 0 else "")
        + drawn_note(context)
    ).strip()
    return Section("gradient-norm", "Gradient norm and critical periods", panels=tuple(panels), note=note)


def _by_norm(grad_norm: pd.DataFrame) -> list[tuple[float, float]]:
    found = critical.critical_epochs(grad_norm)
    epochs = sorted(int(epoch) for epoch in found["epoch"][found["is_critical"]])
    return [(float(first), float(end)) for first, end in critical.periods(epochs)]


def gradient_error(context: Context) -> Section | None:
    """Returns how far approximations are from the exact preconditioned gradient."""
    if context.table("grad_error").empty:
        return None
    panels = (
        Panel(
            "gradient-error",
            "Relative error",
            _over_time(context, "grad_error", "relative_error", "relative error", "method"),
        ),
        Panel("gradient-cosine", "Cosine", _over_time(context, "grad_error", "cosine", "cosine", "method")),
    )
    note = (
        "Against the exact method on the same batch, as in figure 12 of HyLo. Lines are medians over layers, "
        "areas "
        f"their range. {drawn_note(context)}"
    ).strip()
    return Section("gradient-error", "Gradient error", panels=panels, note=note)


def damping(context: Context) -> Section | None:
    """Returns the damping, and how the largest eigenvalue compares with it."""
    table = context.table("rank_analysis")
    if table.empty:
        return None
    strength = series.spreads(figures.eigenvalue_over_damping(table), context.members, "strength")
    panels = (
        Panel(
            "damping", "Damping", _over_time(context, "rank_analysis", "damping", "damping", has_zero=True)
        ),
        Panel(
            "strength",
            "Top eigenvalue over damping",
            series.figure(strength, "top eigenvalue / damping"),
            note="Below one, damping outweighs the curvature of the layer.",
        ),
    )
    return Section("damping", "Damping", panels=panels, note=drawn_note(context))


def staleness(context: Context) -> Section | None:
    """Returns how many updates old the parameters were from which a worker's gradient came."""
    table = context.table("staleness")
    if table.empty:
        return None
    panels = (
        Panel(
            "staleness",
            "Staleness over time",
            series.figure(
                series.spreads(table, context.members, "staleness", x="step"),
                "updates",
                x_title="update of the server",
            ),
        ),
        Panel(
            "staleness-worker",
            "By worker",
            figures.worker_figure(figures.worker_boxes(table, context.groups)),
        ),
    )
    note = (
        "Updates that the server made between the moment a worker took the parameters and the moment its "
        "gradient "
        f"was applied. Lines are medians, areas the range. {drawn_note(context)}"
    ).strip()
    return Section("staleness", "Staleness", panels=panels, note=note)


def preconditioning(context: Context) -> Section | None:
    """Returns how far the preconditioner scales and turns the gradient."""
    if context.table("quantify").empty:
        return None
    panels = (
        Panel("scale", "Scale", _over_time(context, "quantify", "norm_ratio", "‖u‖ / ‖g‖")),
        Panel(
            "rotation",
            "Rotation",
            _over_time(context, "quantify", "angle_deg", "angle (degrees)", is_log=False, has_zero=True),
        ),
        Panel(
            "entry-scale",
            "Scale of the median entry",
            _over_time(context, "quantify", "q50", "median |uᵢ / gᵢ|"),
        ),
    )
    note = (
        "g is the gradient, u what the preconditioner makes of it. The angle is the arc cosine of their "
        "cosine. "
        f"{drawn_note(context)}"
    ).strip()
    return Section("preconditioning", "Scale and rotation", panels=panels, note=note)


def lbfgs(context: Context) -> Section | None:
    """Returns the objective, the evaluations that line searches took, and what became of curvature pairs."""
    table = context.table("lbfgs")
    if table.empty:
        return None
    clock = series.clock_of(table)
    objective = _over_time(context, "lbfgs", "objective", "loss")
    spent = series.spreads(figures.evaluations_per_step(table), context.members, "per_step", x=clock)
    became = series.stacked(figures.pairs(table, context.groups), "pairs")
    panels = (
        Panel("lbfgs-objective", "Objective before each step", objective),
        Panel(
            "lbfgs-evaluations",
            "Evaluations per step",
            series.figure(spent, "evaluations", x_title=clock, is_log=False, has_zero=True),
        ),
        bars_panel("lbfgs-pairs", "Curvature pairs", became),
    )
    resets = int(table.groupby("run")["resets"].max().sum())
    note = (
        "An evaluation is loss and gradient of a batch; a step takes some for its line search and may take "
        "more for its pair. A pair is skipped where it has too little curvature, or damped (Powell) where "
        f"that is on. All pairs were forgotten {resets} times in these runs. {drawn_note(context)}"
    ).strip()
    return Section("lbfgs", "L-BFGS", panels=panels, note=note)


def _over_time(
    context: Context, table: str, column: str, title: str, kind: str | None = None, **how: Any
) -> go.Figure:
    clock = series.clock_of(context.table(table))
    found = series.spreads(context.table(table), context.members, column, x=clock, kind=kind)
    return series.figure(found, title, x_title=clock, **how)
