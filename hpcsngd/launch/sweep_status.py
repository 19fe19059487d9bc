"""How a sweep is doing: counts by state and one row per cell, as text and as plain data."""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcsngd.config.matrix import shown
from hpcsngd.launch import status
from hpcsngd.launch.status import RunState
from hpcsngd.launch.submit import ENDED_POLLS
from hpcsngd.rundir import RunDir
from hpcsngd.sweepdir import Cell, SweepDir

GOOD = ("completed", "pending", "running")
_ORDER = ("completed", "running", "pending", "failed", "timeout", "preempted", "cancelled", "lost")
_REASON_WIDTH = 100


@dataclass(frozen=True)
class SweepState:
    """A sweep at one moment: its cells in order, each with the state of its run."""

    sweep: SweepDir
    cells: tuple[tuple[Cell, RunState], ...]

    @property
    def counts(self) -> dict[str, int]:
        """Returns state -> number of cells, without states that no cell is in."""
        return _counts(state.state for _, state in self.cells)

    @property
    def has_ended(self) -> bool:
        """Returns whether nothing more will happen to any cell."""
        return all(state.has_ended for _, state in self.cells)

    @property
    def failed(self) -> SweepState:
        """Returns the sweep with those cells alone that ended without completing."""
        chosen = tuple(pair for pair in self.cells if pair[1].state not in GOOD)
        return SweepState(self.sweep, chosen)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: ``sweep``, ``counts`` and ``cells``, each with the keys of `RunState`."""
        return {
            "sweep": str(self.sweep.path),
            "counts": self.counts,
            "cells": [
                {"id": cell.id, "axes": dict(cell.axes), **state.to_json()} for cell, state in self.cells
            ],
        }

    def text(self) -> str:
        """Returns a headline with the counts, and the table."""
        lines = [f"{self.sweep.name}: {_counted(self.counts)}"]
        return "\n".join(lines + (_aligned(_rows(self.cells)) if self.cells else []))


@dataclass(frozen=True)
class Tally:
    """A sweep in brief: state -> number of cells, without states that no cell is in."""

    sweep: SweepDir
    counts: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: ``sweep`` and ``counts``, as in `SweepState.to_json`."""
        return {"sweep": str(self.sweep.path), "counts": self.counts}

    def line(self) -> str:
        """Returns one line, to stand among those of runs."""
        return f"{'sweep':<10} {self.sweep.name}  {_counted(self.counts)}"


def look(sweep: SweepDir) -> SweepState:
    """Returns how a sweep is doing; asks each scheduler once.

    Raises:
        RunDirError: the sweep or a run directory is damaged.
    """
    cells = sweep.cells()
    there = sweep.runs()
    found = dict(zip((run.path for run in there), status.states(there), strict=True))
    record = sweep.record()
    return SweepState(
        sweep, tuple((cell, found.get(cell.run.path) or _unwritten(cell, record)) for cell in cells)
    )


def overview(runs: Sequence[RunDir], sweeps: Sequence[SweepDir]) -> tuple[list[RunState], list[Tally]]:
    """Returns how runs are doing, and sweeps in brief; asks each scheduler once for all of them.

    Raises:
        RunDirError: a run or a sweep is damaged.
    """
    cells = [[cell.run for cell in sweep.cells()] for sweep in sweeps]
    ended = {run.path: status.current(run) for each in cells for run in each}
    words = {path: one.state for path, one in ended.items() if one}
    # of a cell that has ended the state is enough: a thousand run.yaml would take seconds to read
    still_open = [run for sweep in sweeps for run in sweep.runs() if run.path not in words]
    found = status.states([*runs, *still_open])
    words |= {Path(state.run): state.state for state in found[len(runs) :]}
    tallies = [
        Tally(sweep, _counts(words.get(run.path, "lost") for run in each))
        for sweep, each in zip(sweeps, cells, strict=True)
    ]
    return found[: len(runs)], tallies


def wait(
    sweep: SweepDir, *, poll_s: float, on_change: Callable[[SweepState], None] | None = None
) -> SweepState:
    """Waits until every cell has ended.

    Cells whose job is gone without a status count as ended once that has been seen `ENDED_POLLS` times: the
    status may be on its way to us. Ctrl-C raises KeyboardInterrupt and changes nothing.

    Args:
        sweep: the sweep.
        poll_s: seconds between looks.
        on_change: called when a cell has changed its state, and once at the start.
    """
    silent_polls = 0
    before: tuple[str, ...] = ()
    while True:
        # before the look: a status that comes in between would vouch for a state that knew nothing of it
        is_told = all(status.current(cell.run) for cell in sweep.cells())
        state = look(sweep)
        now = tuple(each.state for _, each in state.cells)
        if on_change and now != before:
            on_change(state)
        before = now
        silent_polls = silent_polls + 1 if state.has_ended else 0
        if silent_polls >= ENDED_POLLS or (state.has_ended and is_told):
            return state
        time.sleep(poll_s)


def _unwritten(cell: Cell, record: Mapping[str, Any]) -> RunState:
    """Returns the state of a cell whose run directory was never written."""
    return RunState(
        run=str(cell.run.path),
        name=cell.run.name,
        exp=str(record.get("exp_name", "")),
        site=str(record.get("site_name", "")),
        state="lost",
        reason="it was never submitted: submission was interrupted",
        attempt=1,
        scheduler="",
        job_id="",
        fault_kind="unknown",
    )


def _counts(states: Iterable[str]) -> dict[str, int]:
    found = Counter(states)
    return {name: found[name] for name in [*_ORDER, *sorted(set(found) - set(_ORDER))] if found[name]}


def _counted(counts: Mapping[str, int]) -> str:
    words = ", ".join(f"{count} {state}" for state, count in counts.items()) or "none"
    return f"{sum(counts.values())} cells: {words}"


def _rows(cells: Sequence[tuple[Cell, RunState]]) -> list[list[str]]:
    keys = list(dict.fromkeys(key for cell, _ in cells for key in cell.axes))
    rows = [["cell", *keys, "state", "epoch", "accuracy", "reason"]]
    for cell, state in cells:
        values = [shown(cell.axes[key]) if key in cell.axes else "" for key in keys]
        epoch = "" if state.epoch is None else f"{state.epoch:.1f}/{state.epochs}"
        accuracy = "" if state.accuracy is None else f"{state.accuracy:.4f}"
        reason = textwrap.shorten(state.reason, _REASON_WIDTH, placeholder="...")
        rows.append([cell.run.name, *values, state.state, epoch, accuracy, reason])
    return rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
