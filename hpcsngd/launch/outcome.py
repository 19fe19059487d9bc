"""How an attempt ended: from exit statuses, recorded faults and signals to a status, or to another attempt.

Agent 0 writes success, and it alone puts a stopped run back in the queue. Any agent that sees a failure
writes the failure, because the scheduler may kill the others at once; all go by the same recorded faults and
the first cause wins, so they write the same. An agent whose workers only lost the connection to others leaves
the word to those, unless they are gone.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from hpcsngd import handover, lifeline, rundir
from hpcsngd.errors import RunFailedError, SchedulerError
from hpcsngd.launch import ownjob, remains, requeue, schedulers, verdict
from hpcsngd.launch.context import AgentFaultError, Context, Ended
from hpcsngd.launch.stop import Stop
from hpcsngd.lifeline import Beat
from hpcsngd.rundir import Fault, Status

log = logging.getLogger(__name__)

SETTLE_S = 3.0
"""Other ranks may be writing an earlier cause; shared file systems show it late."""
FINISHED_WAIT_S = 10.0

# what workers seem to die of when another rank has failed or a signal came
_ECHOES = ("killed", "rendezvous", "unknown")
_STATE_OF_KIND = {"walltime": "timeout", "preempted": "preempted"}
_RESTARTABLE = ("hang", "node_failure")


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    Attributes:
        cause: ``timeout``, ``preempted``, ``cancelled``, ``node_failure``, ``hang``, ``killed`` (where a run
            may go on after that) or ``failed``.
        state: one of `rundir.STATES`.
        reason: one line.
        fault: the first fault, if any.
        is_restarting: whether the scheduler starts the job again, whatever we do.
    """

    cause: str
    state: str
    reason: str
    fault: Fault | None = None
    is_restarting: bool = False


def conclude(context: Context, ended: Ended, stop: Stop) -> None:
    """Records how the workers ended, and sees to it that the run goes on if it may.

    Raises:
        RunFailedError: it ends without success, so that submitit and the scheduler see a failure too.
    """
    context.sign(lifeline.ENDED)
    if ended.by == "itself" and ended.exit_status == 0:
        if context.place.is_leader:
            _complete(context)
        return
    ending = _stopped(context, ended, stop) or _failed(context, ended, stop)
    if ending is not None:
        _finish(context, ending)


def fail(context: Context, error: Exception) -> None:
    """Records a failure of the agent itself."""
    if isinstance(error, AgentFaultError):
        cause = verdict.Verdict(error.kind, str(error), error.evidence)
    else:
        cause = verdict.Verdict("unknown", f"the agent failed: {type(error).__name__}: {error}", [])
    record_fault(context, cause)
    time.sleep(SETTLE_S)
    first = context.attempt.faults()[0]
    _write_status(context, Ending("failed", _STATE_OF_KIND.get(first.kind, "failed"), first.line(), first))


def record_fault(context: Context, cause: verdict.Verdict) -> None:
    """Writes a fault unless one of this agent's ranks has told its own."""
    if any(fault.rank in context.ranks and not fault.is_echo for fault in context.attempt.faults()):
        return
    is_single = context.plan.mode == "per_rank"
    context.attempt.write_fault(
        Fault(
            kind=cause.kind,
            message=cause.message,
            host=context.place.host,
            rank=context.place.index if is_single else None,
            node=context.place.node,
            evidence=cause.evidence,
        )
    )


def _complete(context: Context) -> None:
    attempt = context.attempt
    deadline = time.monotonic() + FINISHED_WAIT_S
    while not attempt.finished_yaml.exists():
        if time.monotonic() > deadline:
            text = "the workers ended with exit status 0 but did not report that training finished"
            record_fault(context, verdict.Verdict("unknown", text, []))
            first = attempt.faults()[0]
            _finish(context, Ending("failed", "failed", first.line(), first))
        time.sleep(0.2)
    result = rundir.read_yaml(attempt.finished_yaml)
    lost = ", ".join(result.get("lost_workers", ()))
    reason = f"went on although {lost}" if lost else ""
    context.run.write_status(Status("completed", reason, attempt.number, result=result))


def _stopped(context: Context, ended: Ended, stop: Stop) -> Ending | None:
    """Returns the ending of workers that were asked to stop; None if they failed."""
    exit_status = verdict.worker_exit(ended.lines, ended.exit_status)
    is_on_request = ended.by == "itself" and (
        exit_status == handover.EXIT_STOPPED or context.attempt.stopped_yaml.exists()
    )
    cause = verdict.classify(ended.lines, exit_status)
    if is_on_request:
        return _stop_ending(context, stop, "checkpointed and left")
    # Some process trackers hand the agent's signal to the workers too; those then end killed or torn.
    is_torn = ended.by == "itself" and stop.is_requested and cause.kind in _ECHOES
    if ended.by != "stop" and not is_torn:
        return None
    if _silent(context, wait_s=0.0 if stop.is_hard else SETTLE_S) or _causes(context):
        return None
    return _stop_ending(context, stop, "were ended")


def _stop_ending(context: Context, stop: Stop, how: str) -> Ending:
    """Returns why workers were asked to stop, from records, the clock, the scheduler and signals."""
    signals = stop.words() or "a stop request"
    if context.attempt.cancel_request.exists():
        text = f"{remains.cancelled_by(context.attempt)}; the workers {how}"
        return Ending("cancelled", "cancelled", text)
    fate = _fate(context) if context.place.is_leader else "unknown"
    if fate not in ("restarting", "preempted") and (stop.is_at_limit or context.is_near_limit):
        text = f"wall time of {context.plan.walltime_min} min reached; the workers {how}"
        return Ending("timeout", "timeout", text)
    if fate == "restarting":
        text = f"the scheduler puts the job back in the queue ({signals}); the workers {how}"
        return Ending("preempted", "preempted", text, is_restarting=True)
    if fate == "ending":
        return Ending("cancelled", "cancelled", f"cancelled ({signals}); the workers {how}")
    is_warned = how == "checkpointed and left" or signal.SIGUSR2 in stop.received
    if is_warned or fate == "preempted":
        return Ending("preempted", "preempted", f"stopped by {signals}; the workers {how}")
    # cancellation and preemption without warning look the same from here
    text = f"stopped by {signals} (cancelled or preempted); the workers {how}"
    return Ending("cancelled", "cancelled", text)


def _fate(context: Context) -> ownjob.Fate:
    scheduler = schedulers.of(context.plan.scheduler)
    if scheduler is None:
        return "unknown"
    job = scheduler.own_job(context.place.job_id, timeout_s=context.plan.command_timeout_s)
    return job.fate(context.place.restarts) if job else "unknown"


def _failed(context: Context, ended: Ended, stop: Stop) -> Ending | None:
    """Returns the ending of workers that failed, first cause first; None if another agent knows better."""
    cause = verdict.classify(ended.lines, verdict.worker_exit(ended.lines, ended.exit_status))
    is_own = ended.by == "itself" and (cause.kind not in _ECHOES or not context.attempt.faults())
    # a rank that was killed could not tell; that its peers lost the connection is no cause
    if ended.by == "itself" and (is_own or (_is_kill(cause) and not _causes(context))):
        record_fault(context, cause)
    silent = _silent(context, wait_s=0.0 if stop.is_hard else SETTLE_S)
    if silent and not [fault for fault in _causes(context) if fault.kind not in ("unknown", "rendezvous")]:
        _record_silence(context, silent, stop)
    faults = context.attempt.faults()
    if not faults:
        record_fault(context, cause)
        faults = context.attempt.faults()
    first = faults[0]
    restartable = _restartable(context)
    if not _speaks(context, silent) and (first.is_echo or first.kind in restartable):
        return None
    kind = first.kind if first.kind in restartable else "failed"
    return Ending(kind, _STATE_OF_KIND.get(first.kind, "failed"), first.line(), first)


def _restartable(context: Context) -> tuple[str, ...]:
    """Returns the kinds of faults after which a run may go on: one agent then acts for all."""
    return (*_RESTARTABLE, "killed") if "killed" in context.plan.restart_on else _RESTARTABLE


def _is_kill(cause: verdict.Verdict) -> bool:
    return cause.kind == "killed"


def _causes(context: Context) -> list[Fault]:
    return [fault for fault in context.attempt.faults() if not fault.is_echo]


def _silent(context: Context, *, wait_s: float) -> list[Beat]:
    """Returns the agents that watched their workers and give no sign of life any more."""
    before = context.agents()
    time.sleep(wait_s)
    own = context.place.index
    return [
        now
        for index, (then, now) in enumerate(zip(before, context.agents(), strict=True))
        if wait_s and index != own and now is not None and now.phase == lifeline.WATCHING and now == then
    ]


def _record_silence(context: Context, silent: Sequence[Beat], stop: Stop) -> None:
    """Records that agents are gone: with their nodes, unless the launcher has noticed and ends the others."""
    # Slurm, too, ends the others of a lost node, but only to start the job again
    is_kill = stop.is_terminated and not (_speaks(context, silent) and _fate(context) == "restarting")
    for beat in silent:
        node = int(beat.name.removeprefix("agent")) // context.plan.agents_per_node
        kind = "killed" if is_kill else "node_failure"
        text = f"the agent of node {node} was killed" if is_kill else f"node {node} fell silent"
        context.attempt.write_fault(Fault(kind, text, beat.host, node=node))


def _speaks(context: Context, silent: Sequence[Beat]) -> bool:
    """Returns whether this agent is the first of those that are left."""
    gone = {int(beat.name.removeprefix("agent")) for beat in silent}
    return context.place.index == min(set(range(context.place.agents)) - gone)


def _finish(context: Context, ending: Ending) -> None:
    """Sends the run into its next attempt, or writes how it ended."""
    if not context.place.is_leader:
        if ending.cause in ("failed", *_restartable(context)):
            _finish_for_others(context, ending)
        return  # a stop: the first agent to leave must not have the launcher end agent 0
    against = requeue.refusal(
        context.run,
        context.plan,
        context.attempt,
        ending.cause,
        restarts=context.place.restarts,
        first_checkpoint=context.first_checkpoint,
    )
    facts = {"state": ending.state, "cause": ending.cause, "reason": ending.reason, "utc": rundir.utc_now()}
    if ending.is_restarting:
        rundir.write_yaml(context.attempt.ended_yaml, {**facts, "next": "scheduler"})
        return
    if against is None:
        try:
            requeue.go_on(context.run, context.plan, context.attempt, context.place, facts)
        except SchedulerError as error:
            against = str(error)
        else:
            return
    note = f"; not restarted: {against}" if ending.cause in context.plan.restart_on else ""
    ending = dataclasses.replace(ending, reason=ending.reason + note)
    _write_status(context, ending)
    raise RunFailedError(ending.reason)


def _finish_for_others(context: Context, ending: Ending) -> None:
    """Writes a failure for agent 0, who may be gone; a node's failure is the scheduler's to restart."""
    # a killed agent 0 is nothing to the scheduler, and the launcher ends this agent soon
    if ending.cause in context.plan.restart_on and ending.cause != "killed":
        facts = {"state": ending.state, "cause": ending.cause, "reason": ending.reason}
        rundir.write_yaml(context.attempt.ended_yaml, {**facts, "utc": rundir.utc_now(), "next": "scheduler"})
        return
    _write_status(context, ending)
    raise RunFailedError(ending.reason)


def _write_status(context: Context, ending: Ending) -> None:
    status = context.run.status()
    if status and status.state == "completed" and status.attempt == context.attempt.number:
        log.warning("the run had completed before this agent failed: %s", ending.reason)
        return
    fault = dataclasses.asdict(ending.fault) if ending.fault else None
    context.run.write_status(Status(ending.state, ending.reason, context.attempt.number, fault=fault))
