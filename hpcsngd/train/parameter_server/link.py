"""What workers and the server say to each other, however it travels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hpcsngd.train.faults import TrainError
from hpcsngd.train.parameter_server.engine import Push, Snapshot
from hpcsngd.train.parameter_server.work import Work


@dataclass(frozen=True)
class Assignment:
    """What a worker is to do next.

    Attributes:
        work: the samples.
        snapshot: the weights and buffers to compute at.
    """

    work: Work
    snapshot: Snapshot


@dataclass(frozen=True)
class Ending:
    """There is nothing more to do.

    Attributes:
        is_finished: whether the run has come to its end, or was asked to stop.
    """

    is_finished: bool


class ServerFailedError(TrainError):
    """The server has ended with an error, or is gone; only the server's own fault is a cause."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"the parameter server has ended: {message}")
        self.kind = kind
        self.is_echo = True


class WorkerFailedError(TrainError):
    """A worker has ended with an error; only the worker's own fault is a cause."""

    def __init__(self, worker: int, kind: str, message: str) -> None:
        super().__init__(f"worker {worker} has failed: {message}")
        self.kind = kind
        self.is_echo = True


class Link(Protocol):
    """A worker's way to the server. Every call returns when the server has done what it asks.

    Raises:
        ServerFailedError: the server has ended with an error, or is gone.
        DismissedError: the server goes on without this worker.
    """

    def join(self) -> Mapping[str, Any] | None:
        """Reports for duty; returns the states of this worker's random streams if the run is resumed."""

    def begin(self, streams: Mapping[str, Any]) -> Assignment | Ending:
        """Waits for work.

        Args:
            streams: the states of this worker's random streams, for a checkpoint that may come now.
        """

    def push(self, push: Push) -> int:
        """Sends a gradient; returns the version after its update."""

    def leave(self) -> None:
        """Takes leave, after `Ending`."""

    def fail(self, kind: str, message: str) -> None:
        """Tells that this worker has failed, which ends the run."""
