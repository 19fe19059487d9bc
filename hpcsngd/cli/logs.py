"""The verb ``logs``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpcsngd.cli.arguments import RUNS

if TYPE_CHECKING:
    from hpcsngd.launch.logs import Choice
    from hpcsngd.rundir import RunDir


@click.command()
@click.argument("run", type=RUNS)
@click.option("--rank", type=int, help="Only this rank.")
@click.option("--node", type=int, help="Only this node of the job, from 0.")
@click.option("--attempt", type=int, help="An earlier attempt; default: the newest.")
@click.option("--stream", type=click.Choice(["out", "err"]), help="Only this stream; default: both.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the run ends.")
def logs(
    *, run: Path, rank: int | None, node: int | None, attempt: int | None, stream: str | None, follow: bool
) -> None:
    """Print the logs of a run: all nodes, or one node or rank."""
    from hpcsngd import rundir
    from hpcsngd.launch.logs import STREAMS, Choice

    if rank is not None and node is not None:
        raise click.UsageError("give --rank or --node, not both")
    streams = (stream,) if stream else STREAMS
    _print(rundir.open_run(run), Choice(rank, node, attempt, streams), follow=follow)


def _print(run: RunDir, choice: Choice, *, follow: bool) -> None:
    from hpcsngd.launch import logs as source

    # with --follow the first files may be yet to come
    is_over = _ended(run) if follow else lambda: True
    label = ""
    for name, line in source.follow(lambda: source.find(run, choice), is_over):
        if name != label:
            click.echo(f"==> {name} <==")
            label = name
        click.echo(line)
    if not label:
        click.echo(f"no logs yet in {run.path}", err=True)
    if follow:
        _print_end(run)


def _ended(run: RunDir) -> Callable[[], bool]:
    """Returns a function that says whether the run has ended; it asks no more often than every ``poll_s``."""
    from hpcsngd.launch.status import current, states

    pause_s = float(run.record()["config"]["site"]["scheduler"]["poll_s"])
    next_time = 0.0

    def ask() -> bool:
        nonlocal next_time
        if current(run):
            return True
        if time.monotonic() < next_time:
            return False
        next_time = time.monotonic() + pause_s
        return states([run])[0].has_ended

    return ask


def _print_end(run: RunDir) -> None:
    from hpcsngd.launch.status import states

    state = states([run])[0]
    click.echo(f"{state.state}: {state.reason}" if state.reason else state.state, err=True)
