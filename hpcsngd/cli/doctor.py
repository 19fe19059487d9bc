"""The verb ``doctor``."""

from __future__ import annotations

import dataclasses

import click

from hpcsngd.cli.arguments import AS_JSON, SITE
from hpcsngd.cli.output import print_json
from hpcsngd.errors import EXIT_RUN_FAILED

_COLORS = {"ok": "green", "warning": "yellow", "broken": "red"}


@click.command()
@click.option("--site", type=SITE, help="Also look at this site, as seen from here.")
@AS_JSON
def doctor(*, site: str | None, as_json: bool) -> None:
    """Check this machine, and a site, before a job waits in a queue.

    Every line is ok, warning or broken, with what to do. Ends with 1 if anything is broken.
    """
    import os

    from hpcsngd.config.resolve import load_site
    from hpcsngd.launch.doctor import examine
    from hpcsngd.launch.doctor.machine import Machine

    found = examine(site, load_site(site) if site else None, Machine(), os.environ)
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in found.findings]
        print_json({"site": site, "is_broken": found.is_broken, "findings": rows})
    else:
        width = max(len(finding.name) for finding in found.findings)
        for finding in found.findings:
            verdict = click.style(f"{finding.verdict:<8}", fg=_COLORS[finding.verdict])
            click.echo(f"{verdict} {finding.name:<{width}}  {finding.text}")
            if finding.advice:
                click.echo(f"{'':<{width + 11}}-> {finding.advice}")
    if found.is_broken:
        raise SystemExit(EXIT_RUN_FAILED)
