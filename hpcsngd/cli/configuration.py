"""The verbs that read configuration: ``show``, ``sites``, ``experiments``."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Show the configuration as it would run; variables such as ${SCRATCH} stay unexpanded.

    An experiment is explained first: its source, where it departs from that, published results.
    """
    from hpcsngd.config import present

    if schema:
        print_json(present.json_schema(schema))
        return
    if site is None and exp is None:
        raise click.UsageError("give --site, --exp or both, or --schema")
    leaves = present.leaves(site, exp, overrides(sets))
    if as_json:
        print_json(present.nested(leaves, with_origins=origins))
        return
    if exp is not None:
        click.echo("\n".join(f"# {line}" for line in present.explanation(exp)))
        leaves = [leaf for leaf in leaves if leaf.path not in present.EXPLAINED]
    click.echo(present.text(leaves, with_origins=origins))


@click.command()
@AS_JSON
def experiments(*, as_json: bool) -> None:
    """List the known experiments: paper, data, size and resources of each."""
    from hpcsngd.config import present

    rows = present.experiments()
    if as_json:
        print_json(rows)
    else:
        click.echo("\n".join(line for row in rows for line in present.experiment_lines(row)))


@click.command()
@AS_JSON
def sites(*, as_json: bool) -> None:
    """List the known sites."""
    from hpcsngd.config import present

    rows = present.sites()
    if as_json:
        print_json(rows)
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        facts = "" if row["error"] else f"  [{row['facts']}]"
        click.echo(f"{row['name']:<{width}}  {row['description']}{facts}")
