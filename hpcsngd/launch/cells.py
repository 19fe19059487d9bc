"""The controller of a sweep where there is no queue: starts the cells one after the other, or a few at once.

``python -m hpcsngd.launch.cells SWEEP ARRAY PARALLEL``, in a session of its own, so that it outlives the
terminal. Each cell it starts is an ordinary run, a local one with a controller of its own; when this process
is killed, those go on and the rest is not started.
"""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from hpcsngd import sweepdir
from hpcsngd.errors import HpcsngdError
from hpcsngd.launch import environment, processes, status
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.sending import send
from hpcsngd.rundir import RunDir, Status
from hpcsngd.sweepdir import Member, SweepDir

log = logging.getLogger(__name__)

POLL_S = 0.2


def start(sweep: SweepDir, array: int, parallel: int) -> subprocess.Popen[bytes]:
    """Starts the controller, which waits until its standard input is closed, and returns it.

    Args:
        sweep: the sweep.
        array: number of the list of cells.
        parallel: how many cells run at once.
    """
    sweep.submit_dir.mkdir(parents=True, exist_ok=True)
    with sweep.controller_log.open("ab") as output:
        process = subprocess.Popen(
            command(sweep, array, parallel),
            env=environment.clean(os.environ),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    # the thread reaps the controller if we are still here when it ends; otherwise init does
    threading.Thread(target=process.wait, daemon=True, name=f"reap-{process.pid}").start()
    return process


def command(sweep: SweepDir, array: int, parallel: int) -> list[str]:
    """Returns the words that start the controller."""
    return [sys.executable, "-u", "-m", __name__, str(sweep.path), str(array), str(parallel)]


def run(sweep: SweepDir, array: int, parallel: int) -> None:
    """Starts the cells of a list in order, at most ``parallel`` at once, and returns when all have ended."""
    waiting = deque(sweep.array(array))
    running: list[Callable[[], bool]] = []
    while waiting or running:
        running = [is_running for is_running in running if is_running()]
        while waiting and len(running) < parallel:
            member = waiting.popleft()
            if (is_running := _start_cell(sweep.run(member.run), member)) is not None:
                running.append(is_running)
        time.sleep(POLL_S)


def _is_alive(pid: int, ticks: int | None) -> bool:
    return ticks is not None and processes.start_ticks(pid) == ticks


class _OnHosts:
    """Tells whether a cell on hosts that are reached by ssh still runs; its files are asked first."""

    def __init__(self, cell: RunDir) -> None:
        self._cell = cell
        self._every_s = float(cell.record()["config"]["site"]["scheduler"]["poll_s"])
        self._next = time.monotonic() + self._every_s

    def __call__(self) -> bool:
        if status.current(self._cell):
            return False
        if time.monotonic() < self._next:
            return True
        self._next = time.monotonic() + self._every_s
        return not status.states([self._cell])[0].has_ended


def _start_cell(cell: RunDir, member: Member) -> Callable[[], bool] | None:
    """Starts a cell and returns what tells whether it runs; None if it was cancelled or cannot start."""
    attempt = cell.attempt(member.attempt)
    if attempt.cancel_request.exists():
        cell.write_status(Status("cancelled", "cancelled before it started", member.attempt))
        return None
    plan = Plan.from_record(cell.plan_record(member.attempt))
    try:
        job_id = send(cell, plan, member.attempt)
    except (HpcsngdError, OSError) as error:
        cell.write_status(Status("failed", f"not started: {error}", member.attempt))
        log.exception("cell %s cannot start", member.run)
        return None
    log.info("cell %s: attempt %d, job %s", member.run, member.attempt, job_id)
    if plan.ssh:
        return _OnHosts(cell)
    return functools.partial(_is_alive, int(job_id), processes.start_ticks(int(job_id)))


def main() -> None:
    """Runs the controller that the command line describes."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    path, array, parallel = sys.argv[1:]
    sys.stdin.read()  # the submitter is writing which process the cells wait for; it closes this, or ends
    run(sweepdir.open_sweep(Path(path)), int(array), int(parallel))


if __name__ == "__main__":
    main()
