"""Submission and waiting: from a resolved configuration to a job, and from a job to its status.

The run directory is made before the job, so that nothing is lost. If the scheduler refuses the job or does
not answer, the directory stays, with a failed status that quotes it; the script is in its ``submit/``.
"""

from __future__ import annotations

import dataclasses
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcsngd import rundir
from hpcsngd.config.resolve import Resolved
from hpcsngd.errors import SchedulerError
from hpcsngd.launch import plan, preflight, provenance, schedulers, sending, status, usage
from hpcsngd.launch.plan import Directive, Plan
from hpcsngd.rundir import Fault, RunDir, Status

ENDED_POLLS = 3
"""A job must be gone in so many polls before its silence counts: its status may be on its way to us."""


FILES_POLL_S = 2.0
"""Files may be asked more often than the scheduler."""


@dataclass(frozen=True)
class Submitted:
    """A submitted run and the scheduler's id of its job (the controller's process id on a local site)."""

    run: RunDir
    job_id: str


def submit(
    resolved: Resolved,
    *,
    argv: Sequence[str],
    run_root: Path | None = None,
    worker: str = plan.WORKER,
    directives: Mapping[str, Directive] | None = None,
    after: Sequence[RunDir] = (),
    probe: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> Submitted:
    """Makes a run directory and submits its first attempt.

    Args:
        resolved: the checked configuration.
        argv: the command line, for the record.
        run_root: folder in which the run directory is made; default: the site's.
        worker: the module that a worker runs; only tests change it.
        directives: more directives for this submission, such as ``hold``; see `hpcsngd.launch.order`.
        after: runs that must have completed when this one begins, as the directives say to the scheduler.
        probe: whether to try the workers' Python on a node first.
        origin: what the run was made from, such as ``{"rerun_of": name}``; goes into the provenance.

    Raises:
        ConfigError: the configuration holds what looks like a secret.
        PreflightError: the request cannot work on this site, or the run root cannot be written.
        SchedulerError: the scheduler is missing, refuses or does not answer.
    """
    root = (run_root or Path(resolved.site.run_root)).expanduser().absolute()
    checked = preflight.check(resolved, run_root=root, worker=worker, probe=probe)
    made = dataclasses.replace(checked, after=paths(after))
    need_scheduler(made)
    record = {
        "config": resolved.to_record(),
        "plan": made.to_record(),
        "provenance": provenance.collect(argv, image=made.image) | dict(origin or {}),
    }
    run = rundir.create(root, made.job_name, record)
    try:
        job_id = sending.send(run, made, 1, **(directives or {}))
    except SchedulerError as error:
        reason = f"not submitted: {error}"
        fault = Fault("configuration", reason, socket.gethostname(), node=0)
        run.write_status(Status("failed", reason, 1, fault=dataclasses.asdict(fault)))
        raise SchedulerError(f"{error} (recorded in {run.path})") from error
    return Submitted(run, job_id)


def paths(runs: Sequence[RunDir]) -> tuple[str, ...]:
    """Returns where runs are, as a plan has it."""
    return tuple(str(run.path.absolute()) for run in runs)


def need_scheduler(made: Plan) -> None:
    """Refuses to go on where the plan's scheduler cannot be reached.

    Raises:
        SchedulerError: its commands are not in PATH.
    """
    scheduler = schedulers.of(made.scheduler)
    if made.ssh and shutil.which("ssh") is None:
        raise SchedulerError(f"ssh is not in PATH, but site {made.site_name} reaches its hosts by it")
    if scheduler and shutil.which(scheduler.submit_program) is None:
        raise SchedulerError(
            f"{scheduler.submit_program} is not in PATH, but site {made.site_name} needs {scheduler.title}: "
            "submit from a login node (--dry-run works anywhere)"
        )


def wait(
    run: RunDir,
    *,
    poll_s: float | None = None,
    on_update: Callable[[status.RunState], None] | None = None,
) -> Status:
    """Waits until a run has ended and returns its status.

    A job that is gone without a status gets one here, from what it left and the scheduler's word. While
    the scheduler cannot be asked, waiting goes on. Ctrl-C raises KeyboardInterrupt and changes nothing: the
    run goes on.

    Args:
        run: the run.
        poll_s: seconds between looks; default: the site's.
        on_update: called after each look.

    Raises:
        RunDirError: the run directory is damaged.
    """
    pause_s = poll_s if poll_s is not None else float(run.record()["config"]["site"]["scheduler"]["poll_s"])
    silent_polls = 0
    while True:
        state = status.states([run])[0]
        if on_update:
            on_update(state)
        silent_polls = silent_polls + 1 if state.has_ended else 0
        found = status.current(run)
        if found or silent_polls >= ENDED_POLLS:
            usage.settle(run)
            return found or _write_ending(run, state)
        _pause(run, pause_s)


def _pause(run: RunDir, pause_s: float) -> None:
    """Waits before the next question to the scheduler, or until the run's own status is there."""
    end = time.monotonic() + pause_s
    while (left_s := end - time.monotonic()) > 0 and not status.current(run):
        time.sleep(min(FILES_POLL_S, left_s))


def _write_ending(run: RunDir, state: status.RunState) -> Status:
    """Writes the status of a run whose job is gone without one."""
    name, reason, fault = state.state, state.reason, state.fault
    if name != "completed" and fault is None:
        name = "failed" if name == "lost" else name
        kind = state.fault_kind or "killed"
        made = Fault(kind, reason, state.host or socket.gethostname(), node=0)
        reason, fault = made.line(), dataclasses.asdict(made)
    ending = Status(name, reason, state.attempt, fault=fault, result=state.result)
    run.write_status(ending)
    return ending
