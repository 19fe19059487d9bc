"""The scheduler: its programs, its versions, and its partitions against what the site file says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hpcsngd.config.fields import walltime_minutes, walltime_text
from hpcsngd.config.site import Site
from hpcsngd.launch import partitions
from hpcsngd.launch.doctor import lsf, ssh
from hpcsngd.launch.doctor.finding import Finding, broken, ok, warning
from hpcsngd.launch.doctor.machine import Machine

SLURM_PROGRAMS = ("sbatch", "squeue", "scancel", "scontrol", "srun", "sinfo")
SINFO = ("sinfo", "--noheader", "--format=%R|%a|%l|%D|%c|%G")
_GPUS = re.compile(r"gpu(?::[^:,()]+)?:(\d+)")


@dataclass(frozen=True)
class Partition:
    """One line of `SINFO`: nodes of a partition that are alike.

    Attributes:
        name: the partition.
        is_up: whether it accepts jobs.
        max_minutes: its time limit; None for none.
        nodes: how many such nodes it has.
        cpus: of each node.
        gpus: of each node.
    """

    name: str
    is_up: bool
    max_minutes: int | None
    nodes: int
    cpus: int
    gpus: int


def parse_sinfo(text: str) -> list[Partition]:
    """Returns the lines of `SINFO` that are complete."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 6:
            name, state, limit, nodes, cpus, gres = cells
            gpus = sum(int(count) for count in _GPUS.findall(gres))
            # "8+" stands for nodes that differ: at least 8
            count = int(cpus.rstrip("+"))
            found.append(Partition(name, state == "up", partitions.minutes(limit), int(nodes), count, gpus))
    return found


def check(site_name: str | None, site: Site | None, machine: Machine) -> Iterator[Finding]:
    """Yields what is found about the scheduler; without a site, whether there is one."""
    if site is None:
        yield _any(machine)
    elif site.scheduler.kind == "local":
        yield ok("scheduler", "local: jobs are processes of this machine")
    elif site.scheduler.kind == "slurm":
        yield from _slurm(site_name or "", site, machine)
    elif site.scheduler.kind == "lsf":
        yield from lsf.check(site_name or "", site, machine)
    else:
        yield from ssh.check(site, machine)


def _any(machine: Machine) -> Finding:
    for program, question in {"sbatch": ["sbatch", "--version"], "bsub": ["lsid"]}.items():
        if machine.find(program):
            said = machine.run(question, 30)
            if said.status == 0:
                return ok("scheduler", said.text.strip().partition("\n")[0])
            return warning(
                "scheduler", f"{program}: {_short(said.text)}", "jobs cannot be submitted from here"
            )
    return ok("scheduler", "none here; site local runs jobs on this machine")


def _slurm(site_name: str, site: Site, machine: Machine) -> Iterator[Finding]:
    missing = [program for program in SLURM_PROGRAMS if machine.find(program) is None]
    if missing:
        yield broken("scheduler", f"no {', '.join(missing)} in PATH", "use a login node of the cluster")
        return
    version = _short(machine.run(["sbatch", "--version"], 30).text)
    lines = machine.run(SINFO, site.scheduler.command_timeout_s)
    if lines.status != 0:
        text = f"the controller does not answer: {_short(lines.text)}"
        yield broken("scheduler", text, "it may be down, or SLURM_CONF may be wrong")
        return
    yield ok("scheduler", version)
    yield _accounting(machine, site.scheduler.command_timeout_s)
    yield from _partition(site_name, site, parse_sinfo(lines.text))


def _accounting(machine: Machine, timeout_s: float) -> Finding:
    said = machine.run(["sacct", "--noheader", "--allocations", "--format=JobID"], timeout_s)
    if machine.find("sacct") and said.status == 0:
        return ok("accounting", "sacct answers")
    advice = "states of jobs that Slurm has forgotten come from the run directory alone; nothing to do"
    return warning("accounting", f"sacct: {_short(said.text)}", advice)


def _partition(site_name: str, site: Site, lines: list[Partition]) -> Iterator[Finding]:
    wanted = site.scheduler.partition
    names = sorted({line.name for line in lines})
    if wanted is None:
        yield ok("partition", f"the cluster's default; there are {', '.join(names)}")
        return
    own = [line for line in lines if line.name == wanted]
    file = f"site_configs/{site_name}.yaml"
    if not own:
        yield broken("partition", f"{wanted} is not among {', '.join(names)}", f"correct it in {file}")
        return
    nodes = sum(line.nodes for line in own)
    if not any(line.is_up for line in own):
        yield broken("partition", f"{wanted} is down", "ask the site's operators")
    differences = list(_differences(site, own))
    if differences:
        yield warning("partition", f"{wanted}: {'; '.join(differences)}", f"correct {file}")
    else:
        yield ok("partition", f"{wanted}: {nodes} nodes, as the site file says")


def _differences(site: Site, own: list[Partition]) -> Iterator[str]:
    """Yields where the file promises more than the partition has."""
    largest = {"nodes": sum(line.nodes for line in own)}
    largest |= {name: max(getattr(line, name) for line in own) for name in ("cpus", "gpus")}
    if site.nodes > largest["nodes"]:
        yield f"nodes {site.nodes}, but it has {largest['nodes']}"
    if (site.cpus_per_node or 0) > largest["cpus"]:
        yield f"cpus_per_node {site.cpus_per_node}, but nodes have {largest['cpus']}"
    if site.gpus_per_node > largest["gpus"] and site.scheduler.gpu_request != "none":
        yield f"gpus_per_node {site.gpus_per_node}, but Slurm knows of {largest['gpus']}"
    limits = [line.max_minutes for line in own]
    if None in limits:
        return
    longest = max(limit for limit in limits if limit is not None)
    asked = [walltime_minutes(row.max_walltime) for row in site.limits if row.queue in (None, own[0].name)]
    for minutes in {site.walltime_min, *asked}:
        if minutes > longest:
            yield f"walltime {walltime_text(minutes)}, but its limit is {walltime_text(longest)}"


def _short(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"
