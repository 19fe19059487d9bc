"""``submit --smoke``: any experiment at its smallest, on this machine unless a site is named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import click

from hpcsngd import __version__
from hpcsngd.cli.arguments import resolve_choice, resolve_matrix
from hpcsngd.config import smoke
from hpcsngd.config.catalogue import DATASETS
from hpcsngd.config.resolve import Resolved

SITE = "local"
FOLDER = "smoke-data"
"""Below the run root: a folder per version and data set."""


def choose(**choice: Any) -> Resolved:
    """Returns what the options of `configuration` ask for, scaled down; of a matrix, its first cell.

    Writes the tiny data set that it needs, unless it is there.

    Raises:
        ConfigError: everything that is wrong with it, at once.
        OSError: the data cannot be written.
    """
    choice["site"] = choice["site"] or SITE
    if matrix := resolve_matrix(**choice):
        click.echo(f"the first of {len(matrix.cells)} cells: {matrix.cells[0]}", err=True)
        resolved = matrix.cells[0].resolved
    else:
        resolved = resolve_choice(**choice)
    write_data(resolved)
    return smoke.scaled_down(resolved, str(data_root(resolved)))


def data_root(resolved: Resolved) -> Path:
    """Returns the folder of an experiment's tiny data set, which `write_data` fills."""
    run_root = Path(resolved.site.run_root).expanduser().absolute()
    return run_root / FOLDER / __version__ / resolved.experiment.data.name


def write_data(resolved: Resolved) -> None:
    """Writes the tiny data set that an experiment needs, all of it or nothing, once for all runs.

    Raises:
        OSError: it cannot be written.
    """
    name, folder = resolved.experiment.data.name, data_root(resolved)
    if folder.exists() or not DATASETS[name].needs_root:
        return
    from hpcsngd.train import tinydata

    making = folder.with_name(f".{name}-{os.getpid()}")
    making.mkdir(parents=True)
    try:
        tinydata.write(name, making)
        making.rename(folder)
    except BaseException as error:
        shutil.rmtree(making)
        # where another process was faster, its folder is in the way
        if not (isinstance(error, OSError) and folder.exists()):
            raise
