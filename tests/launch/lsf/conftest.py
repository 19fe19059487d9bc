"""A played LSF for each test: real commands in PATH, real processes, nothing left afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcsngd.launch.lsf import plugin, watching
from hpcsngd.launch.rehearse import cluster, life
from hpcsngd.launch.rehearse.book import Book
from hpcsngd.launch.rehearse.cluster import Cluster

LAUNCHERS = {"ibm": "blaunch", "compatible": "lsrun", "csm": "jsrun"}

Play = Callable[..., Book]


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s:g} s"
        time.sleep(0.1)


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    """Returns a function that puts a played LSF in PATH and returns its book of jobs."""
    books: list[Book] = []

    def make(flavor: Any = "ibm", **more: Any) -> Book:
        settings: dict[str, Any] = {
            "hosts": ("c1", "c2", "c3"),
            "launchers": (LAUNCHERS[flavor],),
            "batch_host": "batch1" if flavor == "csm" else "",
            "grace_s": 1.0,
        }
        played = Cluster("lsf", flavor=flavor, **{**settings, **more})
        for name, value in cluster.install(tmp_path / "cluster", played).items():
            monkeypatch.setenv(name, value)
        # both remember what belongs to another test's cluster
        monkeypatch.setattr(watching.LsfJob, "watcher", watching.LsfWatcher(delay_s=2))
        plugin.array_limit.cache_clear()
        books.append(Book(tmp_path / "cluster"))
        return books[-1]

    yield make
    for book in books:
        for job in book.jobs():
            if not job.has_ended:
                book.ask(job.key, "kill")
        wait_until(lambda book=book: all(job.has_ended for job in book.jobs()), "the end of all jobs")
    plugin.array_limit.cache_clear()


def left_over(book: Book) -> list[int]:
    """Returns the processes that jobs have left behind."""
    return [pid for job in book.jobs() for pid in life.processes(book.folder, job.key)]
