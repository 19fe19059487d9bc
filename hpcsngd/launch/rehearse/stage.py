"""A site and an experiment made ready for this machine: the cluster to play, and the run in small. Pure.

The site's scheduler, launcher, options and limits stay as they are; what this machine cannot have goes: the
image, the preload lines, GPUs for the workers and the network interfaces that the site names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hpcsngd.config.fields import walltime_minutes
from hpcsngd.config.resolve import Override, Resolved, amend
from hpcsngd.errors import PreflightError
from hpcsngd.handover import DEVICE
from hpcsngd.launch import limits
from hpcsngd.launch.lsf import flavors
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.rehearse.cluster import Cluster, Row

ORIGIN = "rehearsal"
WALLTIME = "30m"

# bkill's signals are 10 s apart (JOB_TERMINATE_INTERVAL), scancel's are KillWait, 30 s by default
_GRACE_S = {"lsf": 10.0, "slurm": 30.0}
_LAUNCHERS = {"csm": ("jsrun",), "ibm": ("blaunch",), "compatible": ("lsrun",)}


def cluster(resolved: Resolved, made: Plan, nodes: int) -> Cluster:
    """Returns the cluster that plays a site: its queues and limits, and as many hosts as any request needs.

    Args:
        resolved: the site and the experiment, as they would be submitted.
        made: their plan.
        nodes: nodes of the run in small.

    Raises:
        PreflightError: the site has no scheduler that can be played.
    """
    site, scheduler = resolved.site, resolved.site.scheduler
    if scheduler.kind not in _GRACE_S:
        raise PreflightError(
            f"site {resolved.site_name} has no scheduler to be played ({scheduler.kind}); known: slurm, lsf"
        )
    flavor = flavors.checked(made.flavor) if made.flavor else "ibm"
    is_csm = made.flavor == "csm"
    queues = dict.fromkeys(filter(None, [limits.queue(resolved), *(row.queue for row in site.limits)]))
    rows = [
        Row(row.max_nodes, walltime_minutes(row.max_walltime), row.min_nodes, row.queue)
        for row in site.limits
    ]
    return Cluster(
        kind="lsf" if scheduler.kind == "lsf" else "slurm",
        hosts=tuple(f"c{number:02}" for number in range(1, max(nodes + 1, resolved.nodes) + 1)),
        flavor=flavor,
        batch_host="batch1" if scheduler.batch_host == "yes" or is_csm else "",
        slots=site.cpus_per_node or max(4, resolved.ranks_per_node),
        gpus=site.gpus_per_node,
        launchers=_LAUNCHERS[flavor] if scheduler.kind == "lsf" else (),
        limits=tuple(rows),
        queues=tuple(queues) or ("normal",),
        is_project_needed=scheduler.account is not None,
        refused=tuple(scheduler.skip_options),
        grace_s=_GRACE_S[scheduler.kind],
        requeue_gap_s=2.0 if scheduler.kind == "lsf" else 0.0,
    )


def scaled(resolved: Resolved, made: Plan, *, run_root: str, nodes: int, ranks: int) -> Resolved:
    """Returns the configuration of a run in small on the played site: CPU, gloo, no image.

    Args:
        resolved: the site and the experiment; the experiment scaled down already.
        made: the plan of the full run.
        run_root: folder for run directories.
        nodes: nodes.
        ranks: workers on each.

    Raises:
        ConfigError: the result does not fit the schema.
    """
    gpus = min(ranks, resolved.site.gpus_per_node)
    changes: dict[str, Any] = {
        "site.status": "live",
        "site.arch": "any",
        "site.container": None,
        "site.preload": [],
        "site.env": _environment(resolved.site.env),
        "site.launch.python": None,
        "site.launch.backend": "gloo",
        "site.launch.resource_sets": None,
        "site.launch.rendezvous_timeout_s": 120,
        "site.scheduler.poll_s": 1,
        "site.run_root": run_root,
        "experiment.resources.nodes": nodes,
        "experiment.resources.ranks_per_node": ranks,
        "experiment.resources.gpus_per_node": gpus,
        "experiment.resources.walltime": WALLTIME,
        "experiment.restart.on": ["timeout", "preempted", "node_failure"],
        "experiment.restart.max_attempts": 10,
    }
    if made.flavor:
        changes["site.scheduler.flavor"] = made.flavor
    if resolved.site.ranks_per_node is not None:
        changes["site.ranks_per_node"] = None
    return amend(resolved, [Override(path, value, ORIGIN) for path, value in changes.items()])


def endless(resolved: Resolved) -> Resolved:
    """Returns a configuration whose training does not end by itself, with a checkpoint after each epoch."""
    changes = {"experiment.epochs": 1_000_000, "experiment.checkpoint.every_epochs": 1}
    return amend(resolved, [Override(path, value, ORIGIN) for path, value in changes.items()])


def brief(resolved: Resolved, start_s: float) -> Resolved:
    """Returns an endless run with a wall time that it soon reaches.

    Workers are asked to leave at half of it, the earliest that is possible; until then they have twice the
    time that they are known to need for a start.

    Args:
        resolved: the run in small.
        start_s: seconds that a run took from its start to its first steps.
    """
    minutes = max(2, math.ceil(4 * start_s / 60))
    changes = {"experiment.resources.walltime": minutes, "site.stop_margin_s": 30 * minutes}
    return amend(endless(resolved), [Override(path, value, ORIGIN) for path, value in changes.items()])


def failing(resolved: Resolved) -> Resolved:
    """Returns a configuration of an endless run that is not started again."""
    return amend(endless(resolved), [Override("experiment.restart.on", [], ORIGIN)])


def _environment(site: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in site.items() if not name.endswith("_SOCKET_IFNAME")}
    # workers compute on CPUs, however many GPUs the job was given
    return {**kept, DEVICE: "cpu", "OMP_NUM_THREADS": "1"}


def longer(resolved: Resolved, minutes: int) -> Resolved:
    """Returns a configuration that asks for one job of so many minutes."""
    changes = {"experiment.resources.walltime": minutes, "experiment.restart.on": []}
    return amend(resolved, [Override(path, value, ORIGIN) for path, value in changes.items()])
