"""Hands runs to trackers, once or again and again until the runs have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pandas as pd

from hpcsngd_analysis.load import load
from hpcsngd_analysis.records import Run
from hpcsngd_analysis.trackers.history import CURVES, before, history, newest


class Tracker(Protocol):
    """Takes the numbers of one run."""

    folder: Path

    def sync(self, run: Run, numbers: pd.DataFrame) -> int:
        """Makes the tracker agree with all numbers so far; returns how many it was given anew."""

    def close(self) -> None:
        """Writes what is left."""


@dataclass
class Exported:
    """What was done for one run.

    Attributes:
        run: its name.
        path: its directory.
        state: how it ended, or that it has not.
        folder: where the tracker's files are.
        step: the newest step exported.
        written: numbers that the tracker was given.
    """

    run: str
    path: Path
    state: str
    folder: Path
    step: int = 0
    written: int = 0


def export(
    paths: Sequence[Path],
    build: Callable[[Run], Tracker],
    *,
    every_s: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Exported]:
    """Exports runs; a second call adds what is new.

    While a run goes on, the rows of its newest step may not all be there yet: live, a step is exported once a
    later one was seen in the round before. Rows are read after that, so that none is missing.

    Args:
        paths: what `hpcsngd_analysis.load.load` takes.
        build: makes the tracker of a run.
        every_s: seconds between rounds, until all runs have ended; None for one round with all there is.
        sleep: waits.

    Raises:
        RunDirError: what the loader raises.
    """
    trackers: dict[Path, Tracker] = {}
    found: dict[Path, Exported] = {}
    seen: dict[Path, int] = {}
    try:
        is_last = every_s is None
        while True:
            runs = load(paths, CURVES)
            for run in runs.records:
                if run.path not in trackers:
                    trackers[run.path] = build(run)
                    found[run.path] = Exported(run.name, run.path, run.state, trackers[run.path].folder)
                numbers = history(runs, run.name)
                ready = before(numbers, None if is_last else seen.get(run.path, 0))
                seen[run.path] = newest(numbers)
                done = found[run.path]
                done.written += trackers[run.path].sync(run, ready)
                done.step, done.state = max(done.step, newest(ready)), run.state
            if is_last or every_s is None:
                return list(found.values())
            # a run may have ended after its rows were read: one more round takes them all
            is_last = all(run.status is not None or run.origin != "run" for run in runs.records)
            if not is_last:
                sleep(every_s)
    finally:
        for tracker in trackers.values():
            tracker.close()
