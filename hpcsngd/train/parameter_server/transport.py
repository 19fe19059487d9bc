"""The way between workers and server across processes and nodes: torch.distributed.rpc, TensorPipe.

Only workers call; the server never does. So a worker that dies leaves nobody waiting for it: its call ends,
and the server's threads are not held. What the server raises travels as a value, because torch would wrap it
in text. Messages are pickled, so they must come from our own processes only: the job's own network.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.distributed import rpc

from hpcsngd.train import faults
from hpcsngd.train.faults import DismissedError, RendezvousError, SettingError
from hpcsngd.train.parameter_server.engine import LostWorkerError, Push
from hpcsngd.train.parameter_server.link import Assignment, Ending, ServerFailedError
from hpcsngd.train.parameter_server.server import Server

T = TypeVar("T")

log = logging.getLogger(__name__)

SERVER = "server"
PING_S = 2.0
# torch refuses 0, its word for no limit, and counts milliseconds in 32 bits; a worker may wait for a slow one
_NO_LIMIT_S = 7 * 86400.0


@dataclass(frozen=True)
class _Failure:
    """What a call has raised on the server."""

    kind: str
    message: str
    is_lost: bool


class _Desk:
    """Where calls find this process's server, which is built after the processes have met."""

    def __init__(self) -> None:
        self._is_open = threading.Event()
        self._server: Server | None = None
        self._problem: _Failure | None = None

    def open(self, server: Server) -> None:
        self._server = server
        self._is_open.set()

    def close(self, error: BaseException) -> None:
        """Answers every call with an error, unless there is a server."""
        self._problem = _failure(error)
        self._is_open.set()

    def answer(self, method: str, *arguments: Any) -> Any:
        self._is_open.wait()
        if self._server is None:
            return self._problem
        try:
            return getattr(self._server, method)(*arguments)
        except Exception as error:  # goes to the worker
            return _failure(error)


_DESK = _Desk()


def _call(method: str, *arguments: Any) -> Any:
    """Runs in the server's process."""
    return _DESK.answer(method, *arguments)


def _failure(error: BaseException) -> _Failure:
    is_lost = isinstance(error, LostWorkerError) and "taken for lost" in str(error)
    return _Failure(faults.kind_of(error), faults.message_of(error), is_lost)


def meet(rank: int, ranks: int) -> None:
    """Joins the processes of a run, which MASTER_ADDR and MASTER_PORT describe; returns when all are there.

    Raises:
        SettingError: this torch has no RPC.
        RendezvousError: the processes could not meet.
    """
    if not rpc.is_available():
        raise SettingError("strategy parameter_server needs torch.distributed.rpc, which this torch lacks")
    options = rpc.TensorPipeRpcBackendOptions(
        # each worker has one call that waits, and one that says that it lives
        num_worker_threads=2 * ranks + 2 if rank == 0 else 2,
        rpc_timeout=_NO_LIMIT_S,
    )
    try:
        with warnings.catch_warnings():
            # torch itself uses what it warns of
            warnings.filterwarnings("ignore", "You are using a Backend", UserWarning)
            rpc.init_rpc(_name(rank), rank=rank, world_size=ranks, rpc_backend_options=options)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RendezvousError(f"cannot meet the other ranks at {address}: {error}") from error


def part() -> None:
    """Leaves the other processes, which may be gone already."""
    rpc.shutdown(graceful=False)


def serve(server: Server) -> None:
    """Lets the calls of the workers, some of which may wait already, reach a server."""
    _DESK.open(server)


def refuse(error: BaseException) -> None:
    """Lets the calls of the workers end with an error if there is no server yet."""
    _DESK.close(error)


def _name(rank: int) -> str:
    return SERVER if rank == 0 else f"worker{rank}"


class RpcLink:
    """A worker's way to the server; see `link.Link`.

    Args:
        worker: its number, which is its rank.
    """

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._has_left = threading.Event()
        self._thread = threading.Thread(target=self._ping, name="ping", daemon=True)

    def join(self) -> Mapping[str, Any] | None:
        """Reports for duty, and says from now on that this process lives."""
        streams: Mapping[str, Any] | None = self._ask("join")
        self._thread.start()
        return streams

    def begin(self, streams: Mapping[str, Any]) -> Assignment | Ending:
        """Waits for work."""
        answer: Assignment | Ending = self._ask("begin", streams)
        return answer

    def push(self, push: Push) -> int:
        """Sends a gradient; returns the version after its update."""
        version: int = self._ask("push", push)
        return version

    def leave(self) -> None:
        """Takes leave."""
        self._has_left.set()
        # the server may end with its last worker, before the answer is under way; what it suffered it tells
        with contextlib.suppress(ServerFailedError):
            self._ask("leave")

    def fail(self, kind: str, message: str) -> None:
        """Tells that this worker has failed."""
        self._has_left.set()
        self._ask("fail", kind, message)

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            answer = rpc.rpc_sync(SERVER, _call, args=(method, self._worker, *arguments))
        except RuntimeError as error:  # of TensorPipe, when the other end is gone
            text = f"no connection to it any more ({error})"
            raise ServerFailedError("unknown", text) from error
        if isinstance(answer, _Failure):
            if answer.is_lost:
                raise DismissedError(answer.message)
            raise ServerFailedError(answer.kind, answer.message)
        return answer

    def _ping(self) -> None:
        while not self._has_left.wait(PING_S):
            try:
                self._ask("ping")
            except ServerFailedError as error:
                log.debug("no answer to a ping: %s", error)  # the main thread will see it, too
                return
