"""What every section is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from hpcsngd_analysis import series, thin
from hpcsngd_analysis.groups import Group, groups
from hpcsngd_analysis.load import Runs
from hpcsngd_analysis.series import Member

_SEED = 0


@dataclass(frozen=True)
class Options:
    """What a reader asks of a report.

    Attributes:
        target: test accuracy, a share, whose time counts; None: no such comparison.
        baseline: the experiment or group to compare with; empty: none.
        group_by: keys of the configuration that make groups; empty: all settings but the seed.
        sections: ids of the sections wanted, in order; empty: all.
        title: of the page; empty: told from the runs.
        description: a paragraph below the title.
    """

    target: float | None = None
    baseline: str = ""
    group_by: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    title: str = ""
    description: str = ""


@dataclass(frozen=True)
class Context:
    """Loaded runs, how they are grouped, and what was asked for."""

    runs: Runs
    groups: tuple[Group, ...]
    members: tuple[Member, ...]
    options: Options = field(default_factory=Options)

    @property
    def is_crowded(self) -> bool:
        """Whether figures draw groups instead of runs."""
        return len(self.runs.records) > series.LINES

    @property
    def generator(self) -> np.random.Generator:
        """A new generator with a fixed seed, so that the same runs make the same page."""
        return np.random.default_rng(_SEED)

    def table(self, name: str) -> pd.DataFrame:
        """Returns a table; without rows where no run wrote it."""
        return self.runs.tables[name]

    def families(self, without: Sequence[str]) -> tuple[Group, ...]:
        """Returns the runs grouped by their settings but these."""
        return groups(self.runs, without=without)


def context(runs: Runs, options: Options | None = None) -> Context:
    """Returns the context of runs."""
    options = options or Options()
    found = groups(runs, options.group_by)
    return Context(runs, found, series.members(runs, found), options)


def drawn_note(which: Context) -> str:
    """Says that groups are drawn instead of runs, where they are."""
    if not which.is_crowded:
        return ""
    return (
        f"With more than {series.LINES} runs, groups are drawn: the median of a group's rows, and the range "
        "from "
        f"the lowest to the highest. Rows are summed up at no more than {series.POINTS} readings of the "
        "clock."
    )


POINTS_NOTE = (
    f"A curve of more than {thin.POINTS:,} rows is drawn by the lowest and highest value of each interval."
)
