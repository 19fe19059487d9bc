"""What bsub is asked, from nodes, tasks and minutes; and the words of its command line. Pure.

Every option goes on the command line and the script's path comes last: the one form that all flavors and
sites take. ``#BSUB`` lines are ignored by a plain ``bsub script``, and ``bsub < script`` fails on Summit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from hpcsngd.errors import SchedulerError
from hpcsngd.launch.lsf import flavors
from hpcsngd.launch.lsf.flavors import Flavor

Directive = str | int | bool

MAX_ARRAY = 1000
"""Largest index of an array unless the site says otherwise (MAX_JOB_ARRAY_SIZE of lsb.params)."""
_NAME_LENGTH = 64
_DEPENDENCY = re.compile(r"(done|ended|exit|started)\((\d+)(\[\d+\])?\)")


def job_name(text: str) -> str:
    """Returns a name that every LSF takes, for arrays too: ``[A-Za-z0-9._-]``, at most 64 of them."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:_NAME_LENGTH] or "job"


def walltime(minutes: int) -> str:
    """Returns minutes as ``-W`` takes them, ``hours:minutes``; LSF has no seconds.

    Raises:
        ValueError: less than a minute.
    """
    if minutes < 1:
        raise ValueError(f"LSF counts wall time in whole minutes, asked: {minutes}")
    return f"{minutes // 60}:{minutes % 60:02}"


def directives(
    *,
    flavor: Flavor,
    name: str,
    nodes: int,
    tasks_per_node: int,
    walltime_min: int,
    cores_per_node: int | None = None,
    gpus_per_node: int = 0,
    mem_gb: float | None = None,
    account: str | None = None,
    queue: str | None = None,
    exclusive: bool = False,
    alloc_flags: str | None = None,
) -> dict[str, Directive]:
    """Returns options of bsub, name without dash -> value; ``True`` stands for a bare option.

    Where whole nodes are asked for (flavor csm) cores, GPUs and memory come with them. Elsewhere the cores
    are the slots, so that nobody else gets them: ``-n nodes*cores`` and ``span[ptile=cores]``.

    Args:
        flavor: the flavor.
        name: the job's name; made acceptable.
        nodes: nodes.
        tasks_per_node: processes per node, the slots where cores are not counted.
        walltime_min: minutes.
        cores_per_node: cores per node; None: not counted.
        gpus_per_node: GPUs per node; a compatible scheduler has no option for them, the site's options must.
        mem_gb: memory per node in GB; None: do not ask.
        account: project.
        queue: queue.
        exclusive: whole nodes.
        alloc_flags: CSM's flags, several of them separated by blanks in the one option that counts.

    Raises:
        ValueError: what this flavor cannot be asked.
    """
    wanted: dict[str, Directive | None] = {
        "J": job_name(name),
        "P": account,
        "q": queue,
        "W": walltime(walltime_min),
    }
    if flavor == "csm":
        wanted |= {"nnodes": nodes, "alloc_flags": alloc_flags}
    else:
        wanted |= _slots(flavor, nodes, cores_per_node or tasks_per_node, mem_gb)
        wanted["gpu"] = f"num={gpus_per_node}" if gpus_per_node and flavor == "ibm" else None
        wanted["x"] = exclusive or None
        wanted["alloc_flags"] = alloc_flags
    return {key: value for key, value in wanted.items() if value is not None}


def _slots(flavor: Flavor, nodes: int, per_node: int, mem_gb: float | None) -> dict[str, Directive | None]:
    resources = f"span[ptile={per_node}]"
    if mem_gb is not None:
        if flavor != "ibm":
            raise ValueError(
                "memory: the unit of -M and rusage[mem=] differs between LSF-compatible sites; "
                "write it as the site documents it in scheduler.options"
            )
        # a number with its unit: without one the unit is LSF_UNIT_FOR_LIMITS of the site
        resources = f"rusage[mem={max(1, round(mem_gb * 1024))}MB] {resources}"
    return {"n": nodes * per_node, "R": resources}


def array_name(name: str, count: int, parallel: int | None, *, limit: int = MAX_ARRAY) -> str:
    """Returns the value of ``-J`` for an array with the indices 1 to ``count``.

    An index out of bounds makes one ordinary job of that name, without an error, so bounds are checked here.

    Raises:
        ValueError: bounds that LSF does not take.
    """
    if not 1 <= count <= limit:
        raise ValueError(f"an array of {count} elements; allowed: 1 to {limit}")
    at_once = f"%{parallel}" if parallel and parallel < count else ""
    return f"{job_name(name)}[1-{count}]{at_once}"


def after(job_ids: Sequence[str], condition: str) -> str:
    """Returns the value of ``-w`` for jobs that must all have come to an end.

    Args:
        job_ids: the jobs.
        condition: ``done`` (with success), ``ended`` (in any way), ``exit`` or ``started``.

    Raises:
        ValueError: a condition that LSF does not know, or what is no job id.
    """
    terms = [f"{condition}({lsf_id(job_id)})" for job_id in job_ids]
    for term in terms:
        if not _DEPENDENCY.fullmatch(term):
            raise ValueError(f"{term} is no dependency of LSF; conditions: done, ended, exit, started")
    return " && ".join(terms)


def lsf_id(job_id: str) -> str:
    """Returns an id as LSF writes it: our ``60_4`` is the array element ``60[4]``."""
    number, _, index = job_id.partition("_")
    return f"{number}[{index}]" if index else number


def bsub_words(flavor: Flavor, options: Mapping[str, Directive], script: str) -> list[str]:
    """Returns bsub's command line.

    Raises:
        SchedulerError: options that this flavor does not take; every one is named.
    """
    found = {name: value for name, value in options.items() if value is not False}
    if refused := list(flavors.problems(flavor, found)):
        raise SchedulerError("\n".join(refused))
    words = ["bsub"]
    for name, value in found.items():
        words += [f"-{name}"] if value is True else [f"-{name}", str(value)]
    return [*words, script]
