"""A run's order of pulls and pushes, read from its staleness.csv, for another run to repeat.

Each row of an asynchronous run says which worker's push made an update, how many updates had been made when
it pulled, and which step it computed. These determine the run: gradients follow from weights and samples.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from hpcsngd import rundir
from hpcsngd.errors import RunDirError
from hpcsngd.rundir import RunDir
from hpcsngd.tables import TABLES
from hpcsngd.train.faults import SettingError
from hpcsngd.train.parameter_server.engine import Event


@dataclass(frozen=True)
class Logged:
    """One update of the run that is repeated.

    Attributes:
        version: after it.
        worker: whose push it was.
        pulled: version that it was computed at.
        work: step of the run's plan, from 0.
    """

    version: int
    worker: int
    pulled: int
    work: int


def read(path: Path) -> list[Logged]:
    """Returns the updates of a run, in order.

    Args:
        path: the run's directory, or its staleness.csv.

    Raises:
        SettingError: no such file, or rows that are not one update each.
    """
    file = RunDir(path).metrics("staleness") if path.is_dir() else path
    try:
        rows = {int(row["step"]): row for row in rundir.read_rows(file, TABLES["staleness"])}
    except (OSError, RunDirError) as error:
        raise SettingError(f"parameter_server.replay: {error}") from error
    if sorted(rows) != list(range(1, len(rows) + 1)):
        raise SettingError(f"parameter_server.replay: {file} lacks some updates")
    return [
        Logged(step, int(row["worker"]), int(row["pulled"]), int(row["work"]))
        for step, row in sorted(rows.items())
    ]


def events(updates: list[Logged], version: int = 0) -> list[Event]:
    """Returns pulls and pushes in an order that leads to the same updates.

    Pulls between the same two updates are put in the order of their pushes: they do not change anything.

    Args:
        updates: of the whole run.
        version: begin after this one.
    """
    pulls: dict[int, list[int]] = defaultdict(list)
    for update in updates:
        pulls[update.pulled].append(update.worker)
    found: list[Event] = []
    for update in updates[version:]:
        found += [("pull", worker) for worker in pulls[update.version - 1]]
        found.append(("push", update.worker))
    return found


def works(updates: list[Logged]) -> dict[int, list[int]]:
    """Returns worker -> the steps that it had, in order."""
    found: dict[int, list[int]] = defaultdict(list)
    for update in updates:
        found[update.worker].append(update.work)
    return dict(found)
