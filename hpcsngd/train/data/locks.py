"""Things that one process does for others: under a lock on a disk, or on rank 0 for all ranks."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from hpcsngd import dist
from hpcsngd.train.faults import MissingDataError

T = TypeVar("T")


@contextmanager
def exclusive(file: Path) -> Iterator[None]:
    """Lets one process at a time pass, of all that see this file; the others wait. The file stays.

    Raises:
        OSError: no such folder, or a file system without locks.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def on_first_rank(work: Callable[[], T]) -> T:
    """Returns on every rank what ``work`` returns on rank 0, the only one to run it.

    Raises:
        MissingDataError: ``work`` has raised it, on every rank, so that none waits for another.
    """
    answer: tuple[T | None, str] = (None, "")
    if dist.rank() == 0:
        try:
            answer = (work(), "")
        except MissingDataError as error:
            answer = (None, str(error))
    result, problem = dist.broadcast_object(answer)
    if problem:
        raise MissingDataError(problem)
    return result  # type: ignore[return-value]  # a T where there is no problem
