"""Whole runs with a parameter server in this process: the server in this thread, each worker in its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hpcsngd.config import resolve
from hpcsngd.rundir import RunDir
from hpcsngd.train.parameter_server import session
from hpcsngd.train.parameter_server.engine import Push
from hpcsngd.train.parameter_server.link import Assignment, Ending
from hpcsngd.train.parameter_server.server import Server
from hpcsngd.train.pulse import Pulse
from hpcsngd.train.stopping import StopRequest
from tests.train.runs import CPU, make_run


def served(tmp_path: Path, section: str = "{}", **settings: Any) -> RunDir:
    """Returns a new run with a parameter server; ``section`` is the YAML of its settings."""
    return make_run(tmp_path, strategy="parameter_server", parameter_server=section, **settings)


class WorkerDiedError(Exception):
    """Ends a worker as a signal would: it says nothing."""


class DirectLink:
    """Calls the server at once."""

    def __init__(
        self,
        server: Server,
        worker: int,
        on_begin: Callable[[], None],
        on_push: Callable[[int, Push, Server], None],
    ) -> None:
        self._server, self._worker, self._on_begin, self._on_push = server, worker, on_begin, on_push

    def join(self) -> Mapping[str, Any] | None:
        return self._server.join(self._worker)

    def begin(self, streams: Mapping[str, Any]) -> Assignment | Ending:
        self._on_begin()
        return self._server.begin(self._worker, streams)

    def push(self, push: Push) -> int:
        self._on_push(self._worker, push, self._server)
        return self._server.push(self._worker, push)

    def leave(self) -> None:
        self._server.leave(self._worker)

    def fail(self, kind: str, message: str) -> None:
        self._server.fail(self._worker, kind, message)


def train(
    run: RunDir,
    attempt: int = 1,
    *,
    workers: int = 1,
    stop_after: int | None = None,
    on_push: Callable[[int, Push, Server], None] = lambda worker, push, server: None,
    device: torch.device = CPU,
) -> bool:
    """Trains a run; returns whether it is finished.

    Args:
        run: the run.
        attempt: number of the attempt.
        workers: how many there are.
        stop_after: ask for a stop when a worker wants more after so many steps; None: never.
        on_push: sees every push before the server; what it raises ends its worker without a word.
        device: where all compute.
    """
    resolved = resolve.from_record(run.record()["config"])
    job = session.Job(run, attempt, resolved, device, workers, time.monotonic(), Pulse())
    session.check_ranks(job)

    def stop_if_due() -> None:
        if stop_after is not None and built.server.progress.step >= stop_after:
            stop_request._is_signalled = True
            built.server._engine.hold()

    def work(number: int) -> None:
        link = DirectLink(built.server, number, stop_if_due, on_push)
        try:
            session.build_worker(job, number, link).run()
        except WorkerDiedError:
            run.attempt(attempt).write_lost(number, "was ended by a test")
        except Exception:
            built.server.leave(number)

    with StopRequest(run.attempt(attempt).stop_request) as stop_request:
        built = session.build_server(job, stop_request)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, workers + 1)]
        for thread in threads:
            thread.start()
        try:
            return session.serve(job, built)
        finally:
            for thread in threads:
                thread.join(timeout=60)
