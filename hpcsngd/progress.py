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
        parts.append(f"accuracy {state.accuracy:.4f}")
    return ", ".join(parts)


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
            bar.update(task, description=state.state, completed=done, facts=_facts(state, epochs))

        yield update
