"""What a job that is gone has left in its run directory: the word of files where the scheduler's is missing.

An agent that is killed writes no status. Then the faults of its workers, the result of training, a cancel
request and what Slurm wrote into the job's own log still tell how it ended. Nothing here turns silence into
success: only rank 0's own report of the end of training does that.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcsngd import rundir
from hpcsngd.launch import verdict
from hpcsngd.rundir import Attempt, Fault, RunDir

STATE_OF_KIND = {"walltime": "timeout", "preempted": "preempted", "cancelled": "cancelled"}
_TAIL_BYTES = 32768


@dataclass(frozen=True)
class Ending:
    """How an attempt ended, as far as files tell: a state, a line, and the fault or the result behind it."""

    state: str
    reason: str
    fault: Fault | None = None
    result: dict[str, Any] | None = None


def read(run: RunDir, attempt: Attempt, *, may_be_complete: bool) -> Ending | None:
    """Returns how an attempt without a status ended; None if its files do not tell.

    Args:
        run: the run.
        attempt: the attempt whose job is gone.
        may_be_complete: whether the scheduler leaves it open that the job succeeded.
    """
    if attempt.cancel_request.exists():
        return Ending("cancelled", cancelled_by(attempt))
    # an echo says that another process ended, not why
    if faults := [fault for fault in attempt.faults() if not fault.is_echo]:
        return _failed(faults[0])
    if may_be_complete and attempt.finished_yaml.exists():
        result = rundir.read_yaml(attempt.finished_yaml)
        return Ending("completed", "training reached its end; its agent left no status", result=result)
    return _first_verdict(run, attempt)


def cancelled_by(attempt: Attempt) -> str:
    """Returns who asked for the end of an attempt, in one line."""
    if not attempt.cancel_request.stat().st_size:
        return "cancelled"  # a note made by hand
    facts = rundir.read_yaml(attempt.cancel_request)
    return f"cancelled by {facts['user']} on {facts['host']}, {facts['utc']}"


def _failed(fault: Fault) -> Ending:
    return Ending(STATE_OF_KIND.get(fault.kind, "failed"), fault.line(), fault)


def _first_verdict(run: RunDir, attempt: Attempt) -> Ending | None:
    """Returns the ending that the logs name without doubt, the scheduler's own words first."""
    for file in _logs(run, attempt):
        found = verdict.recognize(_tail(file))
        if found:
            fault = Fault(
                kind=found.kind,
                message=found.message,
                host=found.host or _host(attempt),
                utc=found.utc or rundir.utc_of(file.stat().st_mtime),
                node=0,
                evidence=found.evidence,
            )
            is_slurms = bool(found.utc)  # only slurmstepd dates its words so
            if found.kind == "killed" and is_slurms:
                return Ending("cancelled", fault.line(), fault)
            return _failed(fault)
    return None


def _logs(run: RunDir, attempt: Attempt) -> Iterator[Path]:
    """Yields the logs of an attempt: that of its job, then those of its nodes and ranks."""
    if attempt.submitted_yaml.exists():
        job_id = rundir.read_yaml(attempt.submitted_yaml)["job_id"]
        yield from sorted(run.submit_dir.glob(f"{job_id}_*log.err"))
    yield from sorted(attempt.logs.glob("*.err"))


def _host(attempt: Attempt) -> str:
    if attempt.attempt_yaml.exists():
        return str(rundir.read_yaml(attempt.attempt_yaml)["hosts"][0])
    return socket.gethostname()


def _tail(file: Path) -> list[str]:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        return stream.read().decode("utf-8", errors="replace").splitlines()
