"""The starter: starts the tasks of one compute host of an LSF job, and does not outlive the job.

``python -m hpcsngd.launch.lsf.node [NODE]``; jsrun, which starts every task itself, gives no number, and
the starter then starts the one task that it stands for. Tasks get their ranks from us and never from the
launcher, write to a log of their own each, and their exit statuses go to files, because some launchers lose
them. A starter whose head falls silent or whose launcher is gone ends its tasks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from submitit.core.utils import JobPaths

from hpcsngd import lifeline
from hpcsngd.launch import names, processes
from hpcsngd.launch.lsf import control, hosts, launchers
from hpcsngd.launch.lsf.control import Control, Work

log = logging.getLogger(__name__)

POLL_S = 0.2
SILENCE_S = 60.0
"""A head that gives no sign of life for so long is gone: LSF has ended it, or its host is lost."""
GRACE_S = 10.0
"""Time between TERM and KILL for the tasks of a starter that has to leave."""

NODE, GLOBAL_RANK, LOCAL_RANK = "HPCSNGD_LSF_NODE", "HPCSNGD_LSF_GLOBAL_RANK", "HPCSNGD_LSF_LOCAL_RANK"
NODES, TASKS = "HPCSNGD_LSF_NODES", "HPCSNGD_LSF_TASKS"
HOSTS, RESTARTS = "HPCSNGD_LSF_HOSTS", "HPCSNGD_LSF_RESTARTS"


class StandingError(Exception):
    """A starter cannot tell which of the job's hosts it is on."""


@dataclass(frozen=True)
class Task:
    """One task of the job: its rank, the number of its host, and its rank on that host."""

    rank: int
    node: int
    local_rank: int


def tasks(work: Work, node: int | None, host: str, environment: Mapping[str, str]) -> list[Task]:
    """Returns the tasks that this starter is to start. Pure.

    Args:
        work: the job.
        node: number of this host by the launcher's command; None under jsrun.
        host: this host's name.
        environment: this process's, for jsrun's word.

    Raises:
        StandingError: nothing tells.
    """
    per_node = work.tasks_per_node
    if node is not None:
        return [Task(node * per_node + local, node, local) for local in range(per_node)]
    ranks = launchers.rank_from(environment)
    if ranks is None:
        raise StandingError(f"neither a number nor jsrun says which task this process on {host} is")
    place = hosts.index_of(host, list(work.hosts))
    # by the list of hosts, for nothing promises that the launcher counts hosts in that order
    number = place if place is not None else ranks.rank // ranks.local_size
    return [Task(number * per_node + ranks.local_rank, number, ranks.local_rank)]


def task_environment(work: Work, task: Task, files: Control) -> dict[str, str]:
    """Returns what a task learns of its place."""
    number, _, index = work.job_id.partition("_")
    return {
        "SUBMITIT_EXECUTOR": "lsf",
        "LSB_JOBID": number,
        "LSB_JOBINDEX": index or "0",
        control.FOLDER: str(files.folder),
        NODE: str(task.node),
        NODES: str(len(work.hosts)),
        GLOBAL_RANK: str(task.rank),
        LOCAL_RANK: str(task.local_rank),
        TASKS: str(work.tasks),
        HOSTS: ",".join(work.hosts),
        RESTARTS: str(files.restarts),
    }


class Starter:
    """Starts tasks and watches over them.

    Args:
        files: what it shares with the head.
        chosen: its tasks.
    """

    def __init__(self, files: Control, chosen: Sequence[Task]) -> None:
        self._files, self._work = files, files.work()
        self._running = {task.rank: _start(self._work, task, files) for task in chosen}
        self._sent = 0
        self._parent = os.getppid()
        self._leaving_since: float | None = None
        self._pulse, self._heard = files.pulse(), time.monotonic()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._leave)
        # the head hears them too, and orders what is to be done
        for number in (signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    def run(self) -> None:
        """Returns when all tasks have ended and their exit statuses are written."""
        next_look = 0.0
        while self._running:
            for rank, task in list(self._running.items()):
                if (status := task.poll()) is not None:
                    self._files.write_exit(rank, status)
                    del self._running[rank]
            now = time.monotonic()
            if now >= next_look:
                next_look = now + 1.0
                self._look(now)
            self._obey()
            if self._leaving_since is not None and now - self._leaving_since > GRACE_S:
                processes.kill_descendants()
            time.sleep(POLL_S)
        processes.kill_descendants()

    def _leave(self, number: int, frame: FrameType | None) -> None:
        """Ends the tasks: the launcher has been told to, or has gone."""
        if self._leaving_since is None:
            self._leaving_since = time.monotonic()
            self._send(signal.SIGTERM)

    def _look(self, now: float) -> None:
        """Leaves if there is nobody left to work for."""
        pulse = self._files.pulse()
        if pulse != self._pulse:
            self._pulse, self._heard = pulse, now
        if os.getppid() != self._parent:
            log.error("the launcher is gone")
            self._leave(0, None)
        elif now - self._heard > SILENCE_S:
            log.error("the head of the job has been silent for %.0f s", now - self._heard)
            self._leave(0, None)

    def _obey(self) -> None:
        orders = self._files.orders()
        for number in orders[self._sent :]:
            self._send(number)
        self._sent = len(orders)

    def _send(self, number: int) -> None:
        for task in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(task.pid, number)


def _start(work: Work, task: Task, files: Control) -> subprocess.Popen[bytes]:
    """Starts one task with its environment and its logs, in a session of its own."""
    paths = JobPaths(work.folder, job_id=work.job_id, task_id=task.rank)
    paths.folder.mkdir(parents=True, exist_ok=True)
    out = paths.stdout.open("ab")
    err = out if work.is_joined else paths.stderr.open("ab")
    with out, err:
        return subprocess.Popen(
            list(work.command),
            env={**os.environ, **task_environment(work, task, files)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            preexec_fn=_become_task,  # noqa: PLW1509 - a starter has no threads
        )


def _become_task() -> None:
    """Dies with the starter; INT means its usual again, USR2 is ignored until the task handles it."""
    lifeline.bind_to_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> int:
    """Starts the tasks of this host; the exit status says whether that worked, not how they ended."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    processes.adopt_orphans()
    files = control.own()
    work, host = files.work(), names.host_name()
    try:
        chosen = tasks(work, int(sys.argv[1]) if len(sys.argv) > 1 else None, host, os.environ)
    except StandingError as error:
        log.error("%s", error)  # noqa: TRY400 - the words say all
        return 1
    log.info("ranks %s on %s", ", ".join(str(task.rank) for task in chosen), host)
    Starter(files, chosen).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
