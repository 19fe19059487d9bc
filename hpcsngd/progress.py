"""Progress of a run that somebody waits for: a bar on a terminal, lines otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hpcsngd.launch.status import RunState

Update = Callable[["RunState"], None]


@contextmanager
def progress(title: str, epochs: int, *, quiet: bool) -> Iterator[Update]:
    """Yields a function that is told each new state of the run.

    Args:
        title: the run's name.
        epochs: how many there will be.
        quiet: show nothing at all.
    """
    if quiet:
        yield lambda state: None
    elif sys.stderr.isatty():
        yield from _bar(title, epochs)
    else:
        yield _Lines(epochs)


class _Lines:
    """One line per change of state and per finished epoch, for logs and pipes; the end is told by others."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._seen: tuple[str, int] = ("", -1)

    def __call__(self, state: RunState) -> None:
        now = (state.state, int(state.epoch or 0))
        if now == self._seen or state.has_ended:
            return
        self._seen = now
        click.echo(f"{state.state}: {_facts(state, self._epochs)}", err=True)


def _facts(state: RunState, epochs: int) -> str:
    parts = [f"epoch {state.epoch or 0.0:.1f}/{epochs}"]
    if state.loss is not None:
        parts.append(f"loss {state.loss:.4f}")
    if state.accuracy is not None:
        parts.append(f"test accuracy {state.accuracy:.4f}")
    return ", ".join(parts)


def _bar(title: str, epochs: int) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(title, total=float(epochs), facts="waiting for the scheduler")

        def update(state: RunState) -> None:
            bar.update(task, completed=state.epoch or 0.0, facts=f"{state.state}: {_facts(state, epochs)}")

        yield update
