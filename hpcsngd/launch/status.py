"""Where runs stand, from their directories and one question to the scheduler.

A run's own status comes first. Without one, the scheduler says whether the job waits, runs or is gone; what a
job that is gone left behind comes next (`hpcsngd.launch.remains`). A job that is gone without a trace has not
succeeded, whatever the scheduler calls its end.
"""

from __future__ import annotations

import dataclasses
import datetime
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcsngd import lifeline, rundir
from hpcsngd.launch import processes, remains, schedulers
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.queued import ENDED, PENDING, UNKNOWN, Answer
from hpcsngd.launch.ssh import jobs as ssh_jobs
from hpcsngd.launch.ssh.jobs import Agents
from hpcsngd.rundir import Attempt, Fault, RunDir, Status
from hpcsngd.tables import TABLES

RETURN_S = 60.0
"""A job that was put back in the queue is pending again after this time, or will not be."""


@dataclass(frozen=True)
class RunState:
    """One run at one moment.

    Attributes:
        run: the run directory.
        name: its name.
        exp: the experiment.
        site: the site.
        state: pending, running, completed, failed, timeout, preempted, cancelled, or lost: its job is gone
            and nobody knows how it ended.
        reason: one line; empty when there is nothing to say.
        attempt: number of the newest attempt.
        scheduler: slurm, lsf, ssh or local.
        job_id: the scheduler's id; empty if nothing was submitted.
        host: the host of the submission on a local site, else empty.
        fault_kind: one of `rundir.FAULT_KINDS` for a run that ended badly, else empty.
        fault: the first fault (keys of `rundir.Fault`) of such a run, if one is known.
        result: what rank 0 reported at the end of training.
        start_estimate: when the scheduler expects a pending job to start, ISO 8601 in UTC; else empty.
        epoch: completed epochs, with the fraction of the one that runs.
        epochs: epochs asked for.
        step: optimizer steps done.
        loss: newest training loss.
        accuracy: newest evaluation accuracy, a share.
        train_s: training time so far in seconds.
        time_left_s: seconds of training left at the mean speed so far; only while the run runs.
        limit_left_s: seconds until the attempt's wall-time limit; only while the run runs.
        submitted: time of submission, ISO 8601.
    """

    run: str
    name: str
    exp: str
    site: str
    state: str
    reason: str
    attempt: int
    scheduler: str
    job_id: str
    host: str = ""
    fault_kind: str = ""
    fault: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    start_estimate: str = ""
    epoch: float | None = None
    epochs: int | None = None
    step: int | None = None
    loss: float | None = None
    accuracy: float | None = None
    train_s: float | None = None
    time_left_s: float | None = None
    limit_left_s: float | None = None
    submitted: str = ""

    @property
    def has_ended(self) -> bool:
        """Returns whether nothing more will happen."""
        return self.state not in ("pending", "running")

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, one key per attribute."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Job:
    """The newest job of a run, as its directory tells.

    Attributes:
        scheduler: slurm, lsf, ssh or local.
        job_id: the scheduler's id, or the controller's process id.
        host: where it was submitted.
        start_ticks: with the process id, names the controller for as long as the machine is up.
        utc: when it was submitted.
        has_started: whether an agent has begun the newest attempt.
        is_queued: whether another process will start it; ``job_id`` is then that process's.
        agents: of a job without a scheduler on several hosts: its agents.
    """

    scheduler: str
    job_id: str
    host: str
    start_ticks: int | None
    utc: str
    has_started: bool
    is_queued: bool
    agents: Agents | None = None

    @property
    def is_alive_here(self) -> bool:
        """Returns whether the controller of a local job runs on this machine."""
        return self.start_ticks is not None and processes.start_ticks(int(self.job_id)) == self.start_ticks


@dataclass(frozen=True)
class _Word:
    """A state, and what stands behind it."""

    state: str
    reason: str = ""
    fault_kind: str = ""
    fault: Fault | dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    start: str = ""


def states(runs: Sequence[RunDir]) -> list[RunState]:
    """Returns where each run stands; asks each scheduler once for all of them.

    Raises:
        RunDirError: a run directory is damaged.
    """
    records = [run.record() for run in runs]
    jobs = [newest_job(run) for run in runs]
    ended = [current(run) for run in runs]
    open_jobs = [job for job, status in zip(jobs, ended, strict=True) if job and not status]
    patience = max((float(record["plan"]["command_timeout_s"]) for record in records), default=0.0)
    answers = _answers(open_jobs, patience)
    return [
        _state(run, record, job, _ended_word(status) if status else _word(run, job, answers))
        for run, record, job, status in zip(runs, records, jobs, ended, strict=True)
    ]


def _answers(jobs: Sequence[Job], timeout_s: float) -> dict[str, Answer]:
    """Returns kind of scheduler -> what it says of those of the jobs that are its own."""
    answers = {}
    for kind, scheduler in schedulers.QUEUES.items():
        if asked := [job.job_id for job in jobs if job.scheduler == kind]:
            answers[kind] = scheduler.ask(asked, timeout_s=timeout_s)
    return answers


def current(run: RunDir) -> Status | None:
    """Returns how a run ended; None while it runs, also if only an earlier attempt has ended."""
    status = run.status()
    attempts = run.attempts()
    is_old = status is not None and attempts and status.attempt < attempts[-1].number
    return None if is_old else status


def newest_job(run: RunDir) -> Job | None:
    """Returns the newest submitted job; the scheduler's own restarts keep its id."""
    attempts = run.attempts()
    for attempt in reversed(attempts):
        if attempt.submitted_yaml.exists():
            facts = rundir.read_yaml(attempt.submitted_yaml)
            plan = Plan.from_record(run.plan_record(attempt.number)) if "agents" in facts else None
            return Job(
                scheduler=str(facts["scheduler"]),
                job_id=str(facts["job_id"]),
                host=str(facts.get("host", "")),
                start_ticks=facts.get("start_ticks"),
                utc=str(facts["utc"]),
                has_started=attempts[-1].attempt_yaml.exists() and not attempts[-1].ended_yaml.exists(),
                is_queued=bool(facts.get("queued")),
                agents=Agents.of(run, plan, facts) if plan else None,
            )
    return None


def _ended_word(status: Status) -> _Word:
    kind = str((status.fault or {}).get("kind", ""))
    return _Word(status.state, status.reason, kind, status.fault, status.result)


def _word(run: RunDir, job: Job | None, answers: Mapping[str, Answer]) -> _Word:
    if job is None:
        return _Word("lost", "it was never submitted: submission was interrupted", "unknown")
    scheduler = schedulers.of(job.scheduler)
    if job.agents:
        return _ssh_word(run, job, job.agents)
    if scheduler is None:
        return _local_word(run, job)
    return _queue_word(run, job, scheduler.title, answers[job.scheduler])


def _local_word(run: RunDir, job: Job) -> _Word:
    by_files = "running" if job.has_started else "pending"
    if job.host != socket.gethostname():
        return _Word(by_files, f"started on {job.host}; ask there")
    if job.is_alive_here:
        return _Word(by_files)
    gone = _Word("lost", f"process {job.job_id} on {job.host} is gone and wrote no status", "killed")
    return _by_remains(run, gone, may_be_complete=True)


def _ssh_word(run: RunDir, job: Job, agents: Agents) -> _Word:
    """Returns the word of the hosts: a job without a scheduler lives as long as one of its agents."""
    said = agents.ask("alive")
    if all(each is False for each in said):
        hosts = ", ".join(agents.ssh.names)
        text = f"no agent of job {job.job_id} runs on {hosts}, and it wrote no status"
        return _by_remains(run, _Word("lost", text, "killed"), may_be_complete=True)
    folder = run.attempts()[-1].heartbeats
    beats = [lifeline.read_beat(folder, f"agent{index}") for index in range(len(said))]
    dead = [
        f"agent {index} on {agents.agents[index]['host']} is gone"
        for index, (each, beat) in enumerate(zip(said, beats, strict=True))
        if each is False and (beat is None or beat.phase != lifeline.ENDED)
    ]
    unknown = [f"cannot be asked: {words}" for words in ssh_jobs.complaints(said)]
    return _Word("running" if job.has_started else "pending", "; ".join([*dead, *unknown]))


def _queue_word(run: RunDir, job: Job, title: str, answer: Answer) -> _Word:
    found = answer.jobs.get(job.job_id)
    complaints = "; ".join(answer.complaints)
    by_files = "running" if job.has_started else "pending"
    if found is None and not answer.is_complete:
        return _Word(by_files, f"the scheduler cannot be asked: {complaints}")
    if found is None:
        doubt = f" ({complaints})" if complaints else ""
        text = f"{title} no longer knows job {job.job_id}, and it wrote no status{doubt}"
        return _by_remains(run, _Word("lost", text, "unknown"), may_be_complete=True)
    if found.phase == ENDED and _is_returning(run):
        return _Word("pending", f"it is being put back in the queue ({title}: {found.state})")
    if found.phase == ENDED:
        state, kind, reason = found.ending()
        word = _Word(state, reason, kind)
        return _by_remains(run, word, may_be_complete=found.is_success)
    if found.phase == UNKNOWN:
        return _Word(by_files, f"{title} calls it {found.state}")
    reason = found.waiting() if found.phase == PENDING else found.detail
    return _Word(found.phase, reason, start=found.start if found.phase == PENDING else "")


def _is_returning(run: RunDir) -> bool:
    """Returns whether the newest attempt has just asked to be put back in the queue.

    LSF calls such a job ended for some seconds, then pending again.
    """
    attempt = run.attempts()[-1]
    if not attempt.ended_yaml.exists():
        return False
    facts = rundir.read_yaml(attempt.ended_yaml)
    if facts.get("next") not in ("requeue", "scheduler"):
        return False
    ago = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(facts["utc"])
    return abs(ago.total_seconds()) < RETURN_S


def _by_remains(run: RunDir, word: _Word, *, may_be_complete: bool) -> _Word:
    """Returns what the run directory tells of a job that is gone, or else the scheduler's word.

    Where the scheduler names a cause, such as a node's failure, that is the first one: workers that die of it
    report echoes.
    """
    attempt = run.attempts()[-1]
    if word.state == "cancelled" and attempt.cancel_request.exists():
        return dataclasses.replace(word, reason=remains.cancelled_by(attempt))
    if word.state not in ("failed", "lost") or word.fault_kind not in ("unknown", "killed"):
        return word
    left = remains.read(run, attempt, may_be_complete=may_be_complete)
    if left is None:
        return word
    return _Word(left.state, left.reason, left.fault.kind if left.fault else "", left.fault, left.result)


def _state(run: RunDir, record: Mapping[str, Any], job: Job | None, word: _Word) -> RunState:
    config = record["config"]
    attempts: list[Attempt] = run.attempts()
    epochs = int(config["experiment"]["epochs"])
    progress = _progress(run)
    return RunState(
        run=str(run.path),
        name=run.name,
        exp=str(config["exp_name"]),
        site=str(config["site_name"]),
        state=word.state,
        reason=word.reason,
        fault_kind=word.fault_kind,
        fault=dataclasses.asdict(word.fault) if isinstance(word.fault, Fault) else word.fault,
        result=word.result,
        start_estimate=word.start,
        attempt=attempts[-1].number if attempts else 1,
        scheduler=str(record["plan"]["scheduler"]),
        job_id=job.job_id if job else "",
        host=job.host if job and job.scheduler == "local" else "",
        submitted=job.utc if job else "",
        epochs=epochs,
        **progress,
        **(_time_left(run, attempts[-1], progress, epochs) if word.state == "running" else {}),
    )


def _progress(run: RunDir) -> dict[str, Any]:
    """Returns the newest figures of the metrics, as far as they exist."""
    train = rundir.last_row(run.metrics("train"), TABLES["train"]) or {}
    evaluated = rundir.last_row(run.metrics("eval"), TABLES["eval"]) or {}
    newest = {name: train[name] for name in ("epoch", "step", "loss", "train_s") if name in train}
    return newest | ({"accuracy": evaluated["accuracy"]} if evaluated else {})


def _time_left(run: RunDir, attempt: Attempt, progress: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """Returns the seconds until the end of training at the mean speed so far, and until the limit."""
    done = float(progress.get("epoch", 0.0))
    left = progress["train_s"] / done * max(0.0, epochs - done) if done else None
    limit = None
    if attempt.attempt_yaml.exists():
        started = datetime.datetime.fromisoformat(rundir.read_yaml(attempt.attempt_yaml)["start"])
        gone_s = (datetime.datetime.now(datetime.timezone.utc) - started).total_seconds()
        limit = 60.0 * float(run.plan_record(attempt.number)["walltime_min"]) - gone_s
    return {"time_left_s": left, "limit_left_s": limit}
