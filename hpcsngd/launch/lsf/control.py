"""What the processes of one LSF job tell each other: small files on the shared file system.

LSF tells only the first host of a job what it wants, launchers lose signals and exit statuses, and compute
nodes may have no way to LSF's commands. So the head (`hpcsngd.launch.lsf.head`, on the first host) gives
orders and signs of life here, the starters (`hpcsngd.launch.lsf.node`, on each compute host) answer with exit
statuses, and a task that wants to be requeued asks the head. Each start of the job has a folder of its own:
processes of an earlier one that nobody could kill must not be mistaken for this one's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcsngd import rundir
from hpcsngd.errors import SchedulerError

FOLDER = "HPCSNGD_LSF_FOLDER"
"""Names the folder of this start of the job to its tasks."""
_RUN = re.compile(r"run(\d+)$")
_POLL_S = 0.2


@dataclass(frozen=True)
class Work:
    """What is to be started: the head writes it, the starters read it.

    Attributes:
        job_id: the job, with ``_index`` for an element of an array.
        hosts: the compute hosts, in order.
        tasks_per_node: tasks on each.
        command: the command of each task.
        folder: where the tasks' logs go.
        is_joined: whether standard error goes to the log of standard output.
    """

    job_id: str
    hosts: tuple[str, ...]
    tasks_per_node: int
    command: tuple[str, ...]
    folder: str
    is_joined: bool = False

    @property
    def tasks(self) -> int:
        """Returns the number of tasks."""
        return len(self.hosts) * self.tasks_per_node


@dataclass(frozen=True)
class Pulse:
    """A sign of life from the head.

    Attributes:
        beats: rises with each.
        left_s: seconds until the run limit.
        restarts: how often LSF has started the job again.
        fate: ``RUNNING``; once LSF ends it ``REQUEUED`` or ``KILLED``.
    """

    beats: int
    left_s: float
    restarts: int
    fate: str = "RUNNING"


class Control:
    """The files of one start of a job.

    Args:
        folder: their folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def begin(cls, folder: Path, work: Work) -> Control:
        """Makes the files of a new start of the job.

        Args:
            folder: of the job; each start has a folder in it.
            work: what is to be started.
        """
        made = cls(folder / f"run{starts(folder) + 1}")
        made.folder.mkdir(parents=True)
        requeued_mark(folder).unlink(missing_ok=True)
        _write(made.folder / "work.json", dataclasses.asdict(work))
        return made

    @property
    def restarts(self) -> int:
        """Returns how often the job had been started before."""
        return int(self.folder.name.removeprefix("run")) - 1

    def work(self) -> Work:
        """Returns what is to be started."""
        values = _read(self.folder / "work.json")
        if values is None:
            raise FileNotFoundError(f"no work in {self.folder}")
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return Work(**{**values, **lists})

    def beat(self, pulse: Pulse) -> None:
        """Gives a sign of life, for the head."""
        _write(self.folder / "pulse.json", dataclasses.asdict(pulse))

    def pulse(self) -> Pulse | None:
        """Returns the head's newest sign of life; None if none can be read."""
        values = _read(self.folder / "pulse.json")
        return Pulse(**values) if values else None

    def order(self, signals: list[int]) -> None:
        """Has the starters send their tasks signals; the list is of all so far, oldest first."""
        _write(self.folder / "orders.json", {"signals": signals})

    def orders(self) -> list[int]:
        """Returns the numbers of the signals that were ordered so far."""
        return list((_read(self.folder / "orders.json") or {"signals": []})["signals"])

    def write_exit(self, rank: int, status: int) -> None:
        """Records how a task ended; launchers may lose it."""
        _write(self.folder / f"{rank}.exit", {"status": status})

    def exits(self) -> dict[int, int]:
        """Returns rank -> exit status, negative for a signal, of the tasks that have ended."""
        list(self.folder.iterdir())  # NFS: reading the folder makes new files visible
        found = {int(file.stem): _read(file) for file in self.folder.glob("*.exit")}
        return {rank: values["status"] for rank, values in found.items() if values}

    def request_requeue(self, job_id: str, *, timeout_s: float) -> None:
        """Asks the head to requeue the job, and waits for the answer.

        Raises:
            SchedulerError: LSF refuses, or the head does not answer.
        """
        self.answer_file.unlink(missing_ok=True)
        _write(self.request_file, {"job_id": job_id})
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if told := _read(self.answer_file):
                if told["error"]:
                    raise SchedulerError(told["error"])
                return
            time.sleep(_POLL_S)
        raise SchedulerError(f"the head of LSF job {job_id} did not answer within {timeout_s:g} s")

    @property
    def request_file(self) -> Path:
        """Returns the file that asks the head for a requeue."""
        return self.folder / "requeue.json"

    @property
    def answer_file(self) -> Path:
        """Returns the file with the head's answer."""
        return self.folder / "answer.json"

    def answer(self, error: str) -> None:
        """Answers a request: with LSF's refusal, or an empty text."""
        self.request_file.unlink(missing_ok=True)
        _write(self.answer_file, {"error": error})


def own() -> Control:
    """Returns the files of the job that this process is a task of.

    Raises:
        SchedulerError: it is none.
    """
    if FOLDER not in os.environ:
        raise SchedulerError(f"{FOLDER} is not set: this process is no task of an LSF job")
    return Control(Path(os.environ[FOLDER]))


def job_folder(folder: Path, job_id: str) -> Path:
    """Returns the folder that a job's starts have in common, in the folder of its logs."""
    return folder / f"{job_id}_lsf"


def requeued_mark(folder: Path) -> Path:
    """Returns the file that says that an end of the job is none: it has been put back in the queue.

    LSF calls such a job ``DONE`` or ``EXIT`` for some seconds before it is pending again.
    """
    return folder / "requeued"


def starts(folder: Path) -> int:
    """Returns how often a job has been started."""
    if not folder.is_dir():
        return 0
    numbers = [int(match[1]) for place in folder.iterdir() if (match := _RUN.match(place.name))]
    return max(numbers, default=0)


def _write(file: Path, values: dict[str, Any]) -> None:
    rundir.write_text(file, json.dumps(values), is_flushed=False)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values
