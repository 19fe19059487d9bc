"""How runs look while somebody watches: a bar or a table on a terminal, lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from hpcsngd.launch.status import RunState
    from hpcsngd.rundir import RunDir

Update = Callable[["RunState"], None]

_COLORS = {"completed": "green", "running": "cyan", "pending": "yellow"}


def is_terminal() -> bool:
    """Returns whether a person sees what is printed."""
    return sys.stdout.isatty()


@contextmanager
def progress(epochs: int, *, quiet: bool) -> Iterator[Update]:
    """Yields a function that is told each new state of the run.

    Args:
        epochs: how many there will be.
        quiet: show nothing at all.
    """
    if quiet:
        yield lambda state: None
    elif sys.stderr.isatty():
        yield from _bar(epochs)
    else:
        yield _Lines()


def line(state: RunState) -> str:
    """Returns one line about a run."""
    parts = [f"{state.state:<10} {state.name}"]
    if state.epoch is not None:
        parts.append(facts(state))
    if left := time_left(state):
        parts.append(left)
    if state.reason:
        parts.append(state.reason)
    return "  ".join(parts)


def facts(state: RunState) -> str:
    """Returns epoch, loss and accuracy, as far as they are known."""
    parts = [f"epoch {state.epoch or 0.0:.1f}/{state.epochs}"]
    if state.loss is not None:
        parts.append(f"loss {state.loss:.4f}")
    if state.accuracy is not None:
        parts.append(f"accuracy {state.accuracy:.4f}")
    return ", ".join(parts)


def time_left(state: RunState) -> str:
    """Returns how long training will take and whether the attempt's limit comes first; empty if unknown."""
    if state.time_left_s is None:
        return ""
    text = f"{duration(state.time_left_s)} left"
    limit = state.limit_left_s
    if limit is not None and limit < state.time_left_s:
        text += f", the wall time ends in {duration(max(0.0, limit))}"
    return text


def duration(seconds: float) -> str:
    """Returns a length of time for people, in its two largest units."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def watch(runs: Sequence[RunDir], *, quiet: bool) -> list[RunState]:
    """Shows runs until all have ended; returns their last states.

    The scheduler is asked once for all of them and as often as the slowest site allows. Runs whose job is
    gone without a status count as ended once that has been seen `ENDED_POLLS` times, as for ``--wait``.

    Args:
        runs: the runs; at least one.
        quiet: show nothing, only wait.
    """
    pause_s = max(float(run.record()["config"]["site"]["scheduler"]["poll_s"]) for run in runs)
    if quiet:
        return _look(runs, pause_s, lambda found: None)
    if is_terminal():
        return _watch_table(runs, pause_s)
    seen: dict[str, tuple[str, int]] = {}

    def tell(found: list[RunState]) -> None:
        for state in found:
            now = (state.state, int(state.epoch or 0))
            if seen.get(state.run) != now and not state.has_ended:
                click.echo(line(state))
            seen[state.run] = now

    return _look(runs, pause_s, tell)


def _look(runs: Sequence[RunDir], pause_s: float, show: Callable[[list[RunState]], None]) -> list[RunState]:
    from hpcsngd.launch import status
    from hpcsngd.launch.submit import ENDED_POLLS

    silent_looks = 0
    while True:
        is_told = all(status.current(run) for run in runs)  # before the states, which must know of it
        found = status.states(runs)
        show(found)
        silent_looks = silent_looks + 1 if all(state.has_ended for state in found) else 0
        if silent_looks >= ENDED_POLLS or (silent_looks and is_told):
            return found
        time.sleep(pause_s)


def _watch_table(runs: Sequence[RunDir], pause_s: float) -> list[RunState]:
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        return _look(runs, pause_s, lambda found: live.update(table(found), refresh=True))


def table(found: Sequence[RunState]) -> Table:
    """Returns a table of runs with a progress bar each, for a terminal."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    shown = Table("state", "run", "progress", "", "time", box=None, pad_edge=False)
    for state in found:
        color = _COLORS.get(state.state, "red")
        bar = ProgressBar(total=float(state.epochs or 1), completed=state.epoch or 0.0, width=20)
        # Text, because a run's reason may hold what rich would take for markup
        words = Text(facts(state) if state.epoch is not None else "")
        shown.add_row(
            Text(state.state, style=color),
            Text(state.name),
            bar,
            words,
            Text(time_left(state) or state.reason),
        )
    return shown


class _Lines:
    """One line per change of state and per finished epoch, for logs and pipes; the end is told by others."""

    def __init__(self) -> None:
        self._seen: tuple[str, int] = ("", -1)

    def __call__(self, state: RunState) -> None:
        now = (state.state, int(state.epoch or 0))
        if now == self._seen or state.has_ended:
            return
        self._seen = now
        why = f" ({state.reason})" if state.reason else ""
        click.echo(f"{state.state}: {facts(state)}{why}", err=True)


def _bar(epochs: int) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), expand=True) as bar:
        task = bar.add_task("submitted", total=float(epochs), facts="")

        def update(state: RunState) -> None:
            done = state.epoch or 0.0
            bar.update(task, description=state.state, completed=done, facts=facts(state))

        yield update
