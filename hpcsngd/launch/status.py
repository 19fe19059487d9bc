"""Where runs stand, from their directories and one question to the scheduler.

A run's own status comes first. Without one, the scheduler says whether the job waits, runs or is gone; a job
that is gone without a status has not succeeded, whatever the scheduler calls its end.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcsngd import rundir
from hpcsngd.launch import processes, slurm
from hpcsngd.rundir import Attempt, RunDir, Status
from hpcsngd.tables import TABLES


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
        scheduler: slurm or local.
        job_id: the scheduler's id; empty if nothing was submitted.
        host: the host of the submission on a local site, else empty.
        fault_kind: one of `rundir.FAULT_KINDS` for a run that ended badly, else empty.
        epoch: completed epochs, with the fraction of the one that runs.
        epochs: epochs asked for.
        step: optimizer steps done.
        loss: newest training loss.
        accuracy: newest evaluation accuracy, a share.
        train_s: training time so far in seconds.
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
    epoch: float | None = None
    epochs: int | None = None
    step: int | None = None
    loss: float | None = None
    accuracy: float | None = None
    train_s: float | None = None
    submitted: str = ""

    @property
    def has_ended(self) -> bool:
        """Returns whether nothing more will happen."""
        return self.state not in ("pending", "running")

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, one key per attribute."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Job:
    """The newest job of a run, as its directory tells."""

    scheduler: str
    job_id: str
    host: str
    start_ticks: int | None
    utc: str
    has_started: bool


@dataclass(frozen=True)
class _Word:
    """A state, and what stands behind it."""

    state: str
    reason: str = ""
    fault_kind: str = ""


def states(runs: Sequence[RunDir]) -> list[RunState]:
    """Returns where each run stands; asks each scheduler once for all of them.

    Raises:
        RunDirError: a run directory is damaged.
    """
    jobs = [_newest_job(run) for run in runs]
    ended = [current(run) for run in runs]
    asked = [
        job.job_id
        for job, status in zip(jobs, ended, strict=True)
        if job and not status and job.scheduler == "slurm"
    ]
    answer = slurm.ask(asked, timeout_s=_patience(runs)) if asked else slurm.Answer({})
    return [
        _state(run, job, _ended_word(status) if status else _word(job, answer))
        for run, job, status in zip(runs, jobs, ended, strict=True)
    ]


def current(run: RunDir) -> Status | None:
    """Returns how a run ended; None while it runs, also if only an earlier attempt has ended."""
    status = run.status()
    attempts = run.attempts()
    is_old = status is not None and attempts and status.attempt < attempts[-1].number
    return None if is_old else status


def _patience(runs: Sequence[RunDir]) -> float:
    """Returns the seconds to give a scheduler's command: the longest that a site of these runs allows."""
    return max(float(run.record()["plan"]["command_timeout_s"]) for run in runs)


def _newest_job(run: RunDir) -> _Job | None:
    """Returns the newest submitted job; the scheduler's own restarts keep its id."""
    attempts = run.attempts()
    for attempt in reversed(attempts):
        if attempt.submitted_yaml.exists():
            facts = rundir.read_yaml(attempt.submitted_yaml)
            return _Job(
                scheduler=str(facts["scheduler"]),
                job_id=str(facts["job_id"]),
                host=str(facts.get("host", "")),
                start_ticks=facts.get("start_ticks"),
                utc=str(facts["utc"]),
                has_started=attempts[-1].attempt_yaml.exists(),
            )
    return None


def _ended_word(status: Status) -> _Word:
    return _Word(status.state, status.reason, str((status.fault or {}).get("kind", "")))


def _word(job: _Job | None, answer: slurm.Answer) -> _Word:
    if job is None:
        return _Word("lost", "it was never submitted: submission was interrupted", "unknown")
    return _local_word(job) if job.scheduler == "local" else _slurm_word(job, answer)


def _local_word(job: _Job) -> _Word:
    by_files = "running" if job.has_started else "pending"
    if job.host != socket.gethostname():
        return _Word(by_files, f"started on {job.host}; ask there")
    if job.start_ticks is not None and processes.start_ticks(int(job.job_id)) == job.start_ticks:
        return _Word(by_files)
    return _Word("lost", f"process {job.job_id} on {job.host} is gone and wrote no status", "killed")


def _slurm_word(job: _Job, answer: slurm.Answer) -> _Word:
    found = answer.jobs.get(job.job_id)
    complaints = "; ".join(answer.complaints)
    if found is None and answer.is_complete:
        doubt = f" ({complaints})" if complaints else ""
        return _Word(
            "lost", f"Slurm no longer knows job {job.job_id}, and it wrote no status{doubt}", "unknown"
        )
    if found is None:
        by_files = "running" if job.has_started else "pending"
        return _Word(by_files, f"the scheduler cannot be asked: {complaints}")
    if found.phase == slurm.ENDED:
        state, kind, reason = found.ending()
        return _Word(state, reason, kind)
    if found.phase == slurm.UNKNOWN:
        return _Word("running" if job.has_started else "pending", f"Slurm calls it {found.state}")
    return _Word(found.phase, found.detail)


def _state(run: RunDir, job: _Job | None, word: _Word) -> RunState:
    record = run.record()
    config = record["config"]
    attempts: list[Attempt] = run.attempts()
    return RunState(
        run=str(run.path),
        name=run.name,
        exp=str(config["exp_name"]),
        site=str(config["site_name"]),
        state=word.state,
        reason=word.reason,
        fault_kind=word.fault_kind,
        attempt=attempts[-1].number if attempts else 1,
        scheduler=str(record["plan"]["scheduler"]),
        job_id=job.job_id if job else "",
        host=job.host if job and job.scheduler == "local" else "",
        submitted=job.utc if job else "",
        epochs=int(config["experiment"]["epochs"]),
        **_progress(run),
    )


def _progress(run: RunDir) -> Mapping[str, Any]:
    """Returns the newest figures of the metrics, as far as they exist."""
    train = rundir.last_row(run.metrics("train"), TABLES["train"]) or {}
    evaluated = rundir.last_row(run.metrics("eval"), TABLES["eval"]) or {}
    newest = {name: train[name] for name in ("epoch", "step", "loss", "train_s") if name in train}
    return newest | ({"accuracy": evaluated["accuracy"]} if evaluated else {})
