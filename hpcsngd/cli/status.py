"""The verb ``status``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpcsngd.cli.arguments import AS_JSON, RUNS
from hpcsngd.cli.output import print_json

if TYPE_CHECKING:
    from hpcsngd.launch.status import RunState


@click.command()
@click.argument("runs", nargs=-1, type=RUNS)
@click.option(
    "--run-root", type=RUNS, default=Path("runs"), show_default=True, help="Used when no run is named."
)
@click.option("--failed", is_flag=True, help="Of a sweep, only the cells that ended without completing.")
@click.option("--watch", is_flag=True, help="Look again and again until all have ended.")
@AS_JSON
def status(*, runs: tuple[Path, ...], run_root: Path, failed: bool, watch: bool, as_json: bool) -> None:
    """Say how runs are doing: the runs or sweeps named, or all runs in the run root.

    Of a single run, the first fault and the log lines that show it are told as well.
    """
    from hpcsngd import progress, rundir, sweepdir
    from hpcsngd.launch.status import states

    if sweeps := [path for path in runs if sweepdir.is_sweep(path)]:
        if len(sweeps) < len(runs) or (as_json and len(sweeps) > 1):
            raise click.UsageError("name runs, or sweeps (with --json one), but not both")
        _print_sweeps(sweeps, failed=failed, watch=watch, as_json=as_json)
        return
    paths = runs or tuple(sorted(file.parent for file in run_root.glob("*/run.yaml")))
    opened = [rundir.open_run(path) for path in paths]
    if not opened and not as_json:
        click.echo(f"no runs in {run_root}")
    found = progress.watch(opened, quiet=as_json) if watch and opened else states(opened)
    if as_json:
        print_json([state.to_json() for state in found])
    elif not (watch and progress.is_terminal()):
        for state in found:
            click.echo(progress.line(state))
    if len(found) == 1 and not as_json:
        _explain(found[0])


def _print_sweeps(paths: list[Path], *, failed: bool, watch: bool, as_json: bool) -> None:
    from hpcsngd import progress, sweepdir
    from hpcsngd.launch import sweep_status

    for path in paths:
        sweep = sweepdir.open_sweep(path)
        if watch:
            progress.watch(sweep.runs(), quiet=as_json)
        state = sweep_status.look(sweep)
        shown = state.failed if failed else state
        if as_json:
            print_json(shown.to_json())
        else:
            click.echo(shown.text())


def _explain(state: RunState) -> None:
    """Prints what a person wants next: when it starts, or why it ended and where the logs are."""
    from hpcsngd.cli.output import shown

    if state.start_estimate:
        click.echo(f"  expected to start: {state.start_estimate}")
    if state.fault and state.fault.get("evidence"):
        click.echo("  evidence:")
        for text in state.fault["evidence"]:
            click.echo(f"    {text}")
    if state.has_ended and state.state != "completed":
        click.echo(f"  logs: hpcsngd logs {shown(Path(state.run))}")
