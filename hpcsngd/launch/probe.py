"""Whether the workers' Python can import torch where they will run: tried, not guessed.

On a cluster this is a job of its own on one node, with the site's preload lines and image, so it takes as
long as the queue; on a local site it takes seconds.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from submitit.core.utils import CommandFunction, FailedSubmissionError

from hpcsngd.errors import PreflightError, SchedulerError
from hpcsngd.launch import commands, environment, verdict
from hpcsngd.launch.executors import LsfSiteExecutor
from hpcsngd.launch.lsf import request
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.ssh import words

QUEUE_S = 300
"""How long a probe may wait for a node."""
RUN_S = 120
LSF_MIN = 5
POLL_S = 0.5

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
    if made.ssh:
        shared = {**words.search_path(os.environ), **made.env}
        return made.ssh.words(made.ssh.hosts[0], inside, shared)
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
    if made.scheduler == "lsf":
        status, lines = _on_lsf(made, folder)
    else:
        status, lines = _here_or_by_srun(made, folder)
    told = [line for line in lines if line.startswith("probe: ")]
    if status or not told:
        raise PreflightError(_explain(lines, status))
    return told[-1].removeprefix("probe: ")


def _here_or_by_srun(made: Plan, folder: Path) -> tuple[int, list[str]]:
    """Returns the exit status of the probe and what it printed."""
    asked = command(made, folder)
    shared = environment.worker_environment(os.environ, made)
    try:
        # the time limit is a last resort: srun gives up by itself, and takes its job along
        done = subprocess.run(
            asked,
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
    return done.returncode, [*done.stdout.splitlines(), *done.stderr.splitlines()]


def one_lsf_node(made: Plan) -> Plan:
    """Returns the plan of a short job on one host of an LSF site that asks for the same otherwise."""
    asked = {**made.directives, "J": "hpcsngd-probe", "W": request.walltime(LSF_MIN)}
    if "nnodes" in asked:
        asked["nnodes"] = 1
    elif "n" in asked:
        asked["n"] = int(asked["n"]) // made.nodes
    return dataclasses.replace(
        made,
        nodes=1,
        mode="torchrun",  # one agent per node, so one task
        walltime_min=LSF_MIN,
        launcher="none" if made.launcher in ("blaunch", "lsrun") else made.launcher,
        resource_sets=None,
        directives=asked,
    )


def _on_lsf(made: Plan, folder: Path) -> tuple[int, list[str]]:
    """Returns the same of a probe that is a job: only the job's own hosts are like those of the run."""
    inside = commands.wrap(made, str(folder), [made.python, "-c", _TEXT])
    with tempfile.TemporaryDirectory(prefix=".hpcsngd-probe-", dir=folder) as place:
        executor = LsfSiteExecutor(Path(place), one_lsf_node(made))
        try:
            job = executor.submit(CommandFunction(inside, verbose=False))
        except (FailedSubmissionError, SchedulerError) as error:
            raise PreflightError(f"the probe cannot be started: {error}") from error
        deadline = time.monotonic() + QUEUE_S + RUN_S
        while not job.done():
            if time.monotonic() > deadline:
                job.cancel(check=False)
                raise PreflightError(f"the probe did not end within {QUEUE_S + RUN_S} s")
            time.sleep(POLL_S)
        failure = job.exception()
        return (1, str(failure).splitlines()) if failure else (0, str(job.result()).splitlines())


def _explain(lines: Sequence[str], exit_status: int) -> str:
    found = verdict.classify(lines, exit_status)
    evidence = "\n".join(f"  {line}" for line in found.evidence)
    return f"the probe failed: {found.kind.replace('_', ' ')}: {found.message}\n{evidence}".rstrip()
