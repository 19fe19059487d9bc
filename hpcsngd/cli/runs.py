"""The verbs that act on runs: ``cancel``, ``resume``, ``rerun``, ``diff``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from hpcsngd.cli.arguments import (
    AS_JSON,
    RUNS,
    ordering,
    overrides,
    resource_overrides,
    resources,
    with_options,
)
from hpcsngd.cli.output import print_json, shown


@click.command()
@click.argument("runs", nargs=-1, required=True, type=RUNS)
@AS_JSON
def cancel(*, runs: tuple[Path, ...], as_json: bool) -> None:
    """Cancel runs or sweeps, waiting or running; they are not requeued."""
    from hpcsngd import sweepdir
    from hpcsngd.launch.cancel import cancel as ask

    done = ask([run for path in runs for run in sweepdir.runs_at(path)])
    if as_json:
        print_json(
            [{"run": str(each.run.path), "was": each.state, "cancelled": each.was_sent} for each in done]
        )
        return
    for each in done:
        click.echo(f"{each.run.name}: {each.text}")


_sends = with_options(
    click.argument("run", type=RUNS),
    resources,
    click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one key; repeatable."),
    ordering,
    AS_JSON,
)


@click.command()
@_sends
def resume(*, run: Path, sets: Sequence[str], as_json: bool, **choice: Any) -> None:
    """Go on with a run that has ended: a new attempt, from its newest checkpoint.

    Resources, wall time and keys of the site may change; what is trained stays.
    """
    from hpcsngd.launch.resume import resume as send

    _send_anew(send, run, sets, as_json=as_json, **choice)


@click.command()
@_sends
@click.option("--run-root", type=RUNS, help="Folder for the new run; default: that of the old one.")
def rerun(*, run: Path, sets: Sequence[str], as_json: bool, run_root: Path | None, **choice: Any) -> None:
    """Do a run again: the same configuration, a new run directory that names the old one."""
    from hpcsngd.launch.resume import rerun as send

    _send_anew(send, run, sets, as_json=as_json, extra={"run_root": run_root}, **choice)


def _send_anew(
    send: Callable[..., Any],
    path: Path,
    sets: Sequence[str],
    *,
    as_json: bool,
    after: Sequence[Path],
    hold: bool,
    probe: bool,
    extra: dict[str, Any] | None = None,
    **chosen: Any,
) -> None:
    from hpcsngd import rundir
    from hpcsngd.launch import order

    run = rundir.open_run(path)
    scheduler = str(run.record()["plan"]["scheduler"])
    runs = [rundir.open_run(one) for one in after]
    waiting = order.directives(scheduler, after=runs, hold=hold)
    submitted = send(
        run,
        [*overrides(sets), *resource_overrides(chosen)],
        argv=sys.argv[1:],
        directives=waiting,
        after=runs,
        probe=probe,
        **(extra or {}),
    )
    number = submitted.run.attempts()[-1].number
    if as_json:
        print_json(
            {"run": submitted.run.name, "path": str(submitted.run.path), "job_id": submitted.job_id}
            | {"attempt": number}
        )
        return
    click.echo(f"submitted {submitted.run.name}, attempt {number}: job {submitted.job_id}")
    click.echo(f"follow it with: hpcsngd status {shown(submitted.run.path)}")


@click.command()
@click.argument("first", type=RUNS)
@click.argument("second", type=RUNS)
@AS_JSON
def diff(*, first: Path, second: Path, as_json: bool) -> None:
    """Say what differs between two runs, beside how they ended."""
    from hpcsngd import rundir
    from hpcsngd.launch.compare import compare

    runs = [rundir.open_run(path) for path in (first, second)]
    found = compare(*runs)
    if as_json:
        print_json({"runs": [str(run.path) for run in runs], **found})
        return
    click.echo("\n".join(f"{mark} {run.path}" for mark, run in zip(("<", ">"), runs, strict=True)))
    for section, pairs in found.items():
        click.echo(f"\n{section}" + ("" if pairs else ": the same"))
        for key, (one, other) in pairs.items():
            click.echo(f"  {key}")
            click.echo(f"    < {_brief(one)}\n    > {_brief(other)}")


def _brief(value: Any) -> str:
    """Returns a value for a line; of a long one, such as a diff, its size."""
    if value is None:
        return "-"
    text = str(value)
    return text if len(text) <= 200 and "\n" not in text else f"{len(text.splitlines())} lines"
