"""Whether the workers' Python can import torch where they will run: tried, not guessed.

On a cluster this is a job of its own on one node, with the site's preload lines and image, so it takes as
long as the queue; on a local site it takes seconds.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hpcsngd.errors import PreflightError
from hpcsngd.launch import commands, environment, verdict
from hpcsngd.launch.plan import Plan

QUEUE_S = 300
"""How long a probe may wait for a node."""
RUN_S = 120

_TEXT = (
    "import sys, torch, hpcsngd.train.worker; "
    "print('probe:', sys.version.split()[0], torch.__version__, torch.cuda.device_count())"
)
_KEPT = ("partition", "account", "qos", "constraint", "reservation", "wckey", "gres", "gpus-per-node", "mem")


def command(made: Plan, folder: Path) -> list[str]:
    """Returns the command that imports torch as a worker would, on one node.

    Args:
        made: the plan.
        folder: an existing folder that is bound into the image in place of the run directory.
    """
    inside = commands.wrap(made, str(folder), [made.python, "-c", _TEXT])
    if made.scheduler == "local":
        return inside
    asked = [
        f"--{name}={value}"
        for name, value in made.directives.items()
        if name in _KEPT and name not in made.skip_options
    ]
    wait = f"--immediate={QUEUE_S}"
    return ["srun", "--job-name=hpcsngd-probe", "--nodes=1", "--ntasks=1", "--time=5", wait, *asked, *inside]


def probe(made: Plan, folder: Path) -> str:
    """Returns what the probe printed: versions of Python and torch, and the number of GPUs.

    Raises:
        PreflightError: torch cannot be imported there, or no node was free in time; with the cause.
    """
    words = command(made, folder)
    shared = environment.worker_environment(os.environ, made)
    try:
        # the time limit is a last resort: srun gives up by itself, and takes its job along
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            env=shared,
            check=False,
            timeout=QUEUE_S + RUN_S,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        raise PreflightError(f"the probe cannot be started: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise PreflightError(f"the probe did not end within {QUEUE_S + RUN_S} s") from error
    told = [line for line in done.stdout.splitlines() if line.startswith("probe: ")]
    if done.returncode or not told:
        raise PreflightError(
            _explain([*done.stdout.splitlines(), *done.stderr.splitlines()], done.returncode)
        )
    return told[-1].removeprefix("probe: ")


def _explain(lines: Sequence[str], exit_status: int) -> str:
    found = verdict.classify(lines, exit_status)
    evidence = "\n".join(f"  {line}" for line in found.evidence)
    return f"the probe failed: {found.kind.replace('_', ' ')}: {found.message}\n{evidence}".rstrip()
