"""What ``submit`` does with an experiment that has a matrix."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpcsngd.cli.output import print_json, shown
from hpcsngd.errors import EXIT_INTERRUPTED, EXIT_RUN_FAILED

if TYPE_CHECKING:
    from hpcsngd.config.matrix import Matrix
    from hpcsngd.launch.plan import Directive
    from hpcsngd.launch.sweep import SubmittedSweep
    from hpcsngd.launch.sweep_status import SweepState
    from hpcsngd.rundir import RunDir
    from hpcsngd.sweepdir import SweepDir


def submit_sweep(
    found: Matrix,
    *,
    directives: Mapping[str, Directive],
    after: Sequence[RunDir],
    probe: bool,
    dry_run: bool,
    wait_for_it: bool,
    as_json: bool,
) -> None:
    """Submits the cells of a matrix, or shows what that would do.

    Raises:
        SystemExit: with the exit code of a sweep with failed cells, or of a wait that was interrupted.
    """
    if dry_run:
        from hpcsngd.launch.sweep_scripts import dry_run as render

        click.echo(render(found, directives=directives))
        return
    from hpcsngd.launch.sweep import submit

    submitted = submit(found, argv=sys.argv[1:], directives=directives, after=after, probe=probe)
    if not as_json:
        _print_submission(submitted, found.cells[0].resolved.site_name)
    poll_s = found.cells[0].resolved.site.scheduler.poll_s
    state = _wait(submitted.sweep, poll_s, quiet=as_json) if wait_for_it else None
    report = _write_report(submitted.sweep, quiet=as_json) if state else None
    if as_json:
        print_json(_record(submitted, state, report))
    elif not state:
        click.echo(f"follow it with: hpcsngd status {shown(submitted.sweep.path)}")
    if state and state.counts != {"completed": len(state.cells)}:
        raise SystemExit(EXIT_RUN_FAILED)


def _print_submission(submitted: SubmittedSweep, site: str) -> None:
    skipped = ", ".join(f"{count} {state}" for state, count in submitted.skipped.items())
    rest = f"; left alone: {skipped}" if skipped else ""
    if submitted.submitted:
        jobs = ", ".join(submitted.job_ids)
        click.echo(f"submitted {submitted.submitted} cells: job {jobs} on site {site}{rest}")
    else:
        click.echo(f"nothing to submit: {skipped}")
    click.echo(f"sweep directory: {submitted.sweep.path}")


def _wait(sweep: SweepDir, poll_s: float, *, quiet: bool) -> SweepState:
    from hpcsngd.launch.sweep_status import wait

    def show(state: SweepState) -> None:
        if not quiet:
            click.echo(", ".join(f"{count} {name}" for name, count in state.counts.items()))

    try:
        state = wait(sweep, poll_s=poll_s, on_change=show)
    except KeyboardInterrupt:
        click.echo(
            f"\nno longer waiting; the sweep goes on. Come back with: hpcsngd status {shown(sweep.path)}",
            err=True,
        )
        raise SystemExit(EXIT_INTERRUPTED) from None
    if not quiet:
        click.echo(state.text())
    return state


def _write_report(sweep: SweepDir, *, quiet: bool) -> Path | None:
    try:
        from hpcsngd_analysis import report
    except ImportError:
        click.echo("no report: it needs the extra 'analysis' (pip install 'hpcsngd[analysis]')", err=True)
        return None
    path = report.write_report([sweep.path], sweep.report_html)
    if not quiet:
        click.echo("\n".join([*report.sweep_lines([sweep.path]), f"report: {path}"]))
    return path


def _record(submitted: SubmittedSweep, state: SweepState | None, report: Path | None) -> dict[str, Any]:
    return {
        "sweep": submitted.sweep.name,
        "path": str(submitted.sweep.path),
        "job_ids": list(submitted.job_ids),
        "submitted": submitted.submitted,
        "skipped": submitted.skipped,
        "counts": state.counts if state else None,
        "report": str(report) if report else None,
    }
