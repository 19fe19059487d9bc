"""A played job's keeper: one process from submission to the end, requeues included.

It waits for release, dependencies and hosts, starts the script with the scheduler's variables, enforces the
wall time, delivers signals as the scheduler would, and at the end removes whatever the job left running.
Processes are known by a variable that the script and all that it starts carry, and by the played host in
another; a job that removes them from the environment of its children would escape.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcsngd.launch.rehearse import cluster as clusters
from hpcsngd.launch.rehearse import lsf, slurm
from hpcsngd.launch.rehearse.book import Book, Job
from hpcsngd.launch.rehearse.cluster import Cluster

POLL_S = 0.1

Environment = Callable[[Job, Cluster, Path], dict[str, str]]


@dataclass(frozen=True)
class Manners:
    """How a scheduler treats its jobs.

    Attributes:
        environment: the variables that it adds for the script.
        kill: signals of a cancelled job, `Cluster.grace_s` apart.
        limit: signals at the end of the wall time; the first is followed by `Cluster.limit_grace_s`.
        preempt: signals of a job that is preempted.
        is_first_host_only: whether signals before the last reach only the host of the script.
        spares_script: whether the script itself gets none but the last.
    """

    environment: Environment
    kill: tuple[signal.Signals, ...]
    limit: tuple[signal.Signals, ...]
    preempt: tuple[signal.Signals, ...]
    is_first_host_only: bool
    spares_script: bool


INT, TERM, KILL, USR2 = signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR2
MANNERS = {
    # seen on an LSF-compatible scheduler: ranks on other hosts are told nothing
    "lsf": Manners(
        lsf.environment, (INT, TERM, KILL), (USR2, INT, TERM, KILL), (INT, TERM, KILL), True, False
    ),
    # scancel(1), slurm.conf(5) KillWait and GraceTime: steps are told first, the script is killed with them
    "slurm": Manners(slurm.environment, (TERM, KILL), (TERM, KILL), (TERM, KILL), False, True),
}


# what ends a running job -> what its record then says
_ENDINGS = {"kill": "killed", "requeue": "requeue", "preempt": "preempted", "lose": "node"}


def processes(folder: Path, key: str, host: str | None = None) -> list[int]:
    """Returns the processes of a job of one cluster, on one played host or on all of them."""
    wanted = {f"{clusters.FOLDER}={folder}".encode(), f"{clusters.JOB}={key}".encode()}
    if host is not None:
        wanted.add(f"{clusters.HOST}={host}".encode())
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and int(place.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
                if wanted <= set((place / "environ").read_bytes().split(b"\0")):
                    found.append(int(place.name))
    return found


def send(pids: Sequence[int], number: int) -> None:
    """Sends a signal to processes; those that are gone are no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Keeper:
    """Keeps one job.

    Args:
        folder: the cluster's folder.
        key: the job.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._book = Book(folder)
        self._cluster = clusters.load(folder)
        self._manners = MANNERS[self._cluster.kind]
        self._key = key
        self._script: subprocess.Popen[bytes] | None = None
        self._stages: list[tuple[float, int]] = []
        self._is_warned = False
        self._again = False

    def run(self) -> None:
        """Returns when the job has ended for good."""
        while self._wait_for_turn():
            self._start()
            self._watch()
            if not self._finish():
                return

    def _wait_for_turn(self) -> bool:
        """Returns whether the job may start; False if it was killed before."""
        while True:
            for request in self._requests():
                if request == "kill":
                    self._end_unstarted()
                    return False
                self._take_note(request)
            job = self._job()
            may_start = not job.is_held and self._is_let_go(job)
            if may_start and self._book.take_hosts(self._key, self._cluster.hosts):
                return True
            time.sleep(POLL_S)

    def _job(self) -> Job:
        job = self._book.read(self._key)
        if job is None:
            raise SystemExit(f"the record of job {self._key} is gone")
        return job

    def _requests(self) -> list[str]:
        if not self._job().requests:
            return []
        with self._book.changing(self._key) as job:
            taken, job.requests = job.requests, []
        return taken

    def _take_note(self, request: str) -> None:
        with self._book.changing(self._key) as job:
            if request in ("suspend", "release", "resume"):
                job.is_held = request == "suspend"
                job.note(request)

    def _is_let_go(self, job: Job) -> bool:
        waits = []
        for word, number in job.after:
            others = self._book.jobs(number)
            right = {"ok": ("done",), "notok": ("exit",)}.get(word, ("done", "exit"))
            if not all(other.state in right for other in others):
                waits.append(number)
                is_lost = all(other.has_ended for other in others)
                self._say("dependency-never" if is_lost else "dependency")
        return not waits

    def _say(self, reason: str) -> None:
        if self._job().reason != reason:
            with self._book.changing(self._key) as job:
                job.reason = reason

    def _end_unstarted(self) -> None:
        with self._book.changing(self._key) as job:
            job.state, job.reason, job.ended = "exit", "killed", time.time()
            job.note("killed before its start")

    def _start(self) -> None:
        job = self._job()
        own = self._manners.environment(job, self._cluster, self._book.folder)
        host = self._cluster.batch_host or job.hosts[0]
        marks = {clusters.FOLDER: str(self._book.folder), clusters.JOB: self._key, clusters.HOST: host}
        self._stages, self._is_warned, self._again = [], False, False
        output = Path(job.cwd, job.filled(job.output) or os.devnull)
        try:
            with output.open("ab") as file:
                self._script = subprocess.Popen(
                    job.command,
                    cwd=job.cwd,
                    env={**self._book.environment(job), **own, **marks},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            with self._book.changing(self._key) as job:
                job.note(f"cannot start: {error}")
            self._script = subprocess.Popen(["sh", "-c", "exit 127"])
        with self._book.changing(self._key) as job:
            job.pid = self._script.pid

    def _watch(self) -> None:
        """Returns when the script has ended."""
        assert self._script is not None  # noqa: S101 - by _start
        while self._script.poll() is None:
            for request in self._requests():
                self._obey(request)
            self._mind_the_limit()
            self._send_what_is_due()
            time.sleep(POLL_S)

    def _obey(self, request: str) -> None:
        word, _, rest = request.partition(" ")
        with self._book.changing(self._key) as job:
            job.note(request)
            if word in _ENDINGS:
                job.reason, job.is_preempted = _ENDINGS[word], word == "preempt"
        if word in _ENDINGS:
            self._again = word != "kill"
            if word == "lose":
                send(self._processes(self._job().hosts[-1]), KILL)
            is_cut = word in ("preempt", "lose")
            self._stage(self._manners.preempt if is_cut else self._manners.kill)
        elif word == "signal":
            send(self._targets(), int(rest))
        elif word in ("suspend", "resume"):
            is_stop = word == "suspend"
            send(self._processes(), signal.SIGSTOP if is_stop else signal.SIGCONT)
            with self._book.changing(self._key) as job:
                job.state = "suspended" if is_stop else "running"

    def _processes(self, host: str | None = None) -> list[int]:
        return processes(self._book.folder, self._key, host)

    def _stage(self, signals: Sequence[signal.Signals], first_gap_s: float | None = None) -> None:
        due, gap_s = time.monotonic(), self._cluster.grace_s
        self._stages = []
        for position, number in enumerate(signals):
            self._stages.append((due, number))
            due += first_gap_s if first_gap_s is not None and position == 0 else gap_s

    def _mind_the_limit(self) -> None:
        job = self._job()
        left_s = job.ends_at - time.time()
        number, _, before_s = job.options.get("warning", "").partition("@")
        if number and not self._is_warned and left_s <= float(before_s):
            self._is_warned = True
            send(self._targets(), int(number))
        if left_s > 0 or job.reason:
            return
        with self._book.changing(self._key) as job:
            job.reason = "limit"
            job.note("wall time is over")
        self._stage(self._manners.limit, self._cluster.limit_grace_s)

    def _send_what_is_due(self) -> None:
        while self._stages and self._stages[0][0] <= time.monotonic():
            _, number = self._stages.pop(0)
            send(self._processes() if number == KILL else self._targets(), number)

    def _targets(self) -> list[int]:
        """Returns the processes that a signal to the job reaches."""
        host = (
            (self._cluster.batch_host or self._job().hosts[0]) if self._manners.is_first_host_only else None
        )
        script = self._script.pid if self._script and self._manners.spares_script else 0
        return [pid for pid in self._processes(host) if pid != script]

    def _finish(self) -> bool:
        """Records the end and removes what is left; returns whether the job starts again."""
        assert self._script is not None  # noqa: S101 - by _start
        status = self._script.wait()
        while left := self._processes():
            send(left, KILL)
            time.sleep(0.02)
        requests = self._requests()
        again = "kill" not in requests and (self._again or "requeue" in requests)
        with self._book.changing(self._key) as job:
            # an LSF job looks finished before a requeue shows
            job.state = "done" if status == 0 else "exit"
            job.exit_code, job.signal = (status, None) if status >= 0 else (None, -status)
            job.ended, job.pid = time.time(), 0
            job.note(f"exit {status}" if status >= 0 else f"ended by signal {-status}")
        if again:
            time.sleep(self._cluster.requeue_gap_s)
            with self._book.changing(self._key) as job:
                job.state, job.hosts, job.ended, job.exit_code, job.signal = "pending", [], 0.0, None, None
                job.restarts, job.is_preempted, job.reason = job.restarts + 1, False, ""
                job.note("requeued")
        return again


def main() -> None:
    """Keeps the job named on the command line."""
    Keeper(Path(sys.argv[1]), sys.argv[2]).run()


if __name__ == "__main__":
    main()
