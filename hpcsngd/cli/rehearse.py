"""The verb ``rehearse``."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpcsngd.cli.arguments import AS_JSON, DIAGNOSTICS, EXPERIMENT, RUNS, SITE, resolve_choice, resources
from hpcsngd.cli.output import print_json, shown
from hpcsngd.errors import EXIT_RUN_FAILED

if TYPE_CHECKING:
    from hpcsngd.launch.rehearse.scenes import Check

_SCENES = ("policy", "completion", "preemption", "limit", "failure")


@click.command()
@click.option("--site", required=True, type=SITE, help="The site to play: a name or a YAML file.")
@click.option("--exp", required=True, type=EXPERIMENT, help="What to run: a name or a YAML file.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one key; repeatable.")
@resources
@click.option("--played-nodes", default=2, show_default=True, help="Nodes of the run in small.")
@click.option("--played-ranks", default=2, show_default=True, help="Workers on each of them.")
@click.option(
    "--scene",
    "scenes",
    multiple=True,
    type=click.Choice(_SCENES),
    help="Play this scene only; repeatable. Default: all.",
)
@click.option("--folder", type=RUNS, help="Folder for everything; default: a new one in rehearsals/.")
@AS_JSON
def rehearse(
    *,
    played_nodes: int,
    played_ranks: int,
    scenes: tuple[str, ...],
    folder: Path | None,
    as_json: bool,
    **choice: Any,
) -> None:
    """Play a site's scheduler on this machine and run an experiment in small through it.

    The site's options, limits and launcher are taken as they are: the played scheduler refuses what the site
    would. Workers run on CPUs, with tiny data and without the image. The job is preempted, stopped by its
    time limit, cancelled, and made to fail; a list says what held. Takes some minutes.
    """
    from hpcsngd.cli.smoke import data_root, write_data
    from hpcsngd.config.resolve import Override, amend
    from hpcsngd.launch.rehearse.rehearsal import rehearse as perform

    choice |= {"run_root": None, "parallel": None, **dict.fromkeys(DIAGNOSTICS, False)}
    resolved = resolve_choice(**choice)
    name = f"{resolved.site_name}-{resolved.exp_name}-{time.strftime('%Y%m%dT%H%M%S')}"
    place = (folder or Path("rehearsals", name)).absolute()
    here = amend(resolved, [Override("site.run_root", str(place), "rehearsal")])
    write_data(here)
    checks = []
    for check in perform(
        resolved,
        place,
        data_root=str(data_root(here)),
        nodes=played_nodes,
        ranks=played_ranks,
        scenes=scenes or _SCENES,
    ):
        checks.append(check)
        if not as_json:
            click.echo(_line(check))
    failed = [check for check in checks if not check.passed]
    if as_json:
        record = {"site": resolved.site_name, "exp": resolved.exp_name, "folder": str(place)}
        print_json(record | {"passed": not failed, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        verdict = f"{len(checks) - len(failed)} of {len(checks)} checks passed"
        click.echo(f"{verdict}; run directories and the played cluster: {shown(place)}")
    if failed:
        raise SystemExit(EXIT_RUN_FAILED)


def _line(check: Check) -> str:
    return f"{'pass' if check.passed else 'FAIL'}  {check.name} ({check.detail}; {check.wall_s:.0f} s)"
