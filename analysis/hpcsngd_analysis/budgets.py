"""What runs had reached when they had used equally much: samples computed on, or training time.

Epochs compare nothing where methods do unequal work in one: a line search evaluates its batch several times.
`samples` of the table ``train`` counts every evaluation, so equal samples are about equal computation on any
machine; equal time also counts what a method does besides, on the machine that it ran on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from hpcsngd_analysis.compare import Verdict, compare_values, repeated_seed, seed_of, unlike_hardware
from hpcsngd_analysis.figures import samples_at
from hpcsngd_analysis.load import Runs

Clock = Literal["samples", "train_s"]


@dataclass(frozen=True)
class Budget:
    """One budget, and what was reached with it.

    Attributes:
        clock: what is equal.
        amount: the largest that all completed runs have used; NaN if none has.
        accuracy: run -> accuracy, a share; NaN for a run that was first evaluated later.
    """

    clock: Clock
    amount: float
    accuracy: pd.Series


def at_budget(runs: Runs, clock: Clock, split: str = "test") -> Budget:
    """Returns the accuracy of completed runs at the largest budget that all of them have used.

    Between two evaluations accuracy is taken to rise linearly, as in `stats.time_to_target`, so that methods
    that are evaluated at other readings of the clock can be compared.

    Args:
        runs: with the tables ``train`` and ``eval``.
        clock: ``samples``, or ``train_s`` (s).
        split: which data: ``test`` or ``validation``.
    """
    evaluation = runs.tables["eval"]
    rows = evaluation.assign(samples=samples_at(runs.tables["train"], evaluation))
    completed = [run.name for run in runs.records if run.state == "completed"]
    rows = rows[(rows["split"] == split) & rows["run"].isin(completed) & rows[clock].notna()]
    curves = {str(run): own for run, own in rows.groupby("run", sort=False)}
    amount = min((float(own[clock].max()) for own in curves.values()), default=float("nan"))
    found = {run: _at(own[clock], own["accuracy"], amount) for run, own in curves.items()}
    return Budget(clock, amount, pd.Series(found, dtype=float))


def _at(clock: pd.Series, accuracy: pd.Series, amount: float) -> float:
    return float(np.interp(amount, clock.to_numpy(float), accuracy.to_numpy(float), left=np.nan))


def compare_at(budget: Budget, runs: Runs, method: Sequence[str], baseline: Sequence[str]) -> Verdict:
    """Returns whether a method's accuracy at a budget is better than a baseline's, in pairs of one seed.

    Times are compared only where the hardware is known and, but for the number of ranks, the same.

    Args:
        budget: of these runs.
        runs: with their records.
        method: names of the method's runs, each with another seed.
        baseline: names of the baseline's runs.
    """
    records = {run.name: run for run in runs.records}
    sides = [[records[name] for name in names] for names in (method, baseline)]
    refusal = next(filter(None, map(repeated_seed, sides)), "")
    if budget.clock == "train_s":
        refusal = refusal or unlike_hardware([*sides[0], *sides[1]], ranks_differ=True)
    if refusal:
        return Verdict("refused", refusal)
    found = (
        {seed_of(run): float(budget.accuracy[run.name]) for run in side if run.name in budget.accuracy.index}
        for side in sides
    )
    return compare_values(*found)
