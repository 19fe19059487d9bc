"""Which hosts of a job are to compute, from the variables that LSF sets. Pure but for one given reader.

The order of hosts is LSF's and means something: the job's script runs on the first. On Summit-style systems
that first host is a shared batch node, which must get no process and must not be the master.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

BatchHost = Literal["auto", "yes", "no"]

# how far each is to be trusted: LSB_HOSTS is unset beyond 4096 bytes, some 14 nodes of Summit
SOURCES = ("LSB_DJOB_HOSTFILE", "LSB_MCPU_HOSTS", "LSB_HOSTS")
_SHARED = re.compile(r"batch|login|launch")


class HostsError(Exception):
    """The hosts of a job cannot be told, or differ from what was asked for."""


def allocated(
    environment: Mapping[str, str], read: Callable[[str], str | None]
) -> tuple[str, dict[str, int]]:
    """Returns which variable told, and host -> slots in LSF's order.

    Args:
        environment: the job's.
        read: returns a file's text, None if it cannot be read.

    Raises:
        HostsError: no variable tells.
    """
    for name in SOURCES:
        words = (environment.get(name) or "").split()  # LSB_MCPU_HOSTS ends in a blank
        if name == "LSB_DJOB_HOSTFILE" and words:
            words = (read(environment[name]) or "").split()
        if words:
            return name, _pairs(words) if name == "LSB_MCPU_HOSTS" else _counted(words)
    raise HostsError(f"none of {', '.join(SOURCES)} names a host; is this a job of LSF?")


def _counted(words: list[str]) -> dict[str, int]:
    slots: dict[str, int] = {}
    for host in words:
        slots[host] = slots.get(host, 0) + 1
    return slots


def _pairs(words: list[str]) -> dict[str, int]:
    if len(words) % 2 or not all(count.isdigit() for count in words[1::2]):
        raise HostsError(f"LSB_MCPU_HOSTS is not a list of hosts and slots: {' '.join(words)}")
    slots: dict[str, int] = {}
    for host, count in zip(words[::2], words[1::2], strict=True):
        slots[host] = slots.get(host, 0) + int(count)
    return slots


def compute_hosts(
    environment: Mapping[str, str],
    read: Callable[[str], str | None],
    *,
    nodes: int,
    batch_host: BatchHost = "auto",
    has_jsrun: bool = False,
) -> list[str]:
    """Returns the hosts that are to compute, in LSF's order.

    Args:
        environment: the job's.
        read: returns a file's text, None if it cannot be read.
        nodes: how many there must be.
        batch_host: whether the first host only runs the script; auto: see `is_batch`.
        has_jsrun: whether jsrun is in PATH.

    Raises:
        HostsError: no variable tells, or another number than asked for.
    """
    source, slots = allocated(environment, read)
    found = list(slots)
    is_shared = batch_host == "yes" or (
        batch_host == "auto" and is_batch(slots, environment, nodes=nodes, has_jsrun=has_jsrun)
    )
    chosen = found[1:] if is_shared else found
    if len(chosen) != nodes:
        first = f"; {found[0]} only runs the script" if is_shared else ""
        raise HostsError(f"asked for {nodes} node(s), {source} names {len(found)}: {', '.join(found)}{first}")
    return chosen


def is_batch(
    slots: Mapping[str, int], environment: Mapping[str, str], *, nodes: int, has_jsrun: bool
) -> bool:
    """Returns whether the first host is a batch node: plain LSF computes there, Summit must not.

    The signs, best first: CSM has made an allocation; jsrun is here and the first host has fewer slots than
    each other one; jsrun is here, there is one host too many and the first is called batch, login or launch.
    """
    hosts = list(slots)
    if len(hosts) < 2:
        return False
    if environment.get("CSM_ALLOCATION_ID"):
        return True
    if not has_jsrun:
        return False
    if slots[hosts[0]] < min(slots[host] for host in hosts[1:]):
        return True
    return len(hosts) == nodes + 1 and bool(_SHARED.search(hosts[0]))


def short(host: str) -> str:
    """Returns a host name without its domain; an address stays whole."""
    return host if host.replace(".", "").isdigit() else host.partition(".")[0]


def index_of(host: str, hosts: list[str]) -> int | None:
    """Returns the place of a host in a list, names compared without domains; None if it is not there."""
    names = [short(each) for each in hosts]
    return names.index(short(host)) if short(host) in names else None
