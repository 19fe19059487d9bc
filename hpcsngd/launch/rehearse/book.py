"""The job records of a played cluster: one JSON file each, changed under one lock.

Commands add records and leave requests in them; each job's keeper (`hpcsngd.launch.rehearse.life`) acts on
the requests and writes what became of the job. Times are seconds since the epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hpcsngd.launch.rehearse import cluster

State = Literal["pending", "running", "suspended", "done", "exit"]
ENDED: tuple[State, ...] = ("done", "exit")
_FIRST_ID = 101


@dataclass
class Job:
    """One job, or one member of an array.

    Attributes:
        id: number of the job or array.
        name: its name.
        command: the script and its arguments.
        cwd: folder in which it starts.
        nodes: compute hosts that it takes.
        walltime_s: seconds it may run.
        index: number in the array; None outside an array.
        parallel: how many members of the array may run at once; 0: all.
        tasks_per_node: tasks on each host, where the request counts them.
        slots: job slots asked for on all hosts.
        queue: its queue or partition.
        project: the project that is charged.
        user: who submitted it.
        submitted: when.
        is_held: whether it waits to be released.
        after: conditions ``(word, id)``: ``ok`` (ended well), ``notok``, ``any`` (ended).
        excluded: hosts that it keeps off.
        output: file for what the script prints; the scheduler's own words go there too.
        options: what else was asked, for the commands.
        state: where it stands.
        reason: why it waits, or what ended it: ``limit``, ``killed``, ``preempted``, ``node``.
        hosts: compute hosts given to it.
        started: when it last started; 0 if it never did.
        ended: when it ended; 0 before.
        ends_at: when its wall time is over; 0 before the start.
        exit_code: the script's; None before the end or if a signal ended it.
        signal: number of the signal that ended the script.
        restarts: how often it was started again.
        is_preempted: whether its end by preemption has been set.
        pid: process id of the script while it runs.
        requests: what the keeper is asked to do, oldest first.
        history: ``(time, words)`` of everything that happened.
    """

    id: int
    name: str
    command: list[str]
    cwd: str
    nodes: int
    walltime_s: float
    index: int | None = None
    parallel: int = 0
    tasks_per_node: int = 1
    slots: int = 1
    queue: str = "normal"
    project: str = ""
    user: str = ""
    submitted: float = 0.0
    is_held: bool = False
    after: list[tuple[str, int]] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    output: str = ""
    options: dict[str, str] = field(default_factory=dict)
    state: State = "pending"
    reason: str = ""
    hosts: list[str] = field(default_factory=list)
    started: float = 0.0
    ended: float = 0.0
    ends_at: float = 0.0
    exit_code: int | None = None
    signal: int | None = None
    restarts: int = 0
    is_preempted: bool = False
    pid: int = 0
    requests: list[str] = field(default_factory=list)
    history: list[tuple[float, str]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Returns the name of its record: ``12``, or ``12_3`` for a member of an array."""
        return str(self.id) if self.index is None else f"{self.id}_{self.index}"

    @property
    def has_ended(self) -> bool:
        """Returns whether nothing more will happen to it."""
        return self.state in ENDED

    def filled(self, pattern: str, task: int = 0) -> str:
        """Returns a file name with the marks of either scheduler replaced.

        Slurm: %j job, %A array, %a member, %t task; LSF: %J job or array, %I member (0 outside an array).
        """
        index = str(self.index or 0)
        marks = {
            "%j": self.key,
            "%A": str(self.id),
            "%a": index,
            "%t": str(task),
            "%J": str(self.id),
            "%I": index,
        }
        for mark, value in marks.items():
            pattern = pattern.replace(mark, value)
        return pattern

    def note(self, words: str) -> None:
        """Adds to the history."""
        self.history.append((time.time(), words))


class Book:
    """The job records of one played cluster.

    Args:
        folder: the cluster's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._jobs = folder / "jobs"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other process from changing records; not to be nested."""
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def submit(self, job: Job, environment: Mapping[str, str], indices: Sequence[int] = ()) -> int:
        """Adds a job (or an array's members), starts their keepers and returns the number.

        Args:
            job: what is asked; its id is given here.
            environment: all variables that the job starts with.
            indices: numbers of an array's members; empty: no array.
        """
        with self.locked():
            numbers = [int(file.stem.partition("_")[0]) for file in self._jobs.glob("*.json")]
            number = max(numbers, default=_FIRST_ID - 1) + 1
            members = [
                dataclasses.replace(job, id=number, index=index, history=[], requests=[])
                for index in (indices or (None,))
            ]
            for member in members:
                member.submitted = time.time()
                member.note("submitted")
                self._write(member)
            (self._jobs / f"{number}.env").write_text(json.dumps(dict(environment)), encoding="utf-8")
        for member in members:
            self._start_keeper(member.key, environment)
        return number

    def _start_keeper(self, key: str, environment: Mapping[str, str]) -> None:
        words = [sys.executable, "-m", "hpcsngd.launch.rehearse.life", str(self.folder), key]
        # a keeper must find us however the job's own environment looks
        paths = [str(Path(__file__).parents[3]), environment.get("PYTHONPATH", "")]
        with (self._jobs / f"{key}.keeper").open("ab") as log:
            subprocess.Popen(
                words,
                env={**_unmarked(), "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def environment(self, job: Job) -> dict[str, str]:
        """Returns the variables with which a job was submitted."""
        return dict(json.loads((self._jobs / f"{job.id}.env").read_text(encoding="utf-8")))

    def read(self, key: str) -> Job | None:
        """Returns one record; None if there is none."""
        file = self._jobs / f"{key}.json"
        return _job(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def jobs(self, number: int | None = None) -> list[Job]:
        """Returns all records, or the members of one job or array, by id and index."""
        found = [_job(json.loads(file.read_text(encoding="utf-8"))) for file in self._jobs.glob("*.json")]
        chosen = [job for job in found if number is None or job.id == number]
        return sorted(chosen, key=lambda job: (job.id, job.index or 0))

    @contextlib.contextmanager
    def changing(self, key: str) -> Iterator[Job]:
        """Gives a record to be changed, under the lock, and writes it back."""
        with self.locked():
            job = self.read(key)
            if job is None:
                raise KeyError(key)
            yield job
            self._write(job)

    def ask(self, key: str, request: str) -> None:
        """Leaves a request for a job's keeper.

        Args:
            key: the job.
            request: ``kill``, ``requeue``, ``preempt``, ``suspend``, ``resume``, ``release``, ``lose`` (the
                last node fails), or ``signal N``.
        """
        with self.changing(key) as job:
            job.requests.append(request)

    def take_hosts(self, key: str, hosts: Sequence[str]) -> bool:
        """Gives a pending job its hosts if enough are free; returns whether it may start."""
        with self.locked():
            jobs = self.jobs()
            job = next(job for job in jobs if job.key == key)
            running = [other for other in jobs if other.state in ("running", "suspended")]
            taken = {host for other in running for host in other.hosts}
            free = [host for host in hosts if host not in taken and host not in job.excluded]
            siblings = sum(other.id == job.id for other in running)
            if len(free) < job.nodes or (job.parallel and siblings >= job.parallel):
                job.reason = "resources"
                self._write(job)
                return False
            job.hosts, job.state, job.reason = free[: job.nodes], "running", ""
            job.started = time.time()
            job.ends_at = job.started + job.walltime_s
            job.note("started on " + " ".join(job.hosts))
            self._write(job)
            return True

    def _write(self, job: Job) -> None:
        file = self._jobs / f"{job.key}.json"
        # readers take no lock: they must never see half a record
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
        fresh.replace(file)


def _unmarked() -> dict[str, str]:
    """Returns our environment without a job's marks: a job submitted by a job must outlive that one."""
    marks = (cluster.JOB, cluster.HOST)
    return {name: value for name, value in os.environ.items() if name not in marks}


def _job(values: dict[str, Any]) -> Job:
    pairs = {name: [tuple(pair) for pair in values[name]] for name in ("after", "history")}
    return Job(**{**values, **pairs})


def of_this_user(environment: Mapping[str, str]) -> tuple[Book, cluster.Cluster]:
    """Returns the book and the cluster that a command belongs to.

    Raises:
        SystemExit: it was called outside a rehearsal.
    """
    folder = cluster.here(environment)
    return Book(folder), cluster.load(folder)
