"""Where time, bytes and memory go: by phase, by number of ranks, by rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from hpcsngd_analysis.drawing import BYTE_UNITS, SHORT_TIME_UNITS, axis, layout, plain, style, unit
from hpcsngd_analysis.groups import Group
from hpcsngd_analysis.load import Runs
from hpcsngd_analysis.scaling import efficiency
from hpcsngd_analysis.series import stacked

# In the order of a step, from the bottom of the bar.
PHASES = (
    "data",
    "forward and backward",
    "capture",
    "gather",
    "reduce",
    "compress",
    "products",
    "factorise",
    "kernel",
    "invert",
    "project",
    "broadcast",
    "precondition",
    "observe",
    "update",
)
KINDS: Mapping[str, tuple[str, ...]] = {
    "training": ("data", "forward and backward", "update"),
    "compute factors": ("capture", "factorise", "kernel", "compress", "products"),
    "communicate factors": ("gather", "reduce"),
    "compute inverses": ("invert", "project"),
    "communicate inverses": ("broadcast",),
    "precondition": ("precondition",),
    "diagnostics": ("observe",),
}
"""Phases as the K-FAC papers sum them; HyLo's communication is the gather and the broadcast (figure 3)."""

COMMUNICATION = ("gather", "reduce", "broadcast")
TRAINING = KINDS["training"]


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
        Index: phases in the order of a step, unknown ones last. The hooks' ``capture`` lies within forward
        and backward, which are one phase here, without it, so that all phases are disjoint. One column per
        group that has rows; a phase that a group does not have is NaN.
    """
    columns = {}
    for group in groups:
        rows = profiling[profiling["run"].isin(group.runs)]
        chosen = rows[rows["refresh"].eq(1) == refreshes_only]
        if refreshes_only and chosen.empty:
            chosen = rows  # a method without curvature has no refresh: all its steps are alike
        if len(chosen):
            columns[group.name] = _disjoint(chosen.groupby("phase")["seconds"].median())
    found = pd.DataFrame(columns)
    order = {phase: place for place, phase in enumerate(PHASES)}
    return found.loc[sorted(found.index, key=lambda phase: (order.get(phase, len(order)), phase))]


def _disjoint(seconds: pd.Series) -> pd.Series:
    passes = seconds.reindex(["forward", "backward"]).sum() - seconds.get("capture", 0.0)
    rest = seconds.drop(index=["forward", "backward"], errors="ignore")
    return pd.concat([pd.Series({"forward and backward": max(passes, 0.0)}), rest])


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


def computation_and_communication(
    profiling: pd.DataFrame, runs: Runs, groups: Sequence[Group]
) -> pd.DataFrame:
    """Returns the preconditioner's time in a refresh by family of runs and number of ranks (HyLo, figure 3).

    Args:
        profiling: the table.
        runs: for the number of ranks.
        groups: families: runs that differ in ranks, batch size or seed alone.

    Returns:
        Columns ``family``, ``ranks``, ``computation`` and ``communication`` (s): sums of the medians of the
        phases; ordered by family and ranks.
    """
    ranks = {run.name: run.world_size for run in runs.records}
    rows = []
    for group in groups:
        for size in sorted({known for run in group.runs if (known := ranks[run]) is not None}):
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
    bars.columns = [
        f"{family}, {ranks} rank{'s' if ranks > 1 else ''}"
        for family, ranks in zip(found["family"], found["ranks"], strict=True)
    ]
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


def clock_figure(seconds: pd.DataFrame) -> go.Figure:
    """Returns stacked bars of clocks, in the unit that suits the longest bar."""
    word, size = unit(float(seconds.sum().max()) if seconds.size else 0.0)
    return stacked(seconds / size, word, list(seconds.index))


def step_times(train: pd.DataFrame) -> pd.Series:
    """Returns the training time of one step of each run (s), between its first and its last row."""
    ends = train.groupby("run", sort=False)[["step", "train_s"]].agg(["first", "last"])
    steps = ends["step"]["last"] - ends["step"]["first"]
    seconds = ends["train_s"]["last"] - ends["train_s"]["first"]
    return (seconds / steps.where(steps > 0)).dropna()


def scaling_rows(runs: Runs, families: Callable[[Sequence[str]], Sequence[Group]]) -> pd.DataFrame:
    """Returns strong and weak scaling of every family that has several numbers of ranks.

    Args:
        runs: with the table ``train``.
        families: groups runs by their settings but some, see `groups.groups`.

    Returns:
        Columns ``family``, ``kind`` (strong or weak) and those of `scaling.efficiency`.
    """
    seconds = step_times(runs.tables["train"])
    ranks = {run.name: run.world_size for run in runs.records}
    batch = {run.name: run.config["experiment"].get("batch_size") for run in runs.records}
    strong = [
        (group.name, f"global batch {size}", names)
        for group in families(("ranks", "batch_size"))
        for size, names in _by(group.runs, lambda name: (batch[name] or 0) * (ranks[name] or 0)).items()
        if size
    ]
    weak = [(group.name, "", list(group.runs)) for group in families(("ranks",))]
    parts = []
    for kind, found in (("strong", strong), ("weak", weak)):
        for name, more, members in found:
            times = seconds[seconds.index.isin(members)]
            by_ranks = times.groupby([ranks[str(run)] for run in times.index]).median()
            if len(by_ranks) > 1:
                shares = efficiency(by_ranks, is_weak=kind == "weak").reset_index()
                parts.append(shares.assign(family=", ".join(filter(None, (name, more))), kind=kind))
    columns = ["family", "kind", "ranks", "seconds", "speedup", "efficiency"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _by(names: Sequence[str], key: Callable[[str], int]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return found


def scaling_figure(found: pd.DataFrame) -> go.Figure:
    """Returns efficiency against ranks, a line per family; the dashed line is perfect."""
    drawing = go.Figure(
        layout=layout(
            axis("ranks", type="log", tickvals=sorted(found["ranks"].unique())),
            axis("efficiency", tickformat=".0%", rangemode="tozero"),
        )
    )
    for place, (name, rows) in enumerate(found.groupby("family", sort=False)):
        look = style(place)
        drawing.add_trace(
            go.Scatter(
                x=rows["ranks"].to_numpy(float),
                y=rows["efficiency"].to_numpy(float),
                name=plain(name),
                mode="lines+markers",
                line={"color": look.color, "width": 2},
                marker={"symbol": look.symbol, "size": 8},
                hovertemplate="<b>%{fullData.name}</b><br>%{x} ranks: %{y:.1%}<extra></extra>",
            )
        )
    drawing.add_hline(y=1, name="perfect", line={"color": "#555", "dash": "dash", "width": 1})
    return drawing
