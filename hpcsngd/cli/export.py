"""The verb ``export``."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from hpcsngd.cli.arguments import AS_JSON, RUNS
from hpcsngd.cli.output import print_json, shown

if TYPE_CHECKING:
    from hpcsngd_analysis.records import Run
    from hpcsngd_analysis.trackers.follow import Tracker


@click.command()
@click.argument("runs", nargs=-1, required=True, type=RUNS)
@click.option("--to", required=True, type=click.Choice(["tensorboard", "wandb"]), help="Which tracker.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder; default: exports/TRACKER."
)
@click.option("--live", is_flag=True, help="Go on until all runs have ended.")
@click.option(
    "--every", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="Seconds between looks."
)
@click.option("--project", default="hpcsngd", show_default=True, help="Project at Weights & Biases.")
@click.option(
    "--mode",
    type=click.Choice(["offline", "online"]),
    help="For wandb; default: online where somebody is logged in, else offline.",
)
@AS_JSON
def export(
    *,
    runs: tuple[Path, ...],
    to: Literal["tensorboard", "wandb"],
    out: Path | None,
    live: bool,
    every: float,
    project: str,
    mode: Literal["offline", "online"] | None,
    as_json: bool,
) -> None:
    """Hand the numbers of runs to TensorBoard or Weights & Biases.

    RUNS are run directories, sweeps, folders of either, or CSV files of the original HyLo scripts. Done
    again, it adds what is new. Rows that a later attempt wrote again count once, as in a report.
    """
    from hpcsngd.errors import ConfigError

    try:
        from hpcsngd_analysis.trackers import event_files, follow, weights_biases
    except ImportError as error:
        raise ConfigError(
            f"exports need the extra 'analysis': pip install 'hpcsngd[analysis]' ({error})"
        ) from error
    folder = out or Path("exports") / to
    how = mode or weights_biases.default_mode()

    def build(run: Run) -> Tracker:
        if to == "tensorboard":
            return event_files.TensorBoard(folder / run.name)
        return weights_biases.WeightsAndBiases(folder / run.name, project=project, mode=how)

    done = follow.export(list(runs), build, every_s=every if live else None)
    if as_json:
        print_json([dataclasses.asdict(each) for each in done])
        return
    for each in done:
        click.echo(f"{each.run}: {each.written} numbers up to step {each.step}, {each.state}")
    if to == "tensorboard":
        click.echo(f"look at them: tensorboard --logdir {shown(folder.absolute())}")
    elif how == "offline":
        pattern = f"{shlex.quote(str(folder))}/*/wandb/offline-run-*"
        click.echo(f"kept offline; to send them: wandb sync {pattern}")
