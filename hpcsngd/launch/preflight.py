"""The last look before a submission: everything that would make the job fail, told at once.

The site's own rules and files are `hpcsngd.launch.refusals`; here are the questions that need this machine
and its scheduler: folders, free space, torch, partitions and accounts. A question that cannot be answered
refuses nothing.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from hpcsngd.config.catalogue import DATASETS
from hpcsngd.config.resolve import Resolved
from hpcsngd.errors import PreflightError
from hpcsngd.launch import limits, partitions, plan, refusals, secrets
from hpcsngd.launch.lsf import queues
from hpcsngd.launch.plan import Host, Plan
from hpcsngd.launch.probe import probe as try_python

log = logging.getLogger(__name__)

MIN_FREE_MB = 256
"""Less room than this does not hold the checkpoints and logs of a small run."""
MIN_FREE_FILES = 1000


def check(
    resolved: Resolved,
    *,
    run_root: Path,
    worker: str = plan.WORKER,
    probe: bool = False,
    host: Host | None = None,
) -> Plan:
    """Returns the plan of a request that nothing is known against.

    Args:
        resolved: the checked configuration.
        run_root: folder in which the run directory will be made.
        worker: the module that a worker runs; only tests change it.
        probe: whether to import torch with the workers' Python on a node; takes as long as the queue.
        host: the machine that submits; default: this one.

    Raises:
        ConfigError: the configuration holds what looks like a secret.
        PreflightError: every reason why the job would fail.
    """
    secrets.refuse(resolved)
    host = host or Host.here()
    problems = [
        *refusals.find(resolved, host),
        *folder_problems(run_root),
        *_data_problems(resolved),
        *_python_problems(resolved),
        *scheduler_problems(resolved),
    ]
    if problems:
        raise PreflightError("\n".join(problems))
    _say_what_is_not_seen(resolved)
    made = plan.make(resolved, worker=worker, host=host)
    if probe:
        try_python(made, _nearest(run_root))
    return made


def _say_what_is_not_seen(resolved: Resolved) -> None:
    """Warns that the data set was not looked for, where the site says that only nodes see it."""
    data = resolved.experiment.data
    root = data.root or resolved.site.data_root
    if root and DATASETS[data.name].needs_root and refusals.is_data_unseen(resolved):
        log.warning(
            "data set %s below %s was not looked for: site %s has data_root_on: nodes. "
            "If it is missing there, the run fails at its start",
            data.name,
            root,
            resolved.site_name,
        )


def folder_problems(run_root: Path) -> Iterator[str]:
    """Yields why run directories cannot be made in a folder, which need not exist yet."""
    place = _nearest(run_root)
    if not place.is_dir():
        yield f"cannot write the run root {run_root}: {place} is not a folder; choose another with --run-root"
        return
    if not os.access(place, os.W_OK | os.X_OK):
        yield f"cannot write the run root {run_root}: no permission in {place}; choose another (--run-root)"
        return
    space = os.statvfs(place)
    free_mb = space.f_bavail * space.f_frsize // 2**20
    # file systems without a fixed size, or number of inodes, say 0 of 0
    if space.f_blocks and free_mb < MIN_FREE_MB:
        yield f"run root {run_root}: {free_mb} MB are free there, a run needs {MIN_FREE_MB} MB or more"
    if space.f_files and space.f_favail < MIN_FREE_FILES:
        yield f"run root {run_root}: room for {space.f_favail} files only, a run needs {MIN_FREE_FILES}"


def scheduler_problems(resolved: Resolved) -> list[str]:
    """Returns what the scheduler's tables say against a request; nothing where they cannot be read."""
    scheduler = resolved.site.scheduler
    if scheduler.kind == "lsf" and shutil.which("bqueues"):
        queue = None if "q" in scheduler.skip_options else limits.queue(resolved)
        known = queues.ask(timeout_s=scheduler.command_timeout_s)
        return list(queues.problems(queue, known, resolved.origins.get("site.scheduler.queue", "")))
    if scheduler.kind != "slurm" or shutil.which("scontrol") is None:
        return []
    dropped = set(scheduler.skip_options)
    asked = {
        key: None if key in dropped else str(scheduler.options.get(key) or getattr(scheduler, key) or "")
        for key in ("partition", "account", "qos")
    }
    request = partitions.Request(
        nodes=resolved.nodes,
        walltime_min=limits.job_walltime_min(resolved),
        partition=asked["partition"] or None,
        account=asked["account"] or None,
        qos=asked["qos"] or None,
        origin={key: resolved.origins.get(f"site.scheduler.{key}", "default") for key in asked},
    )
    return partitions.problems(request, timeout_s=scheduler.command_timeout_s)


def _data_problems(resolved: Resolved) -> Iterator[str]:
    root = resolved.experiment.data.root or resolved.site.data_root
    if root is None:
        return
    folder = Path(root).expanduser()
    # what stands here under this name is not what the nodes have
    if refusals.is_data_unseen(resolved):
        return
    if folder.exists() and not os.access(folder, os.R_OK | os.X_OK):
        yield f"data root {root}: no permission to read it"


def _python_problems(resolved: Resolved) -> Iterator[str]:
    """Yields that torch is missing where the workers' Python is ours as it stands."""
    site = resolved.site
    is_ours = site.launch.python in (None, sys.executable)
    if site.container or site.preload or not is_ours:
        return
    if importlib.util.find_spec("torch") is None:
        yield (
            f"torch is not installed for {sys.executable}, which would run the workers: "
            "pip install 'hpcsngd[train]', or name another Python in site.launch.python"
        )


def _nearest(folder: Path) -> Path:
    """Returns a folder, or the nearest of its parents that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())
