"""jsrun, blaunch and lsrun of a played cluster: they enforce their rules and really start tasks.

A task gets a session of its own and the name of its played host; what the launcher sets and loses is as the
documents, or the measured ``lsrun``, say: see each function.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from hpcsngd import lifeline
from hpcsngd.launch.lsf.launchers import ResourceSets
from hpcsngd.launch.rehearse import cluster as clusters
from hpcsngd.launch.rehearse.book import Book, Job
from hpcsngd.launch.rehearse.cluster import Cluster

POLL_S = 0.05


@dataclass(frozen=True)
class Task:
    """One process to start.

    Attributes:
        host: the played host on which it stands.
        words: its command.
        variables: what its launcher adds to the environment.
        output: file to which standard output is appended; empty: the launcher's own.
        error: the same for standard error; empty: with standard output.
    """

    host: str
    words: list[str]
    variables: dict[str, str]
    output: str = ""
    error: str = ""


class RefusedError(Exception):
    """The launcher does not do what it was asked; the text is its complaint."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RefusedError(message)


def jsrun(words: list[str], folder: Path) -> int:
    """Runs tasks in resource sets; returns the status of the first task that failed.

    Without ``--smpiargs=off`` tasks also get Spectrum MPI's variables. GPUs of a set are numbered from 0. A
    failed task ends the others. The client hands on INT and TERM; killed, or ended by USR2, it leaves its
    tasks running until the job ends.
    """
    return _run("jsrun", folder, lambda job, cluster: _set_tasks(words, job, cluster), bind=False)


def blaunch(words: list[str], folder: Path) -> int:
    """Runs a command on one host of the job, or once per slot of all; returns its status.

    Other hosts are refused. Unless ``-no-shell`` is given, the words are joined and split again by a shell.
    """
    return _run("blaunch", folder, lambda job, cluster: _blaunch_tasks(words, job, cluster), bind=True)


def lsrun(words: list[str], folder: Path) -> int:
    """Runs a command on a host, split again by a shell; its exit status is lost: always 0.

    USR2 ends it and its task; where USR2 is ignored, its helper takes it as a request to suspend: the task
    and the client's whole process group stop until SIGCONT. Both were seen on an LSF-compatible scheduler.
    """
    status = _run("lsrun", folder, lambda job, cluster: _lsrun_tasks(words, cluster), bind=True)
    return 255 if status == 255 else 0


def _run(name: str, folder: Path, plan: Callable[[Job, Cluster], list[Task]], *, bind: bool) -> int:
    try:
        job, cluster = _own_job(folder)
        tasks = plan(job, cluster)
    except RefusedError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return 255
    return _Client(tasks, bind=bind, suspends=name == "lsrun", grace_s=cluster.grace_s).run()


def run_tasks(tasks: Sequence[Task], *, grace_s: float) -> int:
    """Runs tasks that end with each other's failure; returns the first one's status, 0 if none failed.

    Signals for the job's steps reach the tasks, not the client: it ignores the warning of the time limit.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    return _Client(tasks, bind=True, suspends=False, grace_s=grace_s).run()


def _own_job(folder: Path) -> tuple[Job, Cluster]:
    job = Book(folder).read(os.environ.get(clusters.JOB, ""))
    if job is None or "LSB_JOBID" not in os.environ:
        raise RefusedError("not inside a job")
    return job, clusters.load(folder)


class _Client:
    """Starts tasks, waits for them and hands signals on."""

    def __init__(self, tasks: Sequence[Task], *, bind: bool, suspends: bool, grace_s: float) -> None:
        self._tasks, self._bind, self._grace_s = tasks, bind, grace_s
        self._children: list[subprocess.Popen[bytes]] = []
        self._ends_at: float | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hand_on)
        if suspends and signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN:
            signal.signal(signal.SIGUSR2, self._suspend)
            signal.signal(signal.SIGCONT, self._resume)

    def run(self) -> int:
        """Returns the status of the first task that failed, as a shell has it; 0 if none did."""
        self._children = [self._start(task) for task in self._tasks]
        status = 0
        while None in (ended := [child.poll() for child in self._children]):
            if not status and (status := next(filter(None, ended), 0)):
                self._end(signal.SIGTERM)
            if self._ends_at and time.monotonic() >= self._ends_at:
                self._send(signal.SIGKILL)
            time.sleep(POLL_S)
        status = status or next(filter(None, ended), 0)
        return status if status >= 0 else 128 - status

    def _start(self, task: Task) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **task.variables, clusters.HOST: task.host}
        # the client's own copies stay open: it ends with its tasks
        out = Path(task.output).open("ab") if task.output else None  # noqa: SIM115
        err = Path(task.error).open("ab") if task.error else out  # noqa: SIM115
        return subprocess.Popen(
            task.words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            # a client without threads; blaunch and lsrun take their tasks with them
            preexec_fn=self._prepare,  # noqa: PLW1509
        )

    def _prepare(self) -> None:
        # ignored signals are inherited: a task on another host starts with all of them in order
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        if self._bind:
            lifeline.bind_to_parent()

    def _send(self, number: int) -> None:
        for child in self._children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)

    def _end(self, number: int) -> None:
        self._ends_at = self._ends_at or time.monotonic() + self._grace_s
        self._send(number)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._end(number)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        self._send(signal.SIGTSTP)
        os.killpg(os.getpgrp(), signal.SIGSTOP)

    def _resume(self, number: int, frame: FrameType | None) -> None:
        self._send(signal.SIGCONT)


def _sets_parser() -> _Parser:
    parser = _Parser(prog="jsrun", add_help=False, allow_abbrev=False)
    parser.add_argument("-n", "--nrs", type=int)
    parser.add_argument("-r", "--rs_per_host", type=int)
    parser.add_argument("-a", "--tasks_per_rs", type=int, default=1)
    parser.add_argument("-c", "--cpu_per_rs", type=int, default=1)
    parser.add_argument("-g", "--gpu_per_rs", type=int, default=0)
    parser.add_argument("-b", "--bind", default="packed:1")
    parser.add_argument("-d", "--launch_distribution", choices=("packed", "cyclic"), default="packed")
    parser.add_argument("-l", "--latency_priority", choices=("gpu-cpu", "cpu-cpu", "gpu-gpu"))
    parser.add_argument("--smpiargs", default="")
    parser.add_argument("-E", "--env", action="append", default=[])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser


def _set_tasks(words: list[str], job: Job, cluster: Cluster) -> list[Task]:
    asked = _sets_parser().parse_args(words)
    if not asked.command:
        raise RefusedError("no command")
    most = cluster.slots // max(1, asked.cpu_per_rs)
    per_host = asked.rs_per_host or max(1, most)
    sets = ResourceSets(per_host, asked.tasks_per_rs, asked.gpu_per_rs, asked.cpu_per_rs, asked.bind)
    total = asked.nrs or per_host * len(job.hosts)
    if problem := sets.misfit(cores=cluster.slots, gpus=cluster.gpus):
        raise RefusedError(problem)
    if total > per_host * len(job.hosts):
        raise RefusedError(f"{total} resource sets asked, {len(job.hosts)} hosts hold {per_host} each")
    hosts = [host for host in job.hosts for _ in range(per_host)][:total]
    if asked.launch_distribution == "cyclic":
        hosts = [job.hosts[number % len(job.hosts)] for number in range(total)]
    extra = dict(pair.partition("=")[::2] for pair in asked.env)
    has_mpi = asked.smpiargs.strip("'\"") != "off"
    return _ranked(hosts, sets, asked.command, extra, has_mpi=has_mpi)


def _ranked(
    hosts: Sequence[str], sets: ResourceSets, command: list[str], extra: Mapping[str, str], *, has_mpi: bool
) -> list[Task]:
    size = len(hosts) * sets.tasks
    local_sizes = {host: hosts.count(host) * sets.tasks for host in hosts}
    seen = dict.fromkeys(hosts, 0)
    tasks = []
    for rank, host in enumerate(host for host in hosts for _ in range(sets.tasks)):
        told = {"RANK": rank, "SIZE": size, "LOCAL_RANK": seen[host], "LOCAL_SIZE": local_sizes[host]}
        seen[host] += 1
        families = ("JSM_NAMESPACE_", "OMPI_COMM_WORLD_") if has_mpi else ("JSM_NAMESPACE_",)
        ranks = {f"{family}{name}": str(value) for family in families for name, value in told.items()}
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(sets.gpus)))}
        tasks.append(Task(host, command, {**ranks, "PMIX_RANK": str(rank), **gpus, **extra}))
    return tasks


def _blaunch_tasks(words: list[str], job: Job, cluster: Cluster) -> list[Task]:
    rest = list(words)
    is_split = True
    hosts: list[str] | None = None
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option == "-no-shell":
            is_split = False
        elif option == "-z" and rest:
            hosts = rest.pop(0).split()
        elif option == "-u" and rest:
            hosts = Path(rest.pop(0)).read_text(encoding="utf-8").split()
        elif option != "-n":
            raise RefusedError(f"unknown option {option}")
    allocated = ([cluster.batch_host] if cluster.batch_host else []) + job.hosts
    if hosts is None and rest and rest[0] in cluster.addresses:
        hosts = [rest.pop(0)]
    if foreign := [host for host in hosts or [] if host not in allocated]:
        raise RefusedError(f"{foreign[0]} is not allocated to job {job.id}")
    if not rest:
        raise RefusedError("no command")
    if hosts is None:
        per_host = max(1, job.slots // len(job.hosts))
        hosts = [host for host in job.hosts for _ in range(per_host)]
    command = _split_again(rest) if is_split else rest
    return [Task(host, command, {"LSF_PM_TASKID": str(number)}) for number, host in enumerate(hosts, start=1)]


def _lsrun_tasks(words: list[str], cluster: Cluster) -> list[Task]:
    position = words.index("--") if "--" in words else len(words)
    own, command = iter(words[:position]), words[position + 1 :]
    host, stray = cluster.hosts[0], []
    # like getopt, it takes everything in front of -- that looks like an option for its own
    for word in own:
        if word == "-m":
            host = next(own, "")
        elif not word.startswith("-"):
            stray.append(word)
        elif word not in ("-P", "-v", "-p"):
            raise RefusedError(f"invalid option -- '{word.lstrip('-')[:1]}'")
    if host not in cluster.addresses:
        raise RefusedError(f"{host}: unknown host")
    if not stray + command:
        raise RefusedError("no command")
    return [Task(host, _split_again(stray + command), {"LSF_PM_TASKID": "1"})]


def _split_again(words: list[str]) -> list[str]:
    """Returns what a remote shell makes of words: joined by blanks, split and expanded once more."""
    # exec: the client's end must reach the command, not only the shell
    return ["sh", "-c", "exec " + " ".join(words)]
