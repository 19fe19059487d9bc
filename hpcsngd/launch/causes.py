"""Why each line of a job is there: the key that it comes from, its file and line, and the reason. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

from hpcsngd.config.resolve import Resolved
from hpcsngd.launch import limits
from hpcsngd.launch.plan import Plan

_GPUS = "experiment.resources.gpus_per_node|site.gpus_per_node"
_NODES = "experiment.resources.nodes|site.nodes"
_WALLTIME = "experiment.resources.walltime|site.walltime"
_SETS = "site.launch.resource_sets|site.launch.mode"

# key of the configuration that a directive comes from; those not named here carry the key's own name
SLURM: dict[str, str] = {
    "job-name": "the experiment's name",
    "nodes": _NODES,
    "ntasks-per-node": "site.launch.mode",
    "cpus-per-task": "site.cpus_per_node",
    "gpus-per-node": _GPUS,
    "gres": _GPUS,
    "mem": "site.mem_gb_per_node",
    "time": _WALLTIME,
    "array": "the matrix and site.scheduler.parallel_cells",
    "requeue": "experiment.restart.on",
    "no-requeue": "experiment.restart.on",
    "signal": "site.stop_margin_s",
    "dependency": "--after",
    "hold": "--hold",
    "open-mode": "submitit: a requeued job keeps its logs",
    "output": "submitit's folder",
    "error": "submitit's folder",
}
LSF: dict[str, str] = {
    "J": "the experiment's name",
    "P": "site.scheduler.account",
    "q": "site.scheduler.queue",
    "W": _WALLTIME,
    "nnodes": _NODES,
    "n": "nodes x site.cpus_per_node: slots",
    "R": "site.cpus_per_node: slots of each node",
    "gpu": _GPUS,
    "x": "site.scheduler.exclusive",
    "w": "--after",
    "H": "--hold",
    "o": "LSF's own report; the job writes its logs itself",
    "r": "experiment.restart.on",
    "rn": "experiment.restart.on",
}
_HEAD: dict[str, tuple[str, str]] = {
    "nodes": (_NODES, "compute hosts that there must be"),
    "tasks-per-node": ("site.launch.mode", "agents on each"),
    "limit-min": (_WALLTIME, "the run limit, by the head's own clock"),
    "warning-s": ("site.stop_margin_s", "tasks are warned so long before it"),
    "launcher": ("site.launch.launcher", "what starts the agents"),
    "batch-host": ("site.scheduler.batch_host", "whether the first host is no compute node"),
    "launcher-arg": ("site.launch.args", "more words for the launcher"),
    "sets": (_SETS, "jsrun's -r, -a, -g, -c, -b"),
    "straggler-s": ("hpcsngd", "after a failed agent the others have so long"),
}
_JSRUN: dict[str, tuple[str, str]] = {
    "-n": (_NODES, "resource sets in all"),
    "-r": (_SETS, "resource sets per node; a set never spans nodes"),
    "-a": (_SETS, "tasks in each set"),
    "-g": (_GPUS, "GPUs of each set; a task sees those of its set only"),
    "-c": ("site.cpus_per_node", "physical cores of each set"),
    "-b": (_SETS, "binding"),
    "-d": ("hpcsngd", "consecutive ranks share a node, as torch numbers them"),
}
_BINDING = {
    "none": "an agent is not bound: its workers would all sit on its cores",
    "rs": "tasks share the cores of their set",
    "packed": "each task gets cores of its own",
}


def cause(name: str, resolved: Resolved, table: Mapping[str, str]) -> tuple[str, str]:
    """Returns the key that a directive comes from, and where that key was set.

    Args:
        name: the directive without dashes.
        resolved: the configuration.
        table: `SLURM` or `LSF`.
    """
    if f"site.scheduler.options.{name}" in resolved.origins:
        key = f"site.scheduler.options.{name}"
        return key, resolved.origins[key]
    row = limits.chosen_row(resolved) if limits.named_queue(resolved) is None else None
    if name in ("q", "partition") and row:
        return f"site.limits, {limits.row_text(row)}", resolved.origins.get("site.limits", "")
    return _first(table.get(name, f"site.scheduler.{name}"), resolved)


def _first(keys: str, resolved: Resolved) -> tuple[str, str]:
    """Returns the first of the keys, given as ``a|b``, that somebody set, and where."""
    names = keys.split("|")
    for key in names:
        if resolved.origins.get(key, "default") != "default":
            return key, resolved.origins[key]
    return names[-1], resolved.origins.get(names[-1], "")


def head(script: str, resolved: Resolved) -> list[str]:
    """Returns one line per option of the head in an LSF job's script: what it is, and where it comes from."""
    rows = []
    for option, value in re.findall(r"(?<= )--([a-z-]+)=(\S+)", script):
        if option in _HEAD:
            keys, text = _HEAD[option]
            key, where = _first(keys, resolved)
            rows.append(f"{f'--{option}={value}':<36} {text:<44} {key:<36} {where}".rstrip())
    return rows


def jsrun(made: Plan, words: Sequence[str], resolved: Resolved) -> list[str]:
    """Returns one line per option of a jsrun command: what it is, why, and where it comes from.

    Args:
        made: the plan.
        words: the command.
        resolved: the configuration.
    """
    rows = []
    for option, value in itertools.pairwise(words):
        if option not in _JSRUN:
            continue
        keys, text = _JSRUN[option]
        if option == "-b":
            text = _BINDING.get(value.partition(":")[0], text)
        key, where = _first(keys, resolved)
        rows.append(f"{f'{option} {value}':<14} {text:<62} {key:<34} {where}".rstrip())
        if option == "-d":
            break  # what follows are the site's own words and the command
    where = resolved.origins.get("site.launch.args", "")
    return rows + [f"{word:<77} {'site.launch.args':<34} {where}".rstrip() for word in made.launch_args]


def devices(made: Plan) -> str:
    """Returns which GPU a rank takes, for people; empty without GPUs."""
    if not made.gpus_per_node:
        return ""
    if made.gpu_visibility == "one":
        return "each rank sees one GPU, its own, as device 0"
    return f"rank r runs on node r // {made.ranks_per_node} with GPU r % {made.ranks_per_node} of that node"
