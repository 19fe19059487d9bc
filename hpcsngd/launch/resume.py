"""Going on with a run, or doing it again: ``resume`` adds an attempt, ``rerun`` makes a new run."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcsngd import rundir
from hpcsngd.config import resolve
from hpcsngd.config.resolve import Override, Resolved
from hpcsngd.errors import ConfigError, PreflightError
from hpcsngd.launch import preflight, provenance, status
from hpcsngd.launch.plan import Directive
from hpcsngd.launch.sending import send
from hpcsngd.launch.submit import Submitted, need_scheduler, paths, submit
from hpcsngd.rundir import RunDir

_MAY_CHANGE = ("site.", "experiment.resources.")


def resume(
    run: RunDir,
    overrides: Sequence[Override] = (),
    *,
    argv: Sequence[str],
    directives: Mapping[str, Directive] | None = None,
    after: Sequence[RunDir] = (),
    probe: bool = False,
) -> Submitted:
    """Submits another attempt of a run that has ended; it goes on from the newest checkpoint.

    Args:
        run: the run.
        overrides: what to ask for instead: resources and keys of the site. What is trained stays.
        argv: the command line, for the record.
        directives: more directives for this submission.
        after: as for `hpcsngd.launch.submit.submit`.
        probe: as for `hpcsngd.launch.submit.submit`.

    Raises:
        ConfigError: an override that would make another experiment of it.
        PreflightError: the run goes on, has completed, or cannot work like this.
        SchedulerError: the scheduler is missing, refuses or does not answer; nothing has changed then.
    """
    _refuse_another_experiment(overrides)
    state = status.states([run])[0]
    if not state.has_ended:
        raise PreflightError(
            f"{run.name} is {state.state} (job {state.job_id}); wait for it, or cancel it first"
        )
    if state.state == "completed":
        raise PreflightError(f"{run.name} has completed; to do it again: hpcsngd rerun")
    resolved = resolve.amend(_configuration(run), overrides)
    old = run.plan_record(state.attempt)
    checked = preflight.check(resolved, run_root=run.path.parent, worker=str(old["worker"]), probe=probe)
    made = dataclasses.replace(checked, after=paths(after))
    need_scheduler(made)
    attempt = run.attempt(run.attempts()[-1].number + 1 if run.attempts() else 1)
    rundir.write_yaml(
        attempt.plan_yaml,
        {"plan": made.to_record(), "provenance": provenance.collect(argv, image=made.image)},
    )
    try:
        job_id = send(run, made, attempt.number, **(directives or {}))
    except BaseException:
        # the run is as it was: its last attempt is the one that ended
        shutil.rmtree(attempt.path)
        raise
    return Submitted(run, job_id)


def rerun(
    run: RunDir,
    overrides: Sequence[Override] = (),
    *,
    argv: Sequence[str],
    run_root: Path | None = None,
    directives: Mapping[str, Directive] | None = None,
    after: Sequence[RunDir] = (),
    probe: bool = False,
) -> Submitted:
    """Submits a new run with the configuration of another.

    Args:
        run: the run to do again.
        overrides: what to change.
        argv: the command line, for the record.
        run_root: folder for the new run; default: that of the old one, or the site's for a cell of a sweep.
        directives: more directives for this submission.
        after: as for `hpcsngd.launch.submit.submit`.
        probe: as for `hpcsngd.launch.submit.submit`.

    Raises:
        ConfigError: as `hpcsngd.launch.submit.submit`.
        PreflightError: as `hpcsngd.launch.submit.submit`.
        SchedulerError: as `hpcsngd.launch.submit.submit`.
    """
    record = run.record()
    beside = None if "sweep" in record else run.path.parent
    return submit(
        resolve.amend(_configuration(run), overrides, anew=True),
        argv=argv,
        run_root=run_root or beside,
        worker=str(record["plan"]["worker"]),
        directives=directives,
        after=after,
        probe=probe,
        origin={"rerun_of": str(run.path)},
    )


def _configuration(run: RunDir) -> Resolved:
    return resolve.from_record(run.record()["config"])


def _refuse_another_experiment(overrides: Sequence[Override]) -> None:
    wrong = [layer.path for layer in overrides if not layer.path.startswith(_MAY_CHANGE)]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: a resumed run trains what it began; only resources and site keys may "
            "change. For another experiment: hpcsngd rerun RUN --set ..."
        )
