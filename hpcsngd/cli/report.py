"""The verb ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from hpcsngd.cli.arguments import RUNS
from hpcsngd.cli.output import print_json

FORMATS = ("png", "svg", "pdf")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=RUNS)
@click.option(
    "--spec",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="What to show: a YAML file such as those in analysis/reports.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("report.html"), show_default=True
)
@click.option("--target", type=float, help="Test accuracy whose time counts, such as 0.92.")
@click.option("--baseline", default="", help="Experiment or setting to compare the others with.")
@click.option(
    "--export",
    "export_as",
    type=click.Choice(FORMATS),
    help="Write each figure as a file too, into a folder beside the page (needs the extra 'export').",
)
@click.option("--json", "as_json", is_flag=True, help="Print every number on the page instead of writing it.")
def report(
    *,
    runs: tuple[Path, ...],
    spec: Path | None,
    out: Path,
    target: float | None,
    baseline: str,
    export_as: Literal["png", "svg", "pdf"] | None,
    as_json: bool,
) -> None:
    """Write one offline HTML page about runs.

    RUNS are run directories, sweeps, folders of either, or CSV files of the original HyLo scripts.
    """
    from hpcsngd.errors import ConfigError

    try:
        from hpcsngd_analysis import report as page
        from hpcsngd_analysis import spec as specs
    except ImportError as error:
        raise ConfigError(
            f"reports need the extra 'analysis': pip install 'hpcsngd[analysis]' ({error})"
        ) from error
    options = specs.options(spec, target=target, baseline=baseline)
    if as_json:
        print_json(page.to_json(list(runs), options))
        return
    made = page.make(list(runs), options)
    page.write_page(page.render(made), out)
    for line in made.lines:
        click.echo(line)
    if export_as:
        from hpcsngd_analysis.export import export

        files = export(made.panels, out.with_suffix(""), export_as)
        click.echo(f"figures: {len(files)} in {out.with_suffix('')}")
    click.echo(f"report: {out}")
