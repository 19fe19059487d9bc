"""The commands of a played scheduler: ``python -m hpcsngd.launch.rehearse NAME ARGUMENTS``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from hpcsngd.launch.rehearse import cluster, launchers, lsf_commands, slurm_commands, slurm_listing

Command = Callable[[list[str], Path], int]


def commands() -> dict[str, Command]:
    """Returns every command by name: it takes its words and the cluster's folder, and returns a status."""
    return {
        **lsf_commands.COMMANDS,
        "jsrun": launchers.jsrun,
        "blaunch": launchers.blaunch,
        "lsrun": launchers.lsrun,
        "sbatch": slurm_commands.sbatch,
        "srun": slurm_commands.srun,
        "squeue": slurm_listing.squeue,
        "sacct": slurm_listing.sacct,
        "scancel": slurm_commands.scancel,
        "scontrol": slurm_commands.scontrol,
    }


def main() -> None:
    """Runs the command that is named by the first word."""
    name, words = sys.argv[1], sys.argv[2:]
    raise SystemExit(commands()[name](words, cluster.here(os.environ)))


if __name__ == "__main__":
    main()
