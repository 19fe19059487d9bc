"""A run that was stopped goes on: whether it may, and how its next attempt gets into the queue.

The agent of node 0 sees to it from inside the job, so the host that submitted may be gone, and nothing else
has to run anywhere. The scheduler's own requeue keeps the job and its id. Where that is refused or missing,
the agent submits a new job for the same run that waits for the end of this one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hpcsngd import rundir
from hpcsngd.errors import SchedulerError
from hpcsngd.launch import schedulers, sending
from hpcsngd.launch.place import Place
from hpcsngd.launch.plan import Plan
from hpcsngd.rundir import Attempt, RunDir

log = logging.getLogger(__name__)


def refusal(
    run: RunDir, plan: Plan, attempt: Attempt, cause: str, *, restarts: int, first_checkpoint: str
) -> str | None:
    """Returns why a run must not go on after an attempt, as words for people; None if it may.

    Args:
        run: the run.
        plan: its plan.
        attempt: the one that ended.
        cause: why it ended: ``timeout``, ``preempted``, ``node_failure``, ``hang`` or anything else.
        restarts: how often the scheduler has started this job again.
        first_checkpoint: the newest one when the attempt began.
    """
    if cause not in plan.restart_on:
        is_queued = schedulers.of(plan.scheduler) is not None
        return f"restart.on has no {cause}" if is_queued else "local runs are not restarted"
    if attempt.cancel_request.exists():
        return "it was cancelled"
    number = attempts_in_a_row(run, attempt, restarts)
    if number >= plan.max_attempts:
        return f"attempt {number} of restart.max_attempts {plan.max_attempts}"
    if cause == "timeout" and run.newest_checkpoint() == first_checkpoint:
        return "it came to no new checkpoint, and another attempt of this length would not either"
    return None


def attempts_in_a_row(run: RunDir, attempt: Attempt, restarts: int) -> int:
    """Returns the number of an attempt in its chain; a resume by hand begins a new one.

    Args:
        run: the run.
        attempt: the attempt.
        restarts: how often the scheduler has started its job again, perhaps without a word from an agent.
    """
    first = attempt.number - restarts
    while first > 1 and run.attempt(first - 1).ended_yaml.exists():
        first -= 1
    return attempt.number - first + 1


def go_on(run: RunDir, plan: Plan, attempt: Attempt, place: Place, facts: Mapping[str, Any]) -> None:
    """Puts the run back in the queue; writes ``ended.yaml`` with the facts and with how it goes on.

    After a requeue the scheduler ends this job at once, so nothing may be left to do.

    Raises:
        SchedulerError: neither way works; with both reasons.
    """
    job_id, scheduler = place.job_id, schedulers.QUEUES[plan.scheduler]
    rundir.write_yaml(attempt.ended_yaml, {**facts, "next": "requeue", "job_id": job_id})
    try:
        scheduler.requeue(job_id, timeout_s=plan.command_timeout_s)
    except SchedulerError as error:
        job = scheduler.own_job(job_id, timeout_s=plan.command_timeout_s)
        if job and job.fate(place.restarts) == "restarting":
            # the scheduler was quicker: it has noticed the lost node, too
            rundir.write_yaml(attempt.ended_yaml, {**facts, "next": "scheduler", "job_id": job_id})
            return
        log.info("%s; submitting a new job instead", error)
        new_id = _resubmit(run, plan, attempt, job_id, because=error)
        rundir.write_yaml(attempt.ended_yaml, {**facts, "next": "resubmit", "job_id": new_id})


def _resubmit(run: RunDir, plan: Plan, attempt: Attempt, job_id: str, *, because: SchedulerError) -> str:
    # afterany: this job's exit status says nothing, but two attempts must not run at once
    try:
        wait = schedulers.QUEUES[plan.scheduler].after([job_id], succeeded=False)
        return sending.send(run, plan, attempt.number + 1, **wait)
    except SchedulerError as error:
        attempt.ended_yaml.unlink()
        raise SchedulerError(f"{because}; {error}") from error
