"""The verb ``status``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpcsngd.cli.arguments import AS_JSON, RUNS
from hpcsngd.cli.output import print_json

if TYPE_CHECKING:
    from hpcsngd.launch.status import RunState
    from hpcsngd.rundir import RunDir
    from hpcsngd.sweepdir import SweepDir

_FILES = ("run.yaml", "sweep.yaml")
"""What the folders of runs and of sweeps hold."""


@click.command()
@click.argument("runs", nargs=-1, type=RUNS)
@click.option(
    "--run-root", type=RUNS, default=Path("runs"), show_default=True, help="Used when no run is named."
)
@click.option("--failed", is_flag=True, help="Of a sweep, only the cells that ended without completing.")
@click.option("--watch", is_flag=True, help="Look again and again until all have ended.")
@AS_JSON
def status(*, runs: tuple[Path, ...], run_root: Path, failed: bool, watch: bool, as_json: bool) -> None:
    """Say how runs are doing: the runs or sweeps named, or all in the run root.

    Of a single run, the first fault and the log lines that show it are told as well; sweeps alone are told
    cell by cell, beside runs in one line each.
    """
    from hpcsngd import rundir, sweepdir

    paths = runs or tuple(sorted(file.parent for name in _FILES for file in run_root.glob(f"*/{name}")))
    sweeps = [sweepdir.open_sweep(path) for path in paths if sweepdir.is_sweep(path)]
    single = [rundir.open_run(path) for path in paths if not sweepdir.is_sweep(path)]
    if runs and sweeps and not single:
        if as_json and len(sweeps) > 1:
            raise click.UsageError("with --json name one sweep, or runs beside it")
        _print_sweeps(sweeps, failed=failed, watch=watch, as_json=as_json)
        return
    if not paths and not as_json:
        click.echo(f"no runs in {run_root}")
    _print_overview(single, sweeps, watch=watch, as_json=as_json)


def _print_overview(
    runs: Sequence[RunDir], sweeps: Sequence[SweepDir], *, watch: bool, as_json: bool
) -> None:
    """Prints a line for each run and sweep."""
    from hpcsngd import progress
    from hpcsngd.launch import sweep_status

    watched = [*runs, *(run for sweep in sweeps for run in sweep.runs())]
    if watch and watched:
        progress.watch(watched, quiet=as_json)
    found, tallies = sweep_status.overview(runs, sweeps)
    used = _usage(runs[0], found[0]) if len(found) == 1 and not tallies else []
    if as_json:
        extra = {"usage": used} if used else {}
        print_json([*(state.to_json() | extra for state in found), *(tally.to_json() for tally in tallies)])
        return
    if not (watch and progress.is_terminal()):
        for state in found:
            click.echo(progress.line(state))
    for tally in tallies:
        click.echo(tally.line())
    if len(found) == 1 and not tallies:
        _explain(found[0], used)


def _usage(run: RunDir, state: RunState) -> list[dict[str, Any]]:
    """Returns what each attempt has used, with the scheduler's accounts of a run that has ended."""
    from hpcsngd.launch import usage

    if state.has_ended:
        usage.settle(run)
    return usage.summary(run)


def _print_sweeps(sweeps: Sequence[SweepDir], *, failed: bool, watch: bool, as_json: bool) -> None:
    from hpcsngd import progress
    from hpcsngd.launch import sweep_status

    for sweep in sweeps:
        if watch and (runs := sweep.runs()):
            progress.watch(runs, quiet=as_json)
        state = sweep_status.look(sweep)
        shown = state.failed if failed else state
        if as_json:
            print_json(shown.to_json())
        else:
            click.echo(shown.text())


def _explain(state: RunState, used: Sequence[Mapping[str, Any]]) -> None:
    """Prints what a person wants next: when it starts, what it used, why it ended and where the logs are."""
    from hpcsngd.cli.output import shown
    from hpcsngd.launch import usage

    if state.start_estimate:
        click.echo(f"  expected to start: {state.start_estimate}")
    for each in used:
        click.echo(f"  {usage.line(each)}")
    if state.fault and state.fault.get("evidence"):
        click.echo("  evidence:")
        for text in state.fault["evidence"]:
            click.echo(f"    {text}")
    if state.has_ended and state.state != "completed":
        click.echo(f"  logs: hpcsngd logs {shown(Path(state.run))}")
