"""Cancelling runs: first a note in the run directory, then the scheduler's own cancel.

The note comes first, so that an agent that is ended knows that a person wants the run to stay ended: it does
not requeue. Jobs are cancelled by id, all of one scheduler with one command.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from hpcsngd import rundir
from hpcsngd.errors import SchedulerError
from hpcsngd.launch import remains, schedulers, status
from hpcsngd.launch.queued import AlreadyEndedError
from hpcsngd.launch.ssh import jobs as ssh_jobs
from hpcsngd.launch.ssh.jobs import Agents
from hpcsngd.launch.status import Job, RunState
from hpcsngd.rundir import RunDir, Status


@dataclass(frozen=True)
class Cancelled:
    """What became of one request: the run's state before, and whether it was acted on."""

    run: RunDir
    state: str
    was_sent: bool
    text: str


def cancel(runs: Sequence[RunDir]) -> list[Cancelled]:
    """Cancels runs that have not ended; says of the others that they had.

    Raises:
        RunDirError: a run directory is damaged.
        SchedulerError: the scheduler refuses or does not answer; the notes stay, so asking again is safe.
    """
    found = status.states(runs)
    chosen = [
        (run, state, job)
        for run, state in zip(runs, found, strict=True)
        if not state.has_ended and (job := status.newest_job(run))
    ]
    for run, _, _ in chosen:
        _note(run)
    _cancel_queued(chosen)
    words = {
        run.path: _cancel_agents(job.agents) if job.agents else _cancel_local(job)
        for run, _, job in chosen
        if schedulers.of(job.scheduler) is None
    }
    for run, state, job in chosen:
        # nobody else would: no agent has started
        if state.state == "pending" and not job.has_started and schedulers.of(job.scheduler):
            attempt = run.attempts()[-1]
            run.write_status(Status("cancelled", remains.cancelled_by(attempt), attempt.number))
    sent = {run.path for run, _, _ in chosen}
    return [
        Cancelled(run, state.state, run.path in sent, _text(state, run.path in sent, words.get(run.path, "")))
        for run, state in zip(runs, found, strict=True)
    ]


def _note(run: RunDir) -> None:
    facts = {"utc": rundir.utc_now(), "host": socket.gethostname(), "user": getpass.getuser()}
    rundir.write_yaml(run.attempts()[-1].cancel_request, facts)


def _cancel_queued(chosen: Sequence[tuple[RunDir, RunState, Job]]) -> None:
    for kind, scheduler in schedulers.QUEUES.items():
        ids = [job.job_id for _, _, job in chosen if job.scheduler == kind]
        if not ids:
            continue
        patience = max(float(run.record()["plan"]["command_timeout_s"]) for run, _, _ in chosen)
        # a job that ended meanwhile is no error
        with contextlib.suppress(AlreadyEndedError):
            scheduler.cancel(ids, timeout_s=patience)


def _cancel_local(job: Job) -> str:
    """Asks the controller of a local job to end it; it hands the request on to its agents."""
    if job.is_queued:
        return "it will not be started"
    if job.host != socket.gethostname():
        raise SchedulerError(f"process {job.job_id} runs on {job.host}: cancel it there")
    if not job.is_alive_here:
        return "its process is gone"
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(job.job_id), signal.SIGTERM)
    return "its workers are asked to leave"


def _cancel_agents(agents: Agents) -> str:
    """Asks the agents of a job on several hosts; one that is not reached reads the note in time."""
    said = agents.ask("end", is_hard=False)
    late = "; its agent will see the note in the run directory"
    unknown = [f"{words}{late}" for words in ssh_jobs.complaints(said)]
    return "; ".join(["its workers are asked to leave", *unknown])


def _text(state: RunState, was_sent: bool, words: str) -> str:
    if not was_sent:
        return f"had ended already: {state.state}"
    scheduler = schedulers.of(state.scheduler)
    local = f"process {state.job_id}" if state.host else f"job {state.job_id}"
    where = f"{scheduler.title} job {state.job_id}" if scheduler else local
    return f"cancelled ({where}, was {state.state}{'; ' + words if words else ''})"
