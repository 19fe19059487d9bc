"""What training costs: time by phase and rank, bytes, memory."""

from __future__ import annotations

from hpcsngd_analysis import cost_figures as figures
from hpcsngd_analysis.panels import Section, bars_panel
from hpcsngd_analysis.sections.context import Context


def phases(context: Context) -> Section | None:
    """Returns where the time of a step goes."""
    profiling = context.table("profiling")
    if profiling.empty:
        return None
    refresh = figures.phase_seconds(profiling, context.groups)
    between = figures.phase_seconds(profiling, context.groups, refreshes_only=False)
    panels = (
        bars_panel("phases-refresh", "A step that refreshes curvature, by phase", figures.time_figure(refresh)),
        bars_panel("phases-between", "A step between refreshes, by phase", figures.time_figure(between)),
        bars_panel(
            "phases-kinds",
            "A step that refreshes: computation and communication",
            figures.time_figure(figures.by_kind(refresh)),
            note="Factors: captured rows, Kronecker factors, kernels. Inverses: their inverses or eigenvectors, "
            "and for KID the projection.",
        ),
    )
    note = (
        "Medians over steps, ranks and runs, as in figure 7 of HyLo. A method without curvature has no refresh: all "
        "its steps stand in for one."
    )
    return Section("phases", "Phases of a step", panels=panels, note=note)


def ranks(context: Context) -> Section | None:
    """Returns the preconditioner's time against the number of ranks; None where all runs have as many."""
    profiling = context.table("profiling")
    families = context.families(("ranks", "batch_size"))
    found = figures.computation_and_communication(profiling, context.runs, families)
    if found["ranks"].nunique() < 2:
        return None
    panel = bars_panel("timing-ranks", "A refresh: computation and communication", figures.ranks_figure(found))
    note = (
        "The preconditioner's phases at refreshes, sums of medians, as in figure 3 of HyLo; communication is "
        "gather, reduce and broadcast."
    )
    return Section("ranks", "Timing against ranks", panels=(panel,), note=note)


def sizes(context: Context) -> Section | None:
    """Returns bytes sent and memory held by the preconditioner."""
    sent = figures.bytes_per_refresh(context.table("communication"), context.groups)
    held = figures.held_bytes(context.table("memory"), context.groups)
    if sent.empty and held.empty:
        return None
    panels = (
        bars_panel("bytes-phase", "Bytes sent in a step with exchange, by phase", figures.bytes_figure(sent, " per step")),
        bars_panel("memory-kind", "Memory of the preconditioner, by kind", figures.bytes_figure(held)),
    )
    note = "Medians over steps and runs, of rank 0: what it hands to collectives, and what it holds after the step."
    shown = tuple(panel for panel in panels if not panel.is_empty)
    return Section("bytes", "Bytes and memory", panels=shown, note=note)
