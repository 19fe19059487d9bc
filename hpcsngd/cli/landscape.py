"""The verb ``landscape``."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from hpcsngd.cli.arguments import RUNS

_EVERY_S = 10.0  # between two lines of progress


@click.command()
@click.argument("runs", nargs=-1, required=True, type=RUNS)
@click.option(
    "--kind",
    type=click.Choice(["pca", "random"]),
    default="pca",
    show_default=True,
    help="Through the checkpoints, or random directions around the last one.",
)
@click.option(
    "--split",
    type=click.Choice(["test", "train"]),
    default="test",
    show_default=True,
    help="Which data; test is what the run evaluates on.",
)
@click.option("--points", type=click.IntRange(2), default=25, show_default=True, help="Along each axis.")
@click.option(
    "--margin",
    type=click.FloatRange(0),
    default=0.25,
    show_default=True,
    help="Beyond the checkpoints, as a share of their range (pca).",
)
@click.option(
    "--span",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="To each side, in lengths of the weights (random).",
)
@click.option("--samples", type=click.IntRange(1), help="Evaluate so many samples only.")
@click.option(
    "--buffers",
    type=click.Choice(["recompute", "keep"]),
    default="recompute",
    show_default=True,
    help="Batch norm's statistics at each point: collected anew, or those of the last checkpoint.",
)
@click.option(
    "--batches",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Training batches to recompute them from.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random directions.")
@click.option(
    "--ranks", type=click.IntRange(1), default=1, show_default=True, help="Processes on this machine."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def landscape(*, runs: tuple[Path, ...], ranks: int, device: str, **settings: Any) -> None:
    """Evaluate the loss on a plane through the checkpoints of RUNS, or around the last one.

    Rows go to landscape.csv of the first run and landscape_path.csv of each; `hpcsngd report` draws them.
    Called again it goes on where it was ended. Keep more checkpoints than two with checkpoint.keep. Inside a
    job whose launcher sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT the ranks work together.
    """
    if ranks > 1 and "RANK" not in os.environ:
        sys.exit(_on_ranks(ranks))
    from hpcsngd.errors import ConfigError
    from hpcsngd.rundir import open_run

    try:
        from hpcsngd import dist
        from hpcsngd.train import devices
        from hpcsngd.train.landscape import Landscape, Settings
    except ImportError as error:
        raise ConfigError(
            f"landscapes need the extra 'train': pip install 'hpcsngd[train]' ({error})"
        ) from error
    chosen = devices.choose_device(device)
    devices.join_ranks(chosen)
    made = Landscape([open_run(path) for path in runs], Settings(**settings), chosen)
    made.evaluate(_Lines())
    if dist.rank() == 0:
        click.echo(f"landscape: {made.path}, plane {made.name}")
    dist.shutdown()


class _Lines:
    """Prints how far the work is, at most every few seconds; rank 0 alone."""

    def __init__(self) -> None:
        self._begun: float | None = None
        self._first = 0
        self._printed = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Takes the number of points done, and of all."""
        now = time.monotonic()
        if self._begun is None:
            self._begun, self._first = now, done
        if os.environ.get("RANK", "0") != "0" or (now - self._printed < _EVERY_S and done < total):
            return
        self._printed = now
        newly = done - self._first
        left = (
            f", about {(now - self._begun) / newly * (total - done):.0f} s left"
            if newly and done < total
            else ""
        )
        click.echo(f"{done} of {total} points{left}", err=True)


def _on_ranks(ranks: int) -> int:
    """Returns the exit status of this very command on several ranks of this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, "-m", "hpcsngd", *sys.argv[1:]]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run(command, check=False, env=os.environ | threads).returncode
