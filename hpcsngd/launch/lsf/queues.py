"""The queues of an LSF: what ``bqueues`` lists, and whether a request fits it. Parsing is pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hpcsngd.errors import SchedulerError
from hpcsngd.launch import programs


def parse(text: str) -> dict[str, str]:
    """Returns queue -> status, such as ``Open:Active``, from the output of ``bqueues``."""
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: row[2] for row in rows if len(row) > 3 and ":" in row[2]}


def problems(queue: str | None, found: Mapping[str, str], origin: str = "") -> Iterator[str]:
    """Yields why a queue cannot take a job; a queue that starts none for now is no reason.

    Args:
        queue: the queue; None: the cluster's default.
        found: queue -> status.
        origin: where the queue was written.
    """
    if queue is None or not found:
        return
    where = f" ({origin})" if origin not in ("", "default") else ""
    if queue not in found:
        yield f"queue {queue}{where} is not among LSF's: {', '.join(sorted(found))}"
    elif not found[queue].startswith("Open"):
        yield f"queue {queue}{where} takes no jobs: {found[queue]}"


def ask(*, timeout_s: float) -> dict[str, str]:
    """Returns queue -> status; empty where LSF cannot be asked."""
    try:
        return parse(programs.command_output(["bqueues"], timeout_s=timeout_s))
    except SchedulerError:
        return {}
