"""How an attempt ended: from exit statuses, recorded faults and signals to ``status.yaml``.

Agent 0 writes success. Any agent that sees a failure writes the failure, because the scheduler may kill the
others at once; all go by the same recorded faults and the first cause wins, so they write the same.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import time
from dataclasses import dataclass, field
from typing import Literal

from hpcsngd import handover, rundir
from hpcsngd.errors import RunFailedError
from hpcsngd.launch import remains, verdict
from hpcsngd.launch.place import Place
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.stop import Stop
from hpcsngd.rundir import Attempt, Fault, RunDir, Status

log = logging.getLogger(__name__)

SETTLE_S = 3.0
"""Other ranks may be writing an earlier cause; shared file systems show it late."""
FINISHED_WAIT_S = 10.0
LIMIT_MARGIN_S = 150.0
"""A stop signal so close to the limit is the limit's: warned 90 s ahead, by a check every 30 s."""

# what workers seem to die of when another rank has failed or a signal came
_ECHOES = ("killed", "rendezvous", "unknown")
_STATE_OF_KIND = {"walltime": "timeout", "preempted": "preempted"}


class AgentFaultError(Exception):
    """Something that keeps an agent from starting its workers."""

    def __init__(self, kind: str, message: str, evidence: list[str] | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.evidence = evidence or []


@dataclass(frozen=True)
class Context:
    """What an agent works on; ``started`` is its start on the monotonic clock, in seconds."""

    run: RunDir
    plan: Plan
    place: Place
    attempt: Attempt
    started: float

    @property
    def ranks(self) -> range:
        """Returns the ranks that this agent starts."""
        if self.plan.mode == "per_rank":
            return range(self.place.index, self.place.index + 1)
        first = self.place.node * self.plan.ranks_per_node
        return range(first, first + self.plan.ranks_per_node)

    @property
    def is_near_limit(self) -> bool:
        """Returns whether the wall time is nearly used up."""
        limit_s = self.plan.walltime_min * 60
        return time.monotonic() - self.started >= limit_s - min(LIMIT_MARGIN_S, limit_s / 2)


@dataclass(frozen=True)
class Ended:
    """How the workers of one generation ended.

    Attributes:
        by: ``itself``; or ended by the agent because of a ``stop`` signal, a failed ``peer``, or because the
            rendezvous ``moved``.
        exit_status: of the shell or torchrun; negative for a signal.
        lines: the last lines that were written.
    """

    by: Literal["itself", "stop", "peer", "moved"]
    exit_status: int
    lines: list[str] = field(repr=False)


def conclude(context: Context, ended: Ended, stop: Stop) -> None:
    """Records how the workers ended.

    Raises:
        RunFailedError: without success, so that submitit and the scheduler see a failure too.
    """
    if ended.by == "itself" and ended.exit_status == 0:
        if context.place.is_leader:
            _complete(context)
        return
    exit_status = verdict.worker_exit(ended.lines, ended.exit_status)
    is_on_request = ended.by == "itself" and exit_status == handover.EXIT_STOPPED
    cause = verdict.classify(ended.lines, exit_status)
    if is_on_request or (_is_consequence(ended, cause, stop) and not _settled_faults(context, stop)):
        raise RunFailedError(_stopped(context, stop, is_on_request))
    if not context.attempt.faults() or (ended.by == "itself" and cause.kind not in _ECHOES):
        _record_own_fault(context, cause)
    raise RunFailedError(_failed(context))


def _is_consequence(ended: Ended, cause: verdict.Verdict, stop: Stop) -> bool:
    """Returns whether the workers ended because of a stop signal.

    Some process trackers (linuxproc, and Slurm's own for SIGTERM) hand the agent's signal to the workers too;
    those then end by themselves, killed or with a torn connection.
    """
    return ended.by == "stop" or (ended.by == "itself" and stop.is_requested and cause.kind in _ECHOES)


def fail(context: Context, error: Exception) -> None:
    """Records a failure of the agent itself."""
    if isinstance(error, AgentFaultError):
        cause = verdict.Verdict(error.kind, str(error), error.evidence)
    else:
        cause = verdict.Verdict("unknown", f"the agent failed: {type(error).__name__}: {error}", [])
    _record_own_fault(context, cause)
    _failed(context)


def _complete(context: Context) -> None:
    attempt = context.attempt
    deadline = time.monotonic() + FINISHED_WAIT_S
    while not attempt.finished_yaml.exists():
        if time.monotonic() > deadline:
            text = "the workers ended with exit status 0 but did not report that training finished"
            _record_own_fault(context, verdict.Verdict("unknown", text, []))
            raise RunFailedError(_failed(context))
        time.sleep(0.2)
    result = rundir.read_yaml(attempt.finished_yaml)
    context.run.write_status(Status("completed", "", attempt.number, result=result))


def _stopped(context: Context, stop: Stop, is_on_request: bool) -> str:
    """Writes the status of an attempt that was asked to stop; returns its reason."""
    how = "checkpointed and left" if is_on_request else "were ended"
    signals = stop.words() or "a stop request"
    if context.attempt.cancel_request.exists():
        state, reason = "cancelled", f"{remains.cancelled_by(context.attempt)}; the workers {how}"
    elif context.is_near_limit:
        state, reason = "timeout", f"wall time of {context.plan.walltime_min} min reached; the workers {how}"
    elif is_on_request or signal.SIGUSR2 in stop.received:
        state, reason = "preempted", f"stopped by {signals}; the workers {how}"
    else:
        # cancellation and preemption without warning look the same from here; the scheduler knows
        state, reason = "cancelled", f"stopped by {signals} (cancelled or preempted); the workers {how}"
    if context.place.is_leader:
        context.run.write_status(Status(state, reason, context.attempt.number))
    return reason


def _settled_faults(context: Context, stop: Stop | None = None) -> list[Fault]:
    """Returns the attempt's faults after giving other ranks a moment, if there is one, to write theirs."""
    if stop is None or not stop.is_hard:
        time.sleep(SETTLE_S)
    return context.attempt.faults()


def _record_own_fault(context: Context, cause: verdict.Verdict) -> None:
    """Writes a fault unless one of this agent's ranks has told its own."""
    if any(fault.rank in context.ranks for fault in context.attempt.faults()):
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


def _failed(context: Context) -> str:
    """Writes the failed status, first cause first; returns its reason."""
    first = _settled_faults(context)[0]
    status = context.run.status()
    if status and status.state == "completed" and status.attempt == context.attempt.number:
        log.warning("the run had completed before this agent failed: %s", first.line())
        return first.line()
    state = _STATE_OF_KIND.get(first.kind, "failed")
    context.run.write_status(
        Status(state, first.line(), context.attempt.number, fault=dataclasses.asdict(first))
    )
    return first.line()
