"""What settings reached with equally many samples, and in equal training time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import get_args

from hpcsngd_analysis import comparison_figures as figures
from hpcsngd_analysis import stats, text
from hpcsngd_analysis.budgets import Budget, Clock, at_budget, compare_at
from hpcsngd_analysis.compare import Verdict
from hpcsngd_analysis.groups import Group, named
from hpcsngd_analysis.panels import Column, Grid, Panel, Section, bars_panel
from hpcsngd_analysis.sections.context import Context

_WORDS: dict[Clock, str] = {"samples": "samples", "train_s": "training time"}
_COLUMNS = (
    Column("group", "setting", "name"),
    Column("n", "runs", "whole"),
    Column("mean", "mean accuracy", "share"),
    Column("low", "from", "share"),
    Column("high", "to", "share"),
)
_AGAINST = (
    Column("difference", "less the baseline", "number"),
    Column("difference_low", "from", "number"),
    Column("difference_high", "to", "number"),
    Column("verdict", "better?"),
)
_NOTE = (
    "The budget is the largest that all completed runs have used. Samples count each time that one was "
    "computed on: a line search evaluates its batch several times. Accuracy is interpolated between "
    "evaluations; a run that was first evaluated later has none. Intervals: 95 %, Student's t, of the paired "
    "differences where a baseline is compared with. Time also depends on ranks and on what else "
    "the machine did."
)


def budgets(context: Context) -> Section | None:
    """Returns the accuracy of each group at equal samples and time; None with fewer than two groups."""
    found = {clock: at_budget(context.runs, clock) for clock in get_args(Clock)}
    known = {clock: budget for clock, budget in found.items() if math.isfinite(budget.amount)}
    if len(context.groups) < 2 or not known:
        return None
    baseline = None
    if context.options.baseline:
        baseline = named(context.groups, context.runs, context.options.baseline)
    grids: list[Grid] = []
    panels: list[Panel] = []
    words: list[str] = []
    for clock, budget in known.items():
        verdicts = _verdicts(context, budget, baseline)
        title = f"At {_amount(budget)}"
        rows = tuple(
            _row(budget, group) | (_against(verdicts.get(group.name)) if baseline else {})
            for group in context.groups
        )
        columns = (*_COLUMNS, *(_AGAINST if baseline else ()))
        grids.append(Grid(f"budget-{clock}", title, columns, rows))
        panels += _panels(budget, verdicts, baseline)
        words += list(_sentences(budget, verdicts, baseline))
    return Section("budgets", "Equal samples, equal time", tuple(words), tuple(grids), tuple(panels), _NOTE)


def _verdicts(context: Context, budget: Budget, baseline: Group | None) -> dict[str, Verdict]:
    if baseline is None:
        return {}
    others = [group for group in context.groups if group is not baseline]
    return {group.name: compare_at(budget, context.runs, group.runs, baseline.runs) for group in others}


def _row(budget: Budget, group: Group) -> dict[str, object]:
    values = budget.accuracy.reindex(list(group.runs)).dropna().tolist()
    mean = stats.mean_interval(values) if values else stats.Interval(math.nan, math.nan, math.nan, 0)
    numbers = {name: _or_none(getattr(mean, name)) for name in ("mean", "low", "high")}
    return {"group": group.name, "n": len(values), **numbers}


def _against(verdict: Verdict | None) -> dict[str, object]:
    """Returns the cells that compare with the baseline; empty ones for the baseline itself."""
    if verdict is None:
        return {"difference": None, "difference_low": None, "difference_high": None, "verdict": "baseline"}
    return {
        "difference": _or_none(verdict.estimate),
        "difference_low": _or_none(verdict.low),
        "difference_high": _or_none(verdict.high),
        "verdict": verdict.word,
    }


def _panels(budget: Budget, verdicts: Mapping[str, Verdict], baseline: Group | None) -> Iterator[Panel]:
    if baseline is not None:
        title = f"Accuracy minus that of {baseline.name} at equal {_WORDS[budget.clock]}"
        yield bars_panel(
            f"budget-{budget.clock}", title, figures.verdict_figure(verdicts, "difference of shares", 0.0)
        )


def _sentences(budget: Budget, verdicts: Mapping[str, Verdict], baseline: Group | None) -> Iterator[str]:
    for name, verdict in verdicts.items():
        if baseline is None or not math.isfinite(verdict.low):
            continue
        claim = f"{name} is better than {baseline.name} at {_amount(budget)}"
        interval = f"{verdict.estimate:+.4f} [{verdict.low:+.4f}, {verdict.high:+.4f}]"
        yield f"{verdict.word.capitalize()}: {claim} (n = {verdict.n}, {interval})."
    refused = {verdict.reason for verdict in verdicts.values() if verdict.word == "refused"}
    if refused:
        yield f"At {_amount(budget)}: refused, as {'; '.join(sorted(refused))}."


def _amount(budget: Budget) -> str:
    if budget.clock == "samples":
        return f"{text.whole(round(budget.amount))} samples"
    return f"{text.seconds(budget.amount)} of training"


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
