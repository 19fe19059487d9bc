"""Where time, bytes and memory go: by phase, by number of ranks, by rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hpcsngd_analysis.drawing import BYTE_UNITS, SHORT_TIME_UNITS, unit
from hpcsngd_analysis.groups import Group
from hpcsngd_analysis.load import Runs
from hpcsngd_analysis.series import stacked

# In the order of a step, from the bottom of the bar.
PHASES = (
    "data",
    "forward",
    "backward",
    "capture",
    "gather",
    "reduce",
    "compress",
    "products",
    "factorise",
    "invert",
    "project",
    "broadcast",
    "precondition",
    "observe",
    "update",
)
KINDS: Mapping[str, tuple[str, ...]] = {
    "training": ("data", "forward", "backward", "update"),
    "compute factors": ("capture", "factorise", "compress", "products"),
    "communicate factors": ("gather", "reduce"),
    "compute inverses": ("invert", "project"),
    "communicate inverses": ("broadcast",),
    "precondition": ("precondition",),
    "diagnostics": ("observe",),
}
"""Phases as the K-FAC papers sum them; HyLo's communication is the gather and the broadcast (figure 3)."""

COMMUNICATION = ("gather", "reduce", "broadcast")
TRAINING = ("data", "forward", "backward", "update")


def phase_seconds(
    profiling: pd.DataFrame, groups: Sequence[Group], *, refreshes_only: bool = True
) -> pd.DataFrame:
    """Returns the seconds that each phase takes in a step of each group.

    Of each phase the median over steps, ranks and runs, as HyLo's figure 7 takes it: one slow step says
    little. A median over all steps would hide what happens at refreshes alone, so those are chosen first.

    Args:
        profiling: the table.
        groups: what becomes a column.
        refreshes_only: count steps that recomputed curvature, where a group has any; else the other steps.

    Returns:
        Index: phases in the order of a step, unknown ones last; one column per group that has rows; a phase
        that a group does not have is NaN.
    """
    columns = {}
    for group in groups:
        rows = profiling[profiling["run"].isin(group.runs)]
        chosen = rows[rows["refresh"].eq(1) == refreshes_only]
        if refreshes_only and chosen.empty:
            chosen = rows  # a method without curvature has no refresh: all its steps are alike
        if len(chosen):
            columns[group.name] = chosen.groupby("phase")["seconds"].median()
    found = pd.DataFrame(columns)
    order = {phase: place for place, phase in enumerate(PHASES)}
    return found.loc[sorted(found.index, key=lambda phase: (order.get(phase, len(order)), phase))]


def by_kind(seconds: pd.DataFrame) -> pd.DataFrame:
    """Returns phases summed to `KINDS`; a phase of no kind keeps its name.

    Args:
        seconds: of `phase_seconds`.
    """
    kind_of = {phase: kind for kind, phases in KINDS.items() for phase in phases}
    kinds = [kind_of.get(str(phase), str(phase)) for phase in seconds.index]
    return seconds.groupby(kinds, sort=False).sum(min_count=1)


def time_figure(seconds: pd.DataFrame) -> go.Figure:
    """Returns stacked bars of seconds, in the unit that suits the highest bar."""
    word, size = unit(float(seconds.sum().max()) if seconds.size else 0.0, SHORT_TIME_UNITS)
    order = PHASES if set(PHASES) & set(seconds.index) else ()
    return stacked(seconds / size, f"{word} per step", order)


def computation_and_communication(profiling: pd.DataFrame, runs: Runs, groups: Sequence[Group]) -> pd.DataFrame:
    """Returns, for each family of runs and number of ranks, the preconditioner's time in a refresh (HyLo, figure 3).

    Args:
        profiling: the table.
        runs: for the number of ranks.
        groups: families: runs that differ in ranks, batch size or seed alone.

    Returns:
        Columns ``family``, ``ranks``, ``computation`` and ``communication`` (s): sums of the medians of the
        phases; ordered by family and ranks.
    """
    ranks = runs.runs.set_index("run")["world_size"]
    rows = []
    for group in groups:
        for size in sorted({int(ranks[run]) for run in group.runs if pd.notna(ranks[run])}):
            part = Group(group.name, tuple(run for run in group.runs if ranks[run] == size))
            seconds = phase_seconds(profiling, [part])
            own = seconds.drop(index=[*TRAINING, "observe"], errors="ignore")
            if own.size:
                waits = own.index.isin(COMMUNICATION)
                rows.append((group.name, size, float(own[~waits].sum().sum()), float(own[waits].sum().sum())))
    return pd.DataFrame(rows, columns=["family", "ranks", "computation", "communication"])


def ranks_figure(found: pd.DataFrame) -> go.Figure:
    """Returns the drawing of `computation_and_communication`: a bar per family and number of ranks."""
    bars = found[["computation", "communication"]].T
    bars.columns = [f"{row.family}, {row.ranks} rank{'s' if row.ranks > 1 else ''}" for row in found.itertuples()]
    return time_figure(bars if len(found) else pd.DataFrame())


def bytes_per_refresh(communication: pd.DataFrame, groups: Sequence[Group]) -> pd.DataFrame:
    """Returns the bytes that one rank hands to collectives in a step that has any, by phase.

    Returns:
        Index: phase; columns: groups that have rows; the median over those steps and runs, in bytes.
    """
    return _bytes(communication, groups, "phase")


def held_bytes(memory: pd.DataFrame, groups: Sequence[Group]) -> pd.DataFrame:
    """Returns the bytes that the preconditioner holds on rank 0 after a refresh, by kind.

    Returns:
        Index: kind; columns: groups that have rows; the median over steps and runs, in bytes.
    """
    return _bytes(memory, groups, "kind")


def _bytes(table: pd.DataFrame, groups: Sequence[Group], key: str) -> pd.DataFrame:
    columns = {}
    for group in groups:
        rows = table[table["run"].isin(group.runs)]
        if len(rows):
            in_step = rows.groupby(["run", "step", key], sort=False)["size_bytes"].sum()
            columns[group.name] = in_step.groupby(key, sort=False).median()
    return pd.DataFrame(columns, dtype=float)


def bytes_figure(found: pd.DataFrame, what: str = "") -> go.Figure:
    """Returns stacked bars of bytes, in the unit that suits the longest bar, followed by ``what``."""
    word, size = unit(float(found.sum().max()) if found.size else 0.0, BYTE_UNITS)
    return stacked(found / size, f"{word}{what}")


def rank_seconds(profiling: pd.DataFrame) -> pd.DataFrame:
    """Returns how long each rank worked in a step, without the phases in which it waits for others.

    Returns:
        Columns ``run``, ``rank``, ``seconds``: the median over steps of the sum over the phases `PHASES` that
        are not collectives. DistributedDataParallel's exchange is inside ``backward`` and cannot be told apart.
    """
    own = profiling[~profiling["phase"].isin(COMMUNICATION)]
    steps = own.groupby(["run", "rank", "step"], sort=False)["seconds"].sum()
    found = steps.groupby(["run", "rank"], sort=False).median().reset_index()
    return found.astype({"seconds": np.float64})
