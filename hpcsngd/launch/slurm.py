"""Slurm's words: parse what its programs print, map its states to ours.

Parsing is pure and tested on recorded output.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hpcsngd.errors import SchedulerError
from hpcsngd.launch.programs import command_output
from hpcsngd.launch.queued import ENDED, PENDING, RUNNING, UNKNOWN, AlreadyEndedError, Answer

# job state codes of squeue(1) and sacct(1), Slurm 20.02 to 24.11
_PHASES: dict[str, str] = {
    **dict.fromkeys(
        (
            "PENDING",
            "CONFIGURING",
            "REQUEUED",
            "REQUEUE_FED",
            "REQUEUE_HOLD",
            "RESV_DEL_HOLD",
            "SPECIAL_EXIT",
            "POWER_UP_NODE",
        ),
        PENDING,
    ),
    **dict.fromkeys(
        ("RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "EXPEDITING"),
        RUNNING,
    ),
    **dict.fromkeys(
        (
            "BOOT_FAIL",
            "CANCELLED",
            "COMPLETED",
            "DEADLINE",
            "FAILED",
            "LAUNCH_FAILED",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "PREEMPTED",
            "RECONFIG_FAIL",
            "REVOKED",
            "TIMEOUT",
        ),
        ENDED,
    ),
}

# state -> (our state, fault kind, what to tell people) for a job that ended without a status of its own
_ENDINGS: dict[str, tuple[str, str, str]] = {
    "BOOT_FAIL": ("failed", "node_failure", "a node did not boot"),
    "CANCELLED": ("cancelled", "killed", "the job was cancelled"),
    "DEADLINE": ("cancelled", "killed", "the job could not meet its deadline"),
    "FAILED": ("failed", "unknown", "the job failed"),
    "LAUNCH_FAILED": ("failed", "node_failure", "the job could not be launched"),
    "NODE_FAIL": ("failed", "node_failure", "a node failed"),
    "OUT_OF_MEMORY": ("failed", "out_of_memory", "the job used more memory than it asked for"),
    "PREEMPTED": ("preempted", "preempted", "the job was preempted"),
    "REVOKED": ("cancelled", "killed", "the job was revoked"),
    "TIMEOUT": ("timeout", "walltime", "the job reached its time limit"),
}


# the reasons of squeue(1) that users ask about; others are shown as they are
_REASONS: dict[str, str] = {
    "BeginTime": "its start time has not come; a requeued job waits two minutes at most sites",
    "Dependency": "it waits for another job",
    "DependencyNeverSatisfied": "the job that it waits for did not succeed: it will never start, cancel it",
    "JobHeldAdmin": "held by an administrator: ask the site's support",
    "JobHeldUser": "held; start it with: scontrol release {job_id}",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition does not start jobs at present",
    "PartitionNodeLimit": "it asks for more nodes than the partition allows: it will not start",
    "PartitionTimeLimit": "it asks for more time than the partition allows: it will not start",
    "Priority": "jobs of higher priority go first",
    "ReqNodeNotAvail": "a node that it needs is down or reserved",
    "Reservation": "its reservation has not begun",
    "Resources": "it is next when enough nodes are free",
}
_REASON_FAMILIES: tuple[tuple[str, str], ...] = (
    ("QOS", "a limit of the quality of service is reached"),
    ("Assoc", "a limit of the account is reached"),
    ("MaxJobs", "as many of your jobs run as are allowed"),
)


@dataclass(frozen=True)
class Job:
    """What Slurm says about one job.

    Attributes:
        job_id: its id; ``123_4`` for a member of an array.
        state: the state's first word, such as ``CANCELLED``.
        detail: what else the state said (``by 0``) and the reason, if any.
        start: when it started or is expected to start, ISO 8601 in UTC; empty if Slurm cannot tell.
    """

    job_id: str
    state: str
    detail: str = ""
    start: str = ""

    @property
    def phase(self) -> str:
        """Returns `PENDING`, `RUNNING`, `ENDED` or, for a word we do not know, `UNKNOWN`."""
        return _PHASES.get(self.state, UNKNOWN)

    @property
    def is_success(self) -> bool:
        """Returns whether Slurm saw it end with exit status 0."""
        return self.state == "COMPLETED"

    def waiting(self) -> str:
        """Returns why a pending job does not run: Slurm's word, and what it means."""
        known = _REASONS.get(self.detail.partition(",")[0])
        family = next((text for prefix, text in _REASON_FAMILIES if self.detail.startswith(prefix)), "")
        meaning = (known or family).format(job_id=self.job_id)
        return f"{self.detail}: {meaning}" if meaning else self.detail

    def ending(self) -> tuple[str, str, str]:
        """Returns our state, the fault kind and a sentence for a job that ended and left no status.

        ``COMPLETED`` is a failure here: a job that succeeds writes its status before it ends.
        """
        state, kind, text = _ENDINGS.get(self.state, ("failed", "unknown", "the job ended without a status"))
        detail = f" {self.detail}" if self.detail else ""
        return state, kind, f"{text} (Slurm: {self.state}{detail})"


_FACT = re.compile(r"(?:^| )([A-Za-z][\w/:]*)=(\S*)")
_RECORD_S = 10.0
_RECORDED = (
    "JobId",
    "ArrayJobId",
    "ArrayTaskId",
    "JobName",
    "Account",
    "QOS",
    "Partition",
    "Reservation",
    "Priority",
    "Restarts",
    "SubmitTime",
    "EligibleTime",
    "StartTime",
    "TimeLimit",
    "NodeList",
    "BatchHost",
    "NumNodes",
    "NumCPUs",
    "TRES",
    "Features",
    "Dependency",
)

SQUEUE = ("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%S", "--jobs")
SACCT = ("sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State,Reason,Start", "--jobs")


_RANGES = re.compile(r"(?P<array>\d+)_\[(?P<ranges>\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)(?:%\d+)?\]")


def parse_jobs(text: str) -> dict[str, Job]:
    """Returns job id -> job for lines ``id|state|reason|start`` of squeue or sacct; other lines are ignored.

    Steps (``12.batch``) are ignored; a later line of the same id wins, as in ``sacct --duplicates``. A line
    for members of an array that have not started (``12_[0-3,7%2]``) gives one job each.
    """
    jobs: dict[str, Job] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) < 2 or not cells[0] or "." in cells[0] or not cells[1]:
            continue
        jobs |= {job_id: _job(job_id, *cells[1:4]) for job_id in members(cells[0])}
    return jobs


def members(job_id: str) -> list[str]:
    """Returns the ids that an id with ranges stands for: ``12_[0-2,7%2]`` is 12_0, 12_1, 12_2 and 12_7."""
    match = _RANGES.fullmatch(job_id)
    if not match:
        return [job_id]
    found = []
    for part in match["ranges"].split(","):
        first, _, last = part.partition("-")
        found += [f"{match['array']}_{index}" for index in range(int(first), int(last or first) + 1)]
    return found


def _job(job_id: str, state: str, reason: str = "", start: str = "") -> Job:
    # sacct writes "CANCELLED by 1000", and "CANCELLED+" where the column is too narrow
    word, _, rest = state.partition(" ")
    words = [rest.strip(), "" if reason in ("None", "") else reason]
    return Job(job_id, word.rstrip("+"), ", ".join(part for part in words if part), utc(start))


def utc(local: str) -> str:
    """Returns a time as Slurm prints it, in the zone of this machine, as ISO 8601 in UTC; empty for N/A."""
    try:
        moment = datetime.datetime.fromisoformat(local).astimezone(datetime.timezone.utc)
    except ValueError:
        return ""
    return moment.isoformat(timespec="seconds")


def ask(job_ids: Sequence[str], *, timeout_s: float) -> Answer:
    """Returns what Slurm knows of these jobs: one squeue, and one sacct for those it does not list.

    squeue answers from the controller and is never late; sacct remembers longer, but lags by seconds and is
    switched off at some sites. Members of an array are asked for by the array's id: a thousand ids would
    make a slow question.
    """
    queue, queue_complaint = _listed(SQUEUE, job_ids, timeout_s)
    missing = [job_id for job_id in job_ids if job_id not in queue]
    past, past_complaint = _listed(SACCT, missing, timeout_s) if missing else ({}, "")
    complaints = tuple(filter(None, (queue_complaint, past_complaint)))
    return Answer(past | queue, not queue_complaint, complaints)


def cancel(job_ids: Sequence[str], *, timeout_s: float) -> None:
    """Cancels jobs by id, with one scancel.

    Raises:
        AlreadyEndedError: none of them is left to cancel.
        SchedulerError: scancel is missing, refuses or does not answer.
    """
    try:
        command_output(["scancel", *job_ids], timeout_s=timeout_s)
    except SchedulerError as error:
        if "Invalid job id" in str(error) or "already completing" in str(error):
            raise AlreadyEndedError(str(error)) from error
        raise


def requeue(job_id: str, *, timeout_s: float) -> None:
    """Puts a running job back in the queue under its id.

    Raises:
        SchedulerError: scontrol is missing, refuses or does not answer.
    """
    command_output(["scontrol", "requeue", job_id], timeout_s=timeout_s)


def job_record(job_id: str) -> dict[str, str]:
    """Returns what Slurm has on record of a job, by its own names; empty where it cannot be asked.

    Only the `_RECORDED` facts: others, such as the command and its environment, may hold what is private.
    """
    try:
        told = command_output(["scontrol", "show", "job", job_id, "--oneliner"], timeout_s=_RECORD_S)
    except SchedulerError:
        return {}
    return parse_record(told)


def parse_record(text: str) -> dict[str, str]:
    """Returns the `_RECORDED` facts in one line of ``scontrol show job --oneliner``."""
    facts = dict(_FACT.findall(text))
    return {name: facts[name] for name in _RECORDED if facts.get(name) not in (None, "", "(null)", "N/A")}


def _listed(program: Sequence[str], job_ids: Sequence[str], timeout_s: float) -> tuple[dict[str, Job], str]:
    asked = ",".join(dict.fromkeys(job_id.partition("_")[0] for job_id in job_ids))
    try:
        return parse_jobs(command_output([*program, asked], timeout_s=timeout_s)), ""
    except SchedulerError as error:
        # squeue refuses a single id that it has forgotten: that is an answer, not a failure
        return {}, "" if "Invalid job id" in str(error) else str(error)
