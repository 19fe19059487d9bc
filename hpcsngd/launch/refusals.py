"""Requests that are well formed but cannot work: the site's limits, its hardware, files that are not there.

Each check returns sentences that name the rule, where it was written and what was asked; none raises, so that
a person sees everything that is wrong at once.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hpcsngd import resources
from hpcsngd.config.catalogue import DATASETS, DatasetFacts
from hpcsngd.config.resolve import Resolved
from hpcsngd.config.site import Container
from hpcsngd.launch import container, limits
from hpcsngd.launch.images import check
from hpcsngd.launch.lsf import launchers

if TYPE_CHECKING:
    from hpcsngd.launch.plan import Host


def find(resolved: Resolved, host: Host) -> list[str]:
    """Returns why the request would fail, one sentence each; empty if nothing is known against it."""
    return [
        *of_the_site(resolved),
        *of_this_machine(resolved, host),
    ]


def of_the_site(resolved: Resolved) -> list[str]:
    """Returns what the site's own rules refuse, wherever the question is asked."""
    return [
        *_unsupported(resolved),
        *_sizes(resolved),
        *limits.problems(resolved, _rule(resolved, "limits")),
        *_resource_sets(resolved),
    ]


def of_this_machine(resolved: Resolved, host: Host) -> list[str]:
    """Returns why a job cannot be sent from a machine, or at all any more; a dry run may still show it."""
    return [*_retired(resolved), *_architecture(resolved, host), *_files(resolved, host)]


def _rule(resolved: Resolved, key: str) -> str:
    """Returns ``site key (file:line)``, or without the place where nobody wrote the key."""
    origin = _origin(resolved, f"site.{key}")
    where = "" if origin == "default" else f" ({origin})"
    return f"site {resolved.site_name}, {key}{where}"


def _origin(resolved: Resolved, key: str) -> str:
    while key:
        if resolved.origins.get(key, "default") != "default":
            return resolved.origins[key]
        key = key.rpartition(".")[0]
    return "default"


def _site_option(resolved: Resolved) -> str:
    """Returns what ``--site`` takes to mean this site: its name if that is known, its file otherwise."""
    file, _, line = _origin(resolved, "site.description").rpartition(":")
    known = resources.named_files("site_configs").get(resolved.site_name)
    # an origin is a file's line, or the override that won; a record may come from a machine with other files
    if not line.isdigit() or not Path(file).is_file() or (known is not None and known.samefile(file)):
        return resolved.site_name
    return shlex.quote(file if file.endswith((".yaml", ".yml")) else str(Path(file).absolute()))


_LAUNCHERS = {
    "slurm": ("srun", "none"),
    "lsf": ("jsrun", "blaunch", "lsrun", "none"),
    "local": ("none",),
    "ssh": ("none",),
}
"""What starts agents under each scheduler."""


def _retired(resolved: Resolved) -> Iterator[str]:
    if resolved.site.status == "retired":
        yield f"{_rule(resolved, 'status')}: the system is retired; its file is kept as a record"


def _unsupported(resolved: Resolved) -> Iterator[str]:
    site = resolved.site
    kind = site.scheduler.kind
    launcher = site.launch.launcher
    if launcher not in (None, *_LAUNCHERS[kind]):
        yield (
            f"{_rule(resolved, 'launch.launcher')}: {launcher} does not work with {kind}; "
            f"allowed: {', '.join(_LAUNCHERS[kind])}"
        )
    agents = resolved.nodes * (resolved.ranks_per_node if site.launch.mode == "per_rank" else 1)
    if kind == "slurm" and launcher == "none" and agents > 1:
        yield f"{_rule(resolved, 'launch.launcher')}: none starts one agent, but this job needs {agents}"
    if kind == "lsf" and launcher == "none" and resolved.nodes > 1:
        yield (
            f"{_rule(resolved, 'launch.launcher')}: none starts agents on the first host only, "
            f"but this job has {resolved.nodes} nodes"
        )
    if resolved.experiment.strategy == "parameter_server" and resolved.world_size < 2:
        yield "strategy parameter_server needs at least 2 ranks, the server and a worker: set ranks_per_node"
    if site.launch.gpu_visibility == "one" and site.launch.mode == "torchrun" and resolved.gpus_per_node:
        yield (
            f"{_rule(resolved, 'launch.gpu_visibility')}: one needs launch.mode: per_rank; "
            "torchrun shows every rank the same GPUs"
        )


def _resource_sets(resolved: Resolved) -> Iterator[str]:
    """Yields why jsrun could not place the resource sets on a node; a set never spans nodes."""
    site = resolved.site
    launcher = site.launch.launcher or ("jsrun" if site.scheduler.flavor == "csm" else None)
    if site.scheduler.kind != "lsf" or launcher != "jsrun":
        return
    if site.cpus_per_node is None:
        yield f"{_rule(resolved, 'cpus_per_node')}: jsrun is told the cores of a node, so they must be set"
        return
    sets = site.launch.resource_sets
    if sets is None:
        return
    rule = _rule(resolved, "launch.resource_sets")
    placed = launchers.ResourceSets(**sets.model_dump())
    if problem := placed.misfit(cores=site.cpus_per_node, gpus=site.gpus_per_node):
        yield f"{rule}: {problem}"
    tasks = resolved.ranks_per_node if site.launch.mode == "per_rank" else 1
    if sets.per_host * sets.tasks != tasks:
        yield (
            f"{rule}: {sets.per_host} x {sets.tasks} tasks on a node, launch.mode {site.launch.mode} "
            f"starts {tasks}"
        )


def _sizes(resolved: Resolved) -> Iterator[str]:
    site = resolved.site
    hosts = len(site.scheduler.hosts)
    if site.scheduler.kind == "ssh" and resolved.nodes > hosts:
        yield f"{_rule(resolved, 'scheduler.hosts')}: ssh has {hosts} host(s), asked: {resolved.nodes}"
    gpus, ranks = resolved.gpus_per_node, resolved.ranks_per_node
    if site.scheduler.kind == "local" and resolved.nodes > 1:
        yield f"{_rule(resolved, 'scheduler.kind')}: local is one node, asked: {resolved.nodes}"
    if gpus > site.gpus_per_node:
        yield f"{_rule(resolved, 'gpus_per_node')}: a node has {site.gpus_per_node} GPUs, asked: {gpus}"
    if gpus and ranks > gpus:
        yield f"{ranks} ranks per node need as many GPUs, asked: {gpus} per node"
    if site.cpus_per_node and ranks > site.cpus_per_node:
        yield (
            f"{_rule(resolved, 'cpus_per_node')}: a node has {site.cpus_per_node} cores, "
            f"asked: {ranks} ranks on it"
        )


def _architecture(resolved: Resolved, host: Host) -> Iterator[str]:
    site = resolved.site
    if site.scheduler.kind == "local" and site.arch not in ("any", host.machine):
        yield f"{_rule(resolved, 'arch')}: nodes are {site.arch}, this machine is {host.machine}"
    nodes = host.machine if site.scheduler.kind == "local" else site.arch
    found = host.image_arch(site.container.image) if site.container else None
    if found and nodes not in ("any", found):
        words = check.wrong_arch(found, nodes, _site_option(resolved))
        yield f"{_rule(resolved, 'container.image')}: {words}"


def _files(resolved: Resolved, host: Host) -> Iterator[str]:
    site = resolved.site
    if site.container:
        yield from _image(resolved, site.container, host)
    python = site.launch.python
    # a bare name is found on the node, after the preload lines; a path inside an image is the image's
    if python and "/" in python and not site.container and not host.exists(python):
        yield f"{_rule(resolved, 'launch.python')}: no Python at {python}"
    yield from _data(resolved, host)


def _image(resolved: Resolved, wanted: Container, host: Host) -> Iterator[str]:
    site = resolved.site
    if not host.exists(wanted.image):
        yield (
            f"{_rule(resolved, 'container.image')}: no image at {wanted.image}; "
            f"make it with: hpcsngd container build --site {_site_option(resolved)}"
        )
    elif problem := host.image_problem(wanted.image, wanted.code):
        yield f"{_rule(resolved, 'container.image')}: {problem}"
    try:
        container.passed_names(wanted, ())
    except ValueError as error:
        yield f"{_rule(resolved, 'container.pass_env')}: {error}"
    if site.scheduler.kind == "local":  # elsewhere the nodes may have what this machine lacks, and are asked
        for bind in container.binds(wanted, []):
            if not host.exists(container.source(bind)):
                yield f"{_rule(resolved, 'container.binds')}: {container.source(bind)} does not exist"
    root = resolved.experiment.data.root or site.data_root
    if (
        DATASETS[resolved.experiment.data.name].needs_root
        and root
        and not Path(root).expanduser().is_absolute()
    ):
        yield (
            f"the data root {root} is relative, but workers in an image start in the run directory: "
            "give an absolute path"
        )


def is_data_unseen(resolved: Resolved) -> bool:
    """Returns whether the data set is on compute nodes alone: nothing can be said of it from here."""
    site = resolved.site
    return site.data_root_on == "nodes" and site.scheduler.kind != "local"


def _data(resolved: Resolved, host: Host) -> Iterator[str]:
    data = resolved.experiment.data
    facts = DATASETS[data.name]
    if not facts.needs_root or data.download or any(host.exists(path) for path in facts.system_paths):
        return
    root = data.root or resolved.site.data_root
    if root and is_data_unseen(resolved):
        return
    if root is None:
        # a cluster's nodes may have the system package that this machine lacks
        if resolved.site.scheduler.kind == "local":
            yield f"data set {data.name} is not on this machine and no data root is set: {facts.get}"
        return
    key = "experiment.data.root" if data.root else "site.data_root"
    where = f"({key}, {_origin(resolved, key)})"
    if data.stage is not None and data.stage.archive is not None:
        if not host.exists(f"{root}/{data.stage.archive}"):
            yield f"experiment data.stage.archive: no {data.stage.archive} below {root} {where}"
    elif not any(host.exists(f"{root}/{probe}") for probe in facts.probes):
        yield f"data set {data.name} is not below {root} {where}: {facts.get}"
    elif missing := _partial(facts, root, host):
        yield f"data set {data.name}: {missing} {where}"
    if data.tokenizer and not host.exists(f"{(folder := Path(root, data.tokenizer))}/config.json"):
        yield (
            f"experiment data.tokenizer: no encoder in {folder} {where}: put config.json, "
            "model.safetensors and the tokenizer's files there, as the library transformers saves them"
        )


def _partial(facts: DatasetFacts, root: str, host: Host) -> str:
    """Returns what the data set's folder lacks; empty where some folder has everything."""
    lacking = {
        place: facts.absent(lambda name, place=place: host.exists(f"{place}/{name}"))  # type: ignore[misc]
        for place in (*(f"{root}/{folder}" for folder in facts.folders), root)
    }
    if not all(lacking.values()):
        return ""
    place, names = min(lacking.items(), key=lambda each: len(each[1]))
    return f"{place} lacks {', '.join(names)}"
