"""The verb ``submit``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpcsngd.cli.arguments import configuration, ordering, resolve_choice, resolve_matrix
from hpcsngd.cli.output import print_json, shown
from hpcsngd.errors import EXIT_INTERRUPTED, EXIT_RUN_FAILED

if TYPE_CHECKING:
    from hpcsngd.config.resolve import Resolved
    from hpcsngd.rundir import RunDir, Status


@click.command()
@configuration
@ordering
@click.option("--dry-run", is_flag=True, help="Print the exact script and per-node command; write nothing.")
@click.option("--smoke", is_flag=True, help="At its smallest: tiny data, 2 ranks, 2 epochs, CPU; local site.")
@click.option("--wait", "wait_for_it", is_flag=True, help="Stay until the run ends, then write its report.")
@click.option("--json", "as_json", is_flag=True, help="Print the run, job and result as JSON.")
def submit(
    *,
    dry_run: bool,
    smoke: bool,
    wait_for_it: bool,
    as_json: bool,
    after: tuple[Path, ...],
    hold: bool,
    probe: bool,
    **choice: Any,
) -> None:
    """Submit an experiment to a site.

    The run directory is printed; it holds everything about the run. Without --wait the command returns as
    soon as the scheduler has the job. An experiment with a matrix, or --matrix, makes a sweep: one run
    directory for each combination and one job array; given again, it submits those that have not completed.
    --smoke shows within a minute that an experiment starts, trains and writes its checkpoints: it makes tiny
    data in the true format, below the run root, and takes the first cell of a matrix.
    """
    from hpcsngd import rundir
    from hpcsngd.cli import smoke as smallest
    from hpcsngd.launch import order

    runs = [rundir.open_run(path) for path in after]
    if not smoke and (matrix := resolve_matrix(**choice)):
        from hpcsngd.cli.sweep import submit_sweep

        waiting = order.directives(matrix.cells[0].resolved.site.scheduler.kind, after=runs, hold=hold)
        submit_sweep(
            matrix,
            directives=waiting,
            after=runs,
            probe=probe,
            dry_run=dry_run,
            wait_for_it=wait_for_it,
            as_json=as_json,
        )
        return
    resolved = smallest.choose(**choice) if smoke else resolve_choice(**choice)
    waiting = order.directives(resolved.site.scheduler.kind, after=runs, hold=hold)
    if dry_run:
        from hpcsngd.launch.scripts import dry_run as render

        click.echo(render(resolved, directives=waiting))
        return
    from hpcsngd.launch.submit import submit as send

    submitted = send(resolved, argv=sys.argv[1:], directives=waiting, after=runs, probe=probe)
    run = submitted.run
    if not as_json:
        click.echo(f"submitted {run.name}: job {submitted.job_id} on site {resolved.site_name}")
        click.echo(f"run directory: {run.path}")
    status = _wait(run, resolved, quiet=as_json) if wait_for_it else None
    report_path = _write_own_report(run) if status else None
    if as_json:
        print_json(_submission_record(run, submitted.job_id, status, report_path))
    elif status:
        _print_outcome(run, status, report_path)
    else:
        click.echo(f"follow it with: hpcsngd status {shown(run.path)}")
    if status and status.state != "completed":
        raise SystemExit(EXIT_RUN_FAILED)


def _wait(run: RunDir, resolved: Resolved, *, quiet: bool) -> Status:
    from hpcsngd.launch.submit import wait
    from hpcsngd.progress import progress

    try:
        with progress(resolved.experiment.epochs, quiet=quiet) as update:
            return wait(run, poll_s=resolved.site.scheduler.poll_s, on_update=update)
    except KeyboardInterrupt:
        click.echo(
            f"\nno longer waiting; the run goes on. Come back with: hpcsngd status {shown(run.path)}",
            err=True,
        )
        raise SystemExit(EXIT_INTERRUPTED) from None


def _write_own_report(run: RunDir) -> Path | None:
    try:
        from hpcsngd_analysis.report import write_report
    except ImportError:
        click.echo("no report: it needs the extra 'analysis' (pip install 'hpcsngd[analysis]')", err=True)
        return None
    return write_report([run.path], run.report_html)


def _submission_record(
    run: RunDir, job_id: str, status: Status | None, report_path: Path | None
) -> dict[str, Any]:
    import dataclasses

    return {
        "run": run.name,
        "path": str(run.path),
        "job_id": job_id,
        "status": dataclasses.asdict(status) if status else None,
        "report": str(report_path) if report_path else None,
    }


def _print_outcome(run: RunDir, status: Status, report_path: Path | None) -> None:
    if status.state == "completed":
        result = status.result or {}
        split = next(name for name in ("test", "validation") if f"{name}_accuracy" in result)
        click.echo(f"{split} accuracy: {result[f'{split}_accuracy']:.4f} after {result['epochs']:g} epochs")
        for line in _scores(result, split):
            click.echo(line)
        click.echo(f"time: {result['train_s']:.1f} s of training, {result['wall_s']:.1f} s in all")
    else:
        click.echo(f"{status.state}: {status.reason}", err=True)
        click.echo(f"logs: {shown(run.attempt(status.attempt).logs)}", err=True)
    click.echo(f"run directory: {run.path}")
    if report_path:
        click.echo(f"report: {report_path}")


def _scores(result: Mapping[str, Any], split: str) -> list[str]:
    """Returns what else is known of a split: perplexity, BLEU."""
    names = [name.removeprefix(f"{split}_") for name in result if name.startswith(f"{split}_")]
    known = ("accuracy", "loss")
    return [f"{split} {name}: {result[f'{split}_{name}']:.4g}" for name in names if name not in known]
