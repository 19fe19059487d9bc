"""Whether the turn of a run has come that waits for other runs (``--after``); asked when its job starts.

A scheduler's dependency is on one job, and a run may go on in another: after its time limit where jobs
cannot be requeued, after a node's failure, or resumed by hand. Ending well is also more than an exit status
tells. So the dependency only says that a job is over, and the first agent looks at the runs themselves. If
one of them goes on, the job is given up and a new one waits for the run's newest job; if one has failed, so
has the run that waits for it, and no job stays in the queue that can never start.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from hpcsngd import rundir
from hpcsngd.errors import SchedulerError
from hpcsngd.launch import schedulers, sending, status
from hpcsngd.launch.context import AgentFaultError, Context
from hpcsngd.launch.status import RunState
from hpcsngd.rundir import RunDir

log = logging.getLogger(__name__)

LOOKS = 3
PAUSE_S = 5.0
"""A run that has just ended may have a status that this node does not see yet."""


def has_come(context: Context) -> bool:
    """Returns whether the run may begin; if not, another job has been sent to wait for it.

    Raises:
        AgentFaultError: a run that had to complete did not, or no new job can be submitted.
    """
    if not context.plan.after:
        return True
    found = _settled([rundir.open_run(Path(path)) for path in context.plan.after])
    for state in found:
        if state.has_ended and state.state != "completed":
            told = f" ({state.reason})" if state.reason else ""
            raise AgentFaultError(
                "configuration", f"it was to start after {state.name}, which is {state.state}{told}"
            )
    unfinished = [state.job_id for state in found if not state.has_ended]
    if unfinished:
        _wait_on(context, unfinished)
    return not unfinished


def _settled(runs: Sequence[RunDir]) -> list[RunState]:
    """Returns where runs stand, with patience for the status of those whose job is gone."""
    found: list[RunState] = []
    for look in range(LOOKS):
        if look:
            time.sleep(PAUSE_S)
        # before the states: a status that comes in between would vouch for a state that knew nothing of it
        told = [status.current(run) for run in runs]
        found = status.states(runs)
        if all(word for word, state in zip(told, found, strict=True) if state.has_ended):
            break
    return found


def _wait_on(context: Context, job_ids: Sequence[str]) -> None:
    """Submits this attempt once more, after other jobs, and ends the job that came too early."""
    plan, here = context.plan, context.place
    log.info("not yet: waiting for job(s) %s", ", ".join(job_ids))
    scheduler = schedulers.QUEUES[plan.scheduler]
    try:
        sending.send(context.run, plan, context.attempt.number, **scheduler.after(job_ids))
    except SchedulerError as error:
        text = f"the run that it waits for goes on in job {job_ids[0]}, and no job can wait for that: {error}"
        raise AgentFaultError("configuration", text) from error
    if here.agents > 1:  # the others wait for a rendezvous
        try:
            scheduler.cancel([here.job_id], timeout_s=plan.command_timeout_s)
        except SchedulerError as error:
            log.warning("%s; the launcher ends the other agents soon", error)
