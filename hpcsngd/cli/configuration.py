"""The verbs that read configuration: ``show``, ``sites``, ``experiments``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from hpcsngd.cli.arguments import AS_JSON, EXPERIMENT, SITE, overrides
from hpcsngd.cli.output import print_json


@click.command()
@click.option("--site", type=SITE, help="A site, alone or with --exp.")
@click.option("--exp", type=EXPERIMENT, help="An experiment, alone or with --site.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one key; repeatable.")
@click.option("--origins", is_flag=True, help="Say where each value comes from.")
@click.option(
    "--schema", type=click.Choice(["site", "experiment"]), help="Print the JSON Schema, for editors."
)
@AS_JSON
def show(
    *,
    site: str | None,
    exp: str | None,
    sets: Sequence[str],
    origins: bool,
    schema: str | None,
    as_json: bool,
) -> None:
    """Show the configuration as it would run; variables such as ${SCRATCH} stay unexpanded."""
    from hpcsngd.config import present

    if schema:
        print_json(present.json_schema(schema))
        return
    if site is None and exp is None:
        raise click.UsageError("give --site, --exp or both, or --schema")
    leaves = present.leaves(site, exp, overrides(sets))
    if as_json:
        print_json(present.nested(leaves, with_origins=origins))
    else:
        click.echo(present.text(leaves, with_origins=origins))


@click.command()
@AS_JSON
def sites(*, as_json: bool) -> None:
    """List the known sites."""
    from hpcsngd.config import present

    _print_catalogue(present.sites(), as_json)


@click.command()
@AS_JSON
def experiments(*, as_json: bool) -> None:
    """List the known experiments."""
    from hpcsngd.config import present

    _print_catalogue(present.experiments(), as_json)


def _print_catalogue(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        facts = f"  [{row['facts']}]" if row["facts"] else ""
        click.echo(f"{row['name']:<{width}}  {row['description']}{facts}")
