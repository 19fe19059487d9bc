"""What Slurm says of the job that an agent runs in. Parsing is pure; a silent Slurm is no error here.

SIGTERM alone does not say why it came: a cancelled job, one that is put back in the queue and one that is
preempted all get it. What tells them apart, seen on Slurm 22.05: a job that is put back counts one restart
more than its processes know of; a cancelled one does not; a preempted one has a time of preemption while its
grace lasts.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Literal

from hpcsngd.errors import SchedulerError
from hpcsngd.launch.programs import command_output

log = logging.getLogger(__name__)

Fate = Literal["running", "preempted", "restarting", "ending", "unknown"]

_FIELDS = "State:30,RestartCnt:12,PreemptTime:30,TimeLeft:30"
_LEFT = re.compile(r"(?:(?P<days>\d+)-)?(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)$")


@dataclass(frozen=True)
class OwnJob:
    """One job at one moment.

    Attributes:
        state: Slurm's word, such as ``RUNNING``.
        restarts: how often Slurm has started it again, a coming start included.
        is_preempted: whether its end by preemption is set.
        left_s: seconds until its time limit; None where there is none.
    """

    state: str
    restarts: int
    is_preempted: bool
    left_s: float | None

    def fate(self, restarts: int) -> Fate:
        """Returns what becomes of the job.

        Args:
            restarts: how often it had been started again when this process began.
        """
        if self.restarts > restarts or self.state in ("PENDING", "REQUEUED"):
            return "restarting"
        if self.is_preempted:
            return "preempted"
        return "running" if self.state in ("RUNNING", "SIGNALING") else "ending"


def ask(job_id: str, *, timeout_s: float) -> OwnJob | None:
    """Returns what Slurm says of a job; None if it cannot be asked or gives no answer that we understand."""
    words = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", f"--Format={_FIELDS}"]
    try:
        return parse(command_output(words, timeout_s=timeout_s))
    except SchedulerError as error:
        log.warning("cannot ask about job %s: %s", job_id, error)
        return None


def parse(text: str) -> OwnJob | None:
    """Returns the job in squeue's answer; None if it has another form."""
    cells = text.split()
    if len(cells) != 4 or not cells[1].isdigit():
        return None
    state, restarts, preempt_time, left = cells
    return OwnJob(state, int(restarts), preempt_time[0].isdigit(), _seconds(left))


def _seconds(text: str) -> float | None:
    match = _LEFT.match(text)
    if match is None:
        return None
    part = {name: int(number or 0) for name, number in match.groupdict().items()}
    return float(part["days"] * 86400 + part["hours"] * 3600 + part["minutes"] * 60 + part["seconds"])
