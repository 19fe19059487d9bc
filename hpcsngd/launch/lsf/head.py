"""The head of an LSF job: the one process that LSF starts, on the job's first host.

``python -m hpcsngd.launch.lsf.head FOLDER OPTIONS -- COMMAND``. It finds the compute hosts, has the launcher
start one starter on each (`hpcsngd.launch.lsf.node`) and stays until their tasks have ended. It imports
little and computes nothing: on Summit-style systems its host is shared by all jobs.

Signals: LSF tells the processes of the first host alone. USR2, the signal of the run limit, kills a launcher
or freezes it with its tasks, so launchers run in sessions of their own with USR2 ignored. The head warns the
tasks itself before the limit; LSF's USR2 is a second chance. bkill's INT, 20 seconds before its KILL, becomes
TERM for the tasks, and its TERM becomes INT: the tasks' agents know the first as an order to leave and the
second as the last moment.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from submitit.core.utils import JobPaths

from hpcsngd import lifeline
from hpcsngd.errors import SchedulerError
from hpcsngd.launch import processes, programs
from hpcsngd.launch.lsf import control, hosts, launchers
from hpcsngd.launch.lsf.control import Control, Pulse, Work
from hpcsngd.launch.lsf.request import lsf_id

log = logging.getLogger(__name__)

POLL_S = 0.2
BEAT_S = 1.0
COMMAND_S = 60.0
"""Patience with LSF's commands."""
LOST_S = 15.0
"""After all launchers have ended, tasks without an exit status are given up so much later."""
LEAVE_S = 10.0
"""Launchers have this long to leave after the last task."""
EXIT_REQUEUED = 75
"""Exit status of a job that starts again (EX_TEMPFAIL): ``DONE`` would let dependent jobs start."""
EXIT_LOST = 70
_RELAYED = {signal.SIGINT: signal.SIGTERM, signal.SIGTERM: signal.SIGINT, signal.SIGUSR2: signal.SIGUSR2}
_REQUEST = re.compile(r"Signal <(\w+)> requested by")


@dataclass
class Head:
    """The head at work.

    Attributes:
        files: what it shares with the starters.
        work: what is started.
        limit_s: the run limit in seconds.
        warning_s: how long before the limit the tasks are warned, in seconds.
        straggler_s: seconds that other tasks have after one has failed; None: as long as they want.
        received: signals from LSF.
        orders: signals for the tasks so far.
    """

    files: Control
    work: Work
    limit_s: float
    warning_s: float
    straggler_s: float | None = None
    received: list[int] = field(default_factory=list)
    orders: list[int] = field(default_factory=list)
    _fate: str = "RUNNING"
    _beats: int = 0
    _next_beat: float = 0.0
    _began: float = field(default_factory=time.monotonic)
    _failed_at: float | None = None
    _alone_since: float | None = None
    _launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, commands: Sequence[Sequence[str]]) -> int:
        """Starts the launchers' commands and returns the job's exit status."""
        for number in _RELAYED:
            signal.signal(number, self._note)
        for words in commands:
            log.info("starting: %s", " ".join(words))
            self._launchers.append(_start(words, self.files.folder))
        try:
            while not self._is_over():
                self._relay()
                self._mind_the_limit()
                self._serve()
                self._beat()
                time.sleep(POLL_S)
        finally:
            self._end_launchers()
        return self._status()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    def _left_s(self) -> float:
        return self._began + self.limit_s - time.monotonic()

    def _relay(self) -> None:
        while self.received:
            number = self.received.pop(0)
            log.info("LSF sends %s", signal.Signals(number).name)
            if number == signal.SIGUSR2:
                # a launcher that was reached by it may have stopped itself and its tasks
                for launcher in self._launchers:
                    _signal_group(launcher.pid, signal.SIGCONT)
            elif self._fate == "RUNNING":
                self._fate = _fate(self.work.job_id)
                self._next_beat = 0.0
                self._beat()
            self._order(_RELAYED[signal.Signals(number)])

    def _order(self, number: int) -> None:
        if number not in self.orders:
            log.info("tasks get %s", signal.Signals(number).name)
            self.orders.append(int(number))
            self.files.order(self.orders)

    def _mind_the_limit(self) -> None:
        if self._left_s() <= min(self.warning_s, self.limit_s / 2):
            self._order(signal.SIGUSR2)

    def _beat(self) -> None:
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + BEAT_S
            self._beats += 1
            self.files.beat(Pulse(self._beats, self._left_s(), self.files.restarts, self._fate))

    def _serve(self) -> None:
        """Requeues the job if a task asks for it."""
        if not self.files.request_file.exists():
            return
        job_id = self.work.job_id
        mark = control.requeued_mark(self.files.folder.parent)
        mark.touch()  # first: between the two the job looks finished
        if refusal := _requeue(job_id):
            mark.unlink(missing_ok=True)
            log.warning("%s", refusal)
            self.files.answer(refusal)
            return
        log.info("job %s is put back in the queue", job_id)
        self._fate = "REQUEUED"
        self.files.answer("")

    def _is_over(self) -> bool:
        """Returns whether all tasks have ended, or nothing more can be expected of them."""
        now = time.monotonic()
        ended = self.files.exits()
        if len(ended) == self.work.tasks:
            return True
        if self._failed_at is None and any(ended.values()):
            self._failed_at = now
        if self._failed_at is not None and self.straggler_s is not None:
            late_s = now - self._failed_at - self.straggler_s
            if late_s > 0:
                self._order(signal.SIGTERM)
            if late_s > LEAVE_S:
                log.error("a task has failed; the others are ended")
                return True
        if any(launcher.poll() is None for launcher in self._launchers):
            self._alone_since = None
            return False
        self._alone_since = self._alone_since or now
        # exit statuses may be on their way through a slow file system
        return now - self._alone_since > LOST_S

    def _end_launchers(self) -> None:
        """Gives the launchers time to leave, then ends them with all that they started here."""
        is_done = len(self.files.exits()) == self.work.tasks
        if not is_done:
            for launcher in self._launchers:
                launcher.terminate()
        deadline = time.monotonic() + LEAVE_S
        while time.monotonic() < deadline and any(each.poll() is None for each in self._launchers):
            time.sleep(0.05)
        processes.kill_descendants()

    def _status(self) -> int:
        if self._fate == "REQUEUED":
            return EXIT_REQUEUED
        ended = self.files.exits()
        missing = sorted(set(range(self.work.tasks)) - set(ended))
        if missing:
            log.error("no exit status of rank(s) %s", ", ".join(map(str, missing)))
        bad = [status for _, status in sorted(ended.items()) if status]
        if bad:
            return bad[0] if bad[0] > 0 else 128 - bad[0]
        return EXIT_LOST if missing else 0


def _start(words: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        list(words),
        env={**os.environ, control.FOLDER: str(folder)},
        stdin=subprocess.DEVNULL,  # lsrun would read the job's
        start_new_session=True,
        preexec_fn=_become_launcher,  # noqa: PLW1509 - no threads here
    )


def _become_launcher() -> None:
    """Ends with the head, and ignores USR2, which stays ignored in the program."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    lifeline.bind_to_parent(signal.SIGTERM)


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        log.debug("process group %d is gone", pid)


def _requeue(job_id: str) -> str:
    """Has LSF put the job back in the queue; returns why it does not, empty if it does."""
    try:
        said = programs.run(["brequeue", lsf_id(job_id)], timeout_s=COMMAND_S)
    except SchedulerError as error:
        return str(error)
    # LSF ends the job within seconds, and may reach brequeue itself before that has ended
    if said.status and "is being requeued" not in said.out:
        return f"brequeue refused: {said.words() or 'no reason given'}"
    return ""


def _fate(job_id: str) -> str:
    """Returns what LSF's history says of a job that is being ended; killed where it does not say.

    A job that a person kills must never be put back in the queue, so that is what silence means.
    """
    try:
        said = programs.run(["bhist", "-l", lsf_id(job_id)], timeout_s=COMMAND_S / 10)
    except SchedulerError:
        return "KILLED"
    return fate(said.out)


def fate(history: str) -> str:
    """Returns ``REQUEUED`` or ``KILLED`` by the last request in the output of ``bhist -l``.

    Sites that preempt by killing have LSF requeue the job or migrate it, which starts it again, too.
    """
    found = _REQUEST.findall(re.sub(r"\n {15,}", "", history))
    return "REQUEUED" if found and ("REQUEUE" in found[-1] or "MIG" in found[-1]) else "KILLED"


def _arguments(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="hpcsngd.launch.lsf.head")
    parser.add_argument("folder")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--tasks-per-node", type=int, required=True)
    parser.add_argument("--limit-min", type=float, required=True)
    parser.add_argument("--warning-s", type=float, required=True)
    parser.add_argument("--launcher", required=True)
    parser.add_argument("--launcher-arg", action="append", default=[])
    parser.add_argument("--sets", default="")
    parser.add_argument("--batch-host", choices=["auto", "yes", "no"], default="auto")
    parser.add_argument("--straggler-s", type=float, default=None)
    parser.add_argument("--join", action="store_true")
    own = list(words[: words.index("--")])
    return parser.parse_args(own), list(words[len(own) + 1 :])


def _sets(text: str) -> launchers.ResourceSets | None:
    if not text:
        return None
    per_host, tasks, gpus, cores, bind = text.split(",")
    return launchers.ResourceSets(int(per_host), int(tasks), int(gpus), int(cores), bind)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return None


def job_id() -> str:
    """Returns the id of the job that this process runs in, with ``_index`` for an element of an array."""
    index = os.environ.get("LSB_JOBINDEX", "0")
    number = os.environ["LSB_JOBID"]
    return number if index in ("", "0") else f"{number}_{index}"


def main() -> int:
    """Runs the job and returns its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asked, command = _arguments(sys.argv[1:])
    paths = JobPaths(asked.folder, job_id=job_id(), task_id=0)
    try:
        found = hosts.compute_hosts(
            os.environ,
            _read,
            nodes=asked.nodes,
            batch_host=asked.batch_host,
            has_jsrun=shutil.which("jsrun") is not None,
        )
        starter = [sys.executable, *launchers.STARTER]
        commands = launchers.commands(
            asked.launcher, found, starter, sets=_sets(asked.sets), args=asked.launcher_arg
        )
    except (hosts.HostsError, ValueError) as error:
        # where people look for it: tasks that could have written there will not be
        paths.folder.mkdir(parents=True, exist_ok=True)
        with paths.stderr.open("a", encoding="utf-8") as stream:
            stream.write(f"hpcsngd: {error}\n")
        return EXIT_LOST
    work = Work(
        job_id(), tuple(found), asked.tasks_per_node, tuple(command), asked.folder, is_joined=asked.join
    )
    processes.adopt_orphans()
    files = Control.begin(control.job_folder(paths.folder, work.job_id), work)
    log.info("job %s, start %d, hosts %s", work.job_id, files.restarts + 1, ", ".join(found))
    head = Head(files, work, 60.0 * asked.limit_min, asked.warning_s, asked.straggler_s)
    return head.run(commands)


if __name__ == "__main__":
    sys.exit(main())
