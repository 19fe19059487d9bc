"""A rehearsal: set the stage, play the scenes, leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hpcsngd.config import smoke
from hpcsngd.config.resolve import Resolved
from hpcsngd.launch import plan
from hpcsngd.launch.rehearse import cluster as clusters
from hpcsngd.launch.rehearse import scenes as played
from hpcsngd.launch.rehearse import stage
from hpcsngd.launch.rehearse.book import Book
from hpcsngd.launch.rehearse.scenes import Check, Setting


def rehearse(
    resolved: Resolved, folder: Path, *, data_root: str, nodes: int, ranks: int, scenes: Sequence[str]
) -> Iterator[Check]:
    """Yields the checks of a rehearsal as they come.

    Args:
        resolved: what would be submitted.
        folder: for the played cluster and the run directories.
        data_root: folder with the experiment's tiny data set.
        nodes: nodes of the run in small.
        ranks: workers on each of them.
        scenes: which scenes, in order.

    Raises:
        ConfigError: the run in small does not fit the schema.
        PreflightError: the site's own rules refuse the request, or there is no scheduler to be played.
    """
    made = plan.make(resolved, is_dry=True)
    cluster = stage.cluster(resolved, made, nodes)
    tiny = smoke.scaled_down(resolved, data_root)
    small = stage.scaled(tiny, made, run_root=str(folder / "runs"), nodes=nodes, ranks=ranks)
    book = Book(folder / "cluster")
    with _orderly(), _within(clusters.install(book.folder, cluster)):
        try:
            yield from played.play(Setting(resolved, small, cluster, book, folder), scenes)
        finally:
            _clear(book)


@contextlib.contextmanager
def _orderly() -> Iterator[None]:
    """Makes SIGTERM leave as Ctrl-C does, so that the played jobs are ended."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _within(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for a while: the scheduler's commands are found through them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _clear(book: Book) -> None:
    """Ends jobs that a scene has left, such as one that was interrupted."""
    for job in book.jobs():
        if not job.has_ended:
            book.ask(job.key, "kill")
