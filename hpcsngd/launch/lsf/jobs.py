"""Questions and orders to LSF about jobs that were submitted: where they stand, cancel, requeue.

No answer is taken for more than it says. bjobs ends with 255 for a mixture of known and unknown ids at some
sites and with 0 at others, so its output counts and its status does not. A job that it has forgotten
(CLEAN_PERIOD, an hour by default) is looked up in the history. ``UNKWN`` and ``ZOMBI`` mean a host that
cannot be reached, and may come back: the job goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcsngd.errors import SchedulerError
from hpcsngd.launch import programs
from hpcsngd.launch.lsf import control, parse
from hpcsngd.launch.lsf.parse import Story
from hpcsngd.launch.lsf.request import lsf_id
from hpcsngd.launch.ownjob import OwnJob
from hpcsngd.launch.queued import ENDED, PENDING, RUNNING, UNKNOWN, AlreadyEndedError, Answer

FRESH_S = 5.0
"""A head gives a sign of life every second, or after one command of LSF's."""
POLL_S = 0.1
CHUNK = 200
"""Ids in one question: command lines and LSF's patience are finite."""

_PHASES: dict[str, str] = {
    **dict.fromkeys(("PEND", "PSUSP", "WAIT", "PROV"), PENDING),
    **dict.fromkeys(("RUN", "USUSP", "SSUSP", "SUSP"), RUNNING),
    **dict.fromkeys(("DONE", "EXIT"), ENDED),
    # the host cannot be reached; killed meanwhile (ZOMBI) or not, the processes may still run
    **dict.fromkeys(("UNKWN", "ZOMBI"), UNKNOWN),
}
_STOPPED = {
    "USUSP": "stopped by its owner or an administrator; bresume lets it go on",
    "SSUSP": "suspended by LSF for a job of higher priority, or because its host is busy",
}

# LSF's own word for an end -> our state, the fault kind, a sentence (bjobs(1), IBM Spectrum LSF 10.1)
_REASONS: dict[str, tuple[str, str, str]] = {
    "TERM_ADMIN": ("cancelled", "killed", "an administrator killed the job"),
    "TERM_BUCKET_KILL": ("cancelled", "killed", "the job was killed with others"),
    "TERM_CHKPNT": ("cancelled", "killed", "the job was killed after a checkpoint"),
    "TERM_CPULIMIT": ("timeout", "walltime", "the job reached its limit of CPU time"),
    "TERM_CSM_ALLOC": ("failed", "node_failure", "CSM could not make the allocation"),
    "TERM_DEADLINE": ("timeout", "walltime", "the job reached its deadline"),
    "TERM_FORCE_ADMIN": ("cancelled", "killed", "an administrator removed the job"),
    "TERM_FORCE_OWNER": ("cancelled", "killed", "its owner removed the job"),
    "TERM_LOAD": ("preempted", "preempted", "the load of its host ended the job"),
    "TERM_MEMLIMIT": ("failed", "out_of_memory", "the job used more memory than it asked for"),
    "TERM_OWNER": ("cancelled", "killed", "its owner killed the job"),
    "TERM_PREEMPT": ("preempted", "preempted", "the job was preempted"),
    "TERM_RUNLIMIT": ("timeout", "walltime", "the job reached its run limit"),
    "TERM_SWAP": ("failed", "out_of_memory", "the job used more swap space than is allowed"),
    "TERM_WINDOW": ("preempted", "preempted", "the queue's hours are over"),
    "TERM_ZOMBIE": ("failed", "node_failure", "the host of the job was lost"),
}
_USR2 = 12
_CODES: dict[int, tuple[str, str, str]] = {
    127: ("failed", "configuration", "the job's script was not found or could not be run"),
    128 + 2: ("cancelled", "killed", "the job was interrupted (bkill begins so)"),
    128 + 9: ("failed", "killed", "the job was killed"),
    128 + _USR2: ("timeout", "walltime", "the run limit's signal ended the job"),
    128 + 15: ("failed", "killed", "the job was terminated"),
}


_UNTOLD = Story()


@dataclass(frozen=True)
class Job:
    """What LSF says about one job.

    Attributes:
        job_id: its id; ``60_4`` for an element of an array.
        state: LSF's word, such as ``RUN``.
        story: what the long listing or the history adds.
        start: nothing; LSF is not asked for estimates.
    """

    job_id: str
    state: str
    story: Story = _UNTOLD
    start: str = ""

    @property
    def detail(self) -> str:
        """Returns what else LSF said: who ended it, how, or what stopped it."""
        if self.phase == RUNNING:
            return _STOPPED.get(self.state, "")
        code, signal = self.story.exit_code, self.story.signal
        words = [
            self.story.reason,
            f"exit code {code}" if code is not None else "",
            f"signal {signal}" if signal is not None else "",
            f"ended by {self.story.ended_by}" if self.story.ended_by else "",
        ]
        return ", ".join(filter(None, words))

    @property
    def phase(self) -> str:
        """Returns pending, running or ended; unknown for a lost host and for a word that we do not know."""
        return _PHASES.get(self.state, UNKNOWN)

    @property
    def is_success(self) -> bool:
        """Returns whether LSF saw it end with exit status 0, which proves little (see `ending`)."""
        return self.state == "DONE"

    def waiting(self) -> str:
        """Returns why a pending job does not run, in LSF's words."""
        if self.state == "PSUSP":
            return f"held; start it with: bresume {lsf_id(self.job_id)}"
        return "; ".join(self.story.pending)

    def ending(self) -> tuple[str, str, str]:
        """Returns our state, the fault kind and a sentence for a job that ended and left no status.

        ``DONE`` is a failure here: a job that succeeds writes its status before it ends, and one that is
        killed at its limit has been seen to end as ``DONE``.
        """
        story = self.story
        state, kind, text = "failed", "unknown", "the job ended without a status"
        number = story.exit_code if story.exit_code is not None else 128 + (story.signal or -128)
        if story.reason in _REASONS:
            state, kind, text = _REASONS[story.reason]
        elif self.state == "EXIT" and story.ended_by:
            state, kind, text = "cancelled", "killed", "the job was killed"
        elif self.state == "EXIT" and number in _CODES:
            state, kind, text = _CODES[number]
        elif self.state == "EXIT":
            text = "the job failed"
        detail = f" {self.detail}" if self.detail else ""
        return state, kind, f"{text} (LSF: {self.state}{detail})"


def ask(job_ids: Sequence[str], *, timeout_s: float) -> Answer:
    """Returns what LSF knows of these jobs: by bjobs, and for ends and forgotten jobs by bhist.

    Elements of an array are asked for by the array's id: a thousand ids would make a slow question.
    """
    found: dict[str, Job] = {}
    complaints: list[str] = []
    for numbers in _chunks(job_ids):
        seen, complaint = _listed(numbers, timeout_s)
        found |= {job_id: Job(job_id, each.state) for job_id, each in seen.items() if job_id in job_ids}
        complaints += [complaint] if complaint else []
    is_complete = not complaints
    stories, unclear = _told(job_ids, found, timeout_s)
    for job_id, story in stories.items():
        if job_id in found:
            found[job_id] = dataclasses.replace(found[job_id], story=story)
        elif job_id in job_ids and story.state:
            found[job_id] = Job(job_id, story.state, story)
    if unclear and not set(job_ids) <= set(found):
        complaints.append(unclear)
    return Answer(found, is_complete, tuple(complaints))


def _told(job_ids: Sequence[str], found: Mapping[str, Job], timeout_s: float) -> tuple[dict[str, Story], str]:
    """Returns details of jobs that wait, have failed or are forgotten, and what bhist complained of."""
    failed = [job_id for job_id, job in found.items() if job.state == "EXIT"]
    forgotten = [job_id for job_id in job_ids if job_id not in found]
    stories, unclear = _stories(parse.BHIST_LONG, [*failed, *forgotten], timeout_s)
    waiting = [job_id for job_id, job in found.items() if job.state == "PEND"]
    # the history cannot be read at some sites
    untold = [job_id for job_id in failed if job_id not in stories]
    return stories | _stories(parse.BJOBS_LONG, [*waiting, *untold], timeout_s)[0], unclear


def _chunks(job_ids: Sequence[str]) -> Iterator[list[str]]:
    numbers = list(dict.fromkeys(job_id.partition("_")[0] for job_id in job_ids))
    for first in range(0, len(numbers), CHUNK):
        yield numbers[first : first + CHUNK]


def _listed(numbers: Sequence[str], timeout_s: float) -> tuple[dict[str, parse.Seen], str]:
    """Returns the jobs that bjobs lists, and a complaint if it gave no answer at all."""
    try:
        said = programs.run([*parse.BJOBS, *numbers], timeout_s=timeout_s)
    except SchedulerError as error:
        return {}, str(error)
    seen = parse.jobs(said.out)
    if seen is None:
        # some versions print no list, but words, where they know none of the jobs
        is_answer = "is not found" in said.err or "No unfinished job found" in said.err
        return {}, "" if is_answer else f"bjobs gave no list: {said.words() or 'nothing'}"
    return seen, ""


def _stories(
    program: Sequence[str], job_ids: Sequence[str], timeout_s: float
) -> tuple[dict[str, Story], str]:
    """Returns what a long listing tells, and what the program complained of."""
    found: dict[str, Story] = {}
    complaints = []
    for numbers in _chunks(job_ids):
        try:
            said = programs.run([*program, *numbers], timeout_s=timeout_s)
        except SchedulerError as error:
            complaints.append(str(error))
            continue
        told = parse.stories(said.out)
        found |= told
        if not told:
            complaints.append(f"{program[0]}: {said.words() or 'nothing'}")
    return found, "; ".join(dict.fromkeys(complaints))


def cancel(job_ids: Sequence[str], *, timeout_s: float) -> None:
    """Kills jobs by id; LSF sends INT, and TERM and KILL 10 and 20 seconds later.

    Raises:
        AlreadyEndedError: none of them is left to kill.
        SchedulerError: bkill is missing, refuses or does not answer.
    """
    refusals: list[str] = []
    accepted = 0
    for batch in itertools.zip_longest(*[iter(job_ids)] * CHUNK):
        said = programs.run(["bkill", *[lsf_id(job_id) for job_id in batch if job_id]], timeout_s=timeout_s)
        accepted += said.out.count("is being terminated")
        refusals += list(parse.lines(said.err)) if said.status else []
    # a host that does not answer makes the request wait, it is not lost
    real = [text for text in refusals if not _is_over(text) and "Operation is in progress" not in text]
    if real:
        raise SchedulerError(f"bkill refused: {' / '.join(real)}")
    if not accepted and any(_is_over(text) for text in refusals):
        raise AlreadyEndedError(" / ".join(refusals))


def _is_over(text: str) -> bool:
    return "already finished" in text or "No matching job found" in text


def requeue(job_id: str, *, timeout_s: float) -> None:
    """Puts the job that this process runs in back in the queue under its id; LSF then ends it within seconds.

    The head of the job asks, on the first host: compute nodes may have no way to LSF.

    Raises:
        SchedulerError: there is no head, it does not answer, or brequeue refuses.
    """
    control.own().request_requeue(job_id, timeout_s=timeout_s)


def own_job(job_id: str, *, timeout_s: float) -> OwnJob | None:
    """Returns what the head knows of the job that this process runs in; None outside of one.

    LSF's signals may reach a task before the head has found out what they mean. So the word that counts is
    the second one after the question, if the head is there to give it: at most `FRESH_S` later.
    """
    folder = os.environ.get(control.FOLDER)
    if folder is None:
        return None
    files = control.Control(Path(folder))
    first = pulse = files.pulse()
    deadline = time.monotonic() + min(FRESH_S, timeout_s)
    while first and pulse and pulse.beats < first.beats + 2 and time.monotonic() < deadline:
        time.sleep(POLL_S)
        pulse = files.pulse()
    return OwnJob(pulse.fate, pulse.restarts, False, pulse.left_s) if pulse else None


def job_record(job_id: str) -> dict[str, str]:
    """Returns what LSF set for the job that this process runs in, by its own names."""
    names = ("LSB_JOBID", "LSB_JOBINDEX", "LSB_JOBNAME", "LSB_QUEUE", "LSB_MCPU_HOSTS", "LSB_SUB_HOST")
    more = ("LSB_PROJECT_NAME", "LSB_DJOB_NUMPROC", "CSM_ALLOCATION_ID", "LSF_VERSION")
    return {name: os.environ[name] for name in (*names, *more) if os.environ.get(name)}
