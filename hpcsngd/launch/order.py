"""When a job may start: after other runs (``--after``), or when a person lets it go (``--hold``)."""

from __future__ import annotations

from collections.abc import Sequence

from hpcsngd.errors import PreflightError
from hpcsngd.launch import schedulers, status
from hpcsngd.launch.plan import Directive
from hpcsngd.rundir import RunDir


def directives(scheduler: str, *, after: Sequence[RunDir] = (), hold: bool = False) -> dict[str, Directive]:
    """Returns what to ask the scheduler for; nothing for runs that have completed already.

    The job waits for the end of each run's newest job, however it ends; whether the run has completed by
    then, goes on in another job or has failed is seen to when the job starts (`hpcsngd.launch.turn`).

    Args:
        scheduler: ``slurm``, ``lsf`` or ``local``.
        after: runs that must complete first.
        hold: whether the job waits for ``scontrol release`` or ``bresume``.

    Raises:
        PreflightError: a run that can no longer complete, or a site without a queue.
    """
    queue = schedulers.of(scheduler)
    if not (after or hold):
        return {}
    if queue is None:
        raise PreflightError(
            "--after and --hold need a scheduler with a queue; this site starts jobs at once"
        )
    wanted: dict[str, Directive] = dict(queue.held) if hold else {}
    found = status.states(after)
    if problems := [text for state in found if (text := _objection(state, scheduler))]:
        raise PreflightError("\n".join(problems))
    if waiting := [state.job_id for state in found if not state.has_ended]:
        wanted |= queue.after(waiting)
    return wanted


def _objection(state: status.RunState, scheduler: str) -> str:
    if state.has_ended and state.state != "completed":
        return f"--after {state.name}: it is {state.state} ({state.reason}), so it will not complete"
    if not state.has_ended and state.scheduler != scheduler:
        return f"--after {state.name}: it runs without a scheduler that could be told to wait for it"
    return ""
