"""A run that was stopped goes on: whether it may, and how its next attempt gets into the queue.

The agent of node 0 sees to it from inside the job, so the host that submitted may be gone, and nothing else
has to run anywhere. The scheduler's own requeue keeps the job and its id. Where that is refused or missing,
the agent submits a new job for the same run that waits for the end of this one.

After a node's failure it is always a new job, told to keep off that node. Slurm takes a node for alive until
it has been silent for minutes; a requeued job was seen to start on the dead node within a second, and its
batch step on the others to die of the signal that was meant for the step before (Slurm 22.05). A new job has
an id of its own, and starts when the old one is over on all nodes: then Slurm knows of the loss, too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
        return f"restart.on has no {cause}" if is_queued else f"{plan.scheduler} runs are not restarted"
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

    After a requeue or the loss of a node the scheduler ends this job at once, so nothing may be left to do.

    Raises:
        SchedulerError: no way works; with all reasons.
    """
    lost = lost_hosts(plan, attempt, place)
    if lost:
        _leave(run, plan, attempt, place, {**facts, "lost_hosts": lost})
        return
    job_id, scheduler = place.job_id, schedulers.QUEUES[plan.scheduler]
    rundir.write_yaml(attempt.ended_yaml, {**facts, "next": "requeue", "job_id": job_id})
    try:
        scheduler.requeue(job_id, timeout_s=plan.command_timeout_s)
    except SchedulerError as error:
        if _is_restarting(plan, attempt, place, facts):
            return
        log.info("%s; submitting a new job instead", error)
        _resubmit(run, plan, attempt, job_id, facts, because=f"{error}; ")


def lost_hosts(plan: Plan, attempt: Attempt, place: Place) -> list[str]:
    """Returns the hosts of an attempt whose nodes failed, by the scheduler's names, in their order."""
    failed = [fault for fault in attempt.faults() if fault.kind == "node_failure"]
    nodes = {
        fault.node if fault.node is not None else (fault.rank or 0) // plan.ranks_per_node for fault in failed
    }
    return [place.hosts[node] for node in sorted(nodes)]


def _leave(run: RunDir, plan: Plan, attempt: Attempt, place: Place, facts: Mapping[str, Any]) -> None:
    """Submits a job that keeps off the lost nodes, and gives up this one, which cannot end by itself."""
    if _is_restarting(plan, attempt, place, facts):
        return
    _resubmit(run, plan, attempt, place.job_id, facts)
    try:
        # srun would wait for the lost node, and Slurm restart the job as soon as it notices
        schedulers.QUEUES[plan.scheduler].cancel([place.job_id], timeout_s=plan.command_timeout_s)
    except SchedulerError as error:
        log.warning("%s; if the scheduler starts job %s again, it will leave at once", error, place.job_id)


def _is_restarting(plan: Plan, attempt: Attempt, place: Place, facts: Mapping[str, Any]) -> bool:
    """Returns whether the scheduler was quicker and starts the job again; records that if so."""
    job = schedulers.QUEUES[plan.scheduler].own_job(place.job_id, timeout_s=plan.command_timeout_s)
    if job is None or job.fate(place.restarts) != "restarting":
        return False
    rundir.write_yaml(attempt.ended_yaml, {**facts, "next": "scheduler", "job_id": place.job_id})
    return True


def _resubmit(
    run: RunDir, plan: Plan, attempt: Attempt, job_id: str, facts: Mapping[str, Any], *, because: str = ""
) -> None:
    lost = [*_lost_before(run, attempt), *facts.get("lost_hosts", [])]
    try:
        new_id = _send_next(run, plan, attempt.number + 1, job_id, lost)
    except SchedulerError as error:
        attempt.ended_yaml.unlink(missing_ok=True)
        raise SchedulerError(f"{because}{error}") from error
    rundir.write_yaml(attempt.ended_yaml, {**facts, "next": "resubmit", "job_id": new_id})


def _lost_before(run: RunDir, attempt: Attempt) -> list[str]:
    """Returns the hosts that earlier attempts of this row have lost."""
    lost: list[str] = []
    number = attempt.number - 1
    while number >= 1 and run.attempt(number).ended_yaml.exists():
        lost = [*rundir.read_yaml(run.attempt(number).ended_yaml).get("lost_hosts", []), *lost]
        number -= 1
    return lost


def _send_next(run: RunDir, plan: Plan, number: int, job_id: str, lost: Sequence[str]) -> str:
    # after any end: this job's exit status says nothing, but two attempts must not run at once
    scheduler = schedulers.QUEUES[plan.scheduler]
    wait = scheduler.after([job_id])
    if away := scheduler.avoid(lost, plan.directives) if lost else {}:
        try:
            return sending.send(run, plan, number, **wait, **away)
        except SchedulerError as error:
            # too few nodes may be left; nothing is started on a node that is known to be down
            log.warning("%s; asking again without keeping off %s", error, ", ".join(lost))
    return sending.send(run, plan, number, **wait)
