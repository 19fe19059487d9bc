"""The verb ``report``."""

from __future__ import annotations

from pathlib import Path

import click

from hpcsngd.cli.arguments import RUNS
from hpcsngd.cli.output import print_json


@click.command()
@click.argument("runs", nargs=-1, required=True, type=RUNS)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("report.html"), show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="Print every number on the page instead of writing it.")
def report(*, runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Write one offline HTML page about runs (run directories, or folders of them)."""
    from hpcsngd.errors import ConfigError

    try:
        from hpcsngd_analysis import report as page
    except ImportError as error:
        raise ConfigError(
            f"reports need the extra 'analysis': pip install 'hpcsngd[analysis]' ({error})"
        ) from error
    if as_json:
        print_json(page.to_json(list(runs)))
        return
    click.echo(f"report: {page.write_report(list(runs), out)}")
