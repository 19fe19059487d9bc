"""What training costs: time by phase and rank, bytes, memory."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from hpcsngd_analysis import cost_figures as figures
from hpcsngd_analysis import series, text
from hpcsngd_analysis.clocks import clocks as clock_table
from hpcsngd_analysis.panels import Column, Grid, Panel, Section, bars_panel, grid_rows
from hpcsngd_analysis.scaling import SLOW
from hpcsngd_analysis.scaling import stragglers as slow_ranks
from hpcsngd_analysis.sections.context import Context


def phases(context: Context) -> Section | None:
    """Returns where the time of a step goes."""
    profiling = context.table("profiling")
    if profiling.empty:
        return None
    refresh = figures.phase_seconds(profiling, context.groups)
    between = figures.phase_seconds(profiling, context.groups, refreshes_only=False)
    panels = (
        bars_panel(
            "phases-refresh", "A step that refreshes curvature, by phase", figures.time_figure(refresh)
        ),
        bars_panel("phases-between", "A step between refreshes, by phase", figures.time_figure(between)),
        bars_panel(
            "phases-kinds",
            "A step that refreshes: computation and communication",
            figures.time_figure(figures.by_kind(refresh)),
            note="Factors: captured rows, Kronecker factors, kernels. Inverses: inverses or "
            "eigenvectors, and for KID the projection.",
        ),
    )
    note = (
        "Medians over steps, ranks and runs, as in figure 7 of HyLo. Capture is work of hooks inside forward "
        "and "
        "backward, and taken out of them. A method without curvature has no refresh: all "
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
    panel = bars_panel(
        "timing-ranks", "A refresh: computation and communication", figures.ranks_figure(found)
    )
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
        bars_panel(
            "bytes-phase",
            "Bytes sent in a step with exchange, by phase",
            figures.bytes_figure(sent, " per step"),
        ),
        bars_panel("memory-kind", "Memory of the preconditioner, by kind", figures.bytes_figure(held)),
    )
    note = (
        "Medians over steps and runs, of rank 0: what it hands to collectives, what it holds after the step."
    )
    return Section("bytes", "Bytes and memory", panels=panels, note=note)


_CLOCK_NAMES = {
    "queue_s": "queue",
    "startup_s": "start-up",
    "train_s": "training",
    "redone_s": "done twice",
    "eval_s": "evaluation",
    "other_s": "other",
}
_CLOCK_COLUMNS = (
    Column("run", "run", "run"),
    *(Column(key, title, "seconds") for key, title in _CLOCK_NAMES.items()),
    Column("charged_s", "charged", "seconds"),
    Column("node_hours", "node-hours", "hours"),
    Column("lost_node_hours", "lost node-hours", "hours"),
    Column("goodput", "goodput", "share"),
    Column("restarts", "restarts", "whole"),
)


def clocks(context: Context) -> Section | None:
    """Returns where the time of runs went over all attempts, and what it cost."""
    found = clock_table(context.runs)
    if found.empty:
        return None
    by_group = {
        group.name: found[found.index.isin(group.runs)][list(_CLOCK_NAMES)].mean().rename(_CLOCK_NAMES)
        for group in context.groups
        if found.index.isin(group.runs).any()
    }
    panel = bars_panel("clocks", "Mean time of a run, by clock", figures.clock_figure(pd.DataFrame(by_group)))
    grid = Grid("clocks", "", _CLOCK_COLUMNS, grid_rows(found.reset_index()))
    note = (
        "Attempts are merged. Queue is not charged; start-up runs from each start to the first training "
        "step; done twice "
        "is training that a later attempt had to repeat; other is checkpoints, waiting and leaving. Goodput "
        "is training "
        "that counts over charged time. – means that a run's files do not say."
    )
    return Section("clocks", "Where time went", tuple(_clock_words(found)), (grid,), (panel,), note)


def _clock_words(found: pd.DataFrame) -> Iterator[str]:
    known = found[found["node_hours"].notna()]
    if len(known):
        charged, trained = known["charged_s"].sum(), known["train_s"].sum()
        share = text.share(float(trained / charged)) if charged else text.share(None)
        yield (
            f"{text.hours(float(known['node_hours'].sum()))} node-hours in all, of which "
            f"{text.hours(float(known['lost_node_hours'].sum()))} went to work done twice; goodput {share}."
        )


_SCALING_COLUMNS = (
    Column("family", "setting", "name"),
    Column("kind", "scaling"),
    Column("ranks", "ranks", "whole"),
    Column("seconds", "time of a step", "number"),
    Column("speedup", "speed-up", "number"),
    Column("efficiency", "efficiency", "share"),
)


def scaling(context: Context) -> Section | None:
    """Returns strong and weak scaling; None where no family of runs has several numbers of ranks."""
    found = figures.scaling_rows(context.runs, context.families)
    if found.empty:
        return None
    panels = tuple(
        Panel(
            f"scaling-{kind}",
            f"{kind.capitalize()} scaling",
            figures.scaling_figure(found[found["kind"] == kind]),
        )
        for kind in ("strong", "weak")
        if (found["kind"] == kind).any()
    )
    note = (
        "Time of a step in seconds, from the training clock between a run's first and last row; the median "
        "over runs. "
        "Strong: the global batch is the same for all numbers of ranks. Weak: the batch of a rank is. "
        "Efficiency "
        "compares with the fewest ranks."
    )
    return Section(
        "scaling", "Scaling", (), (Grid("scaling", "", _SCALING_COLUMNS, grid_rows(found)),), panels, note
    )


_RANK_COLUMNS = (
    Column("run", "run", "run"),
    Column("rank", "rank", "whole"),
    Column("seconds", "seconds of a step", "number"),
    Column("ratio", "times the median rank", "number"),
    Column("slowest", "steps in which it was slowest", "share"),
)


def stragglers(context: Context) -> Section | None:
    """Returns how ranks compare; None where no run with several ranks was profiled."""
    found = slow_ranks(context.table("profiling"))
    if found.empty or found["rank"].nunique() < 2:
        return None
    slow = found[found["is_straggler"]]
    words = (
        f"{len(slow)} of {len(found)} ranks need at least {SLOW:g} times what their run's median rank needs."
        if len(slow)
        else f"No rank needs {SLOW:g} times what the median rank of its run needs.",
    )
    data = series.spreads(found, context.members, "ratio", x="rank")
    panel = Panel(
        "stragglers",
        "Work before the exchange, by rank",
        series.figure(data, "times the median rank", x_title="rank"),
    )
    grids = (Grid("stragglers", "Stragglers", _RANK_COLUMNS, grid_rows(slow)),) if len(slow) else ()
    note = (
        "Medians over steps of data, forward and backward. DDP's exchange lies in backward, so waiting hides "
        "slow ranks."
    )
    return Section("stragglers", "Stragglers", words, grids, (panel,), note)
