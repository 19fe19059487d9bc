"""What every scheduler with a queue can be asked, in words of our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from hpcsngd.errors import SchedulerError

PENDING, RUNNING, ENDED, UNKNOWN = "pending", "running", "ended", "unknown"


class QueuedJob(Protocol):
    """What a scheduler says about one job."""

    @property
    def job_id(self) -> str:
        """Returns its id, with ``_index`` for an element of an array."""

    @property
    def state(self) -> str:
        """Returns the scheduler's word."""

    @property
    def detail(self) -> str:
        """Returns what else it said."""

    @property
    def start(self) -> str:
        """Returns when it starts, ISO 8601 in UTC; empty if nobody can tell."""

    @property
    def phase(self) -> str:
        """Returns `PENDING`, `RUNNING`, `ENDED` or, for a word we do not know, `UNKNOWN`."""

    @property
    def is_success(self) -> bool:
        """Returns whether the scheduler saw it end well."""

    def waiting(self) -> str:
        """Returns why a pending job does not run."""

    def ending(self) -> tuple[str, str, str]:
        """Returns our state, the fault kind and a sentence for a job that ended and left no status."""


@dataclass(frozen=True)
class Answer:
    """What a scheduler said.

    Attributes:
        jobs: what it knows, by job id.
        is_complete: whether a job that is not listed has left the queue; false if nobody could be asked.
        complaints: what the programs that failed said.
    """

    jobs: Mapping[str, QueuedJob]
    is_complete: bool = True
    complaints: tuple[str, ...] = ()


class AlreadyEndedError(SchedulerError):
    """There is nothing to cancel: the jobs have ended or are forgotten."""
