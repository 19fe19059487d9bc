"""The verb ``status``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hpcsngd.cli.arguments import AS_JSON, RUNS
from hpcsngd.cli.output import print_json


@click.command()
@click.argument("runs", nargs=-1, type=RUNS)
@click.option(
    "--run-root", type=RUNS, default=Path("runs"), show_default=True, help="Used when no run is named."
)
@AS_JSON
def status(*, runs: tuple[Path, ...], run_root: Path, as_json: bool) -> None:
    """Say how runs are doing: the runs named, or all in the run root."""
    from hpcsngd import rundir
    from hpcsngd.launch.status import states

    paths = runs or tuple(sorted(file.parent for file in run_root.glob("*/run.yaml")))
    if not paths and not as_json:
        click.echo(f"no runs in {run_root}")
    found = [state.to_json() for state in states([rundir.open_run(path) for path in paths])]
    if as_json:
        print_json(found)
        return
    for state in found:
        _print_state(state)


def _print_state(state: dict[str, Any]) -> None:
    parts = [f"{state['state']:<10} {state['run']}"]
    if state["epoch"] is not None:
        parts.append(f"epoch {state['epoch']:.1f}/{state['epochs']}")
    if state["accuracy"] is not None:
        parts.append(f"accuracy {state['accuracy']:.4f}")
    if state["reason"]:
        parts.append(state["reason"])
    click.echo("  ".join(parts))
