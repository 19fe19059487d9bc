"""What a played cluster is: hosts, queues, limits and manners, and the folder that stands for it.

The folder holds the description, the job records and a ``bin`` with the scheduler's commands. Nothing runs in
it until a job is submitted; everything in it is this user's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FOLDER = "HPCSNGD_PLAYED"
"""Names the folder of the played cluster; the commands find it by this variable."""
JOB = "HPCSNGD_PLAYED_JOB"
"""Marks every process of a played job with the job's key."""
HOST = "HPCSNGD_PLAYED_HOST"
"""Names the played host on which a process stands."""
ADDRESSES = "HPCSNGD_PLAYED_ADDRESSES"
"""Where played hosts are found: ``name=address`` words, because their names do not resolve."""

_COMMANDS: dict[str, tuple[str, ...]] = {
    "lsf": ("bsub", "bjobs", "bkill", "bhist", "brequeue", "bstop", "bresume", "bqueues", "bparams", "lsid"),
    "slurm": ("sbatch", "squeue", "scancel", "scontrol", "srun", "sacct"),
}


@dataclass(frozen=True)
class Row:
    """One row of the rules: so many nodes may run for so long in a queue.

    Attributes:
        max_nodes: largest number of nodes.
        max_walltime_min: longest wall time in minutes.
        min_nodes: smallest number of nodes.
        queue: the queue that the row is about; None: all.
    """

    max_nodes: int
    max_walltime_min: int
    min_nodes: int = 1
    queue: str | None = None

    def allows(self, nodes: int, walltime_min: float, queue: str | None) -> bool:
        """Returns whether a request fits the row."""
        right_queue = self.queue is None or queue is None or self.queue == queue
        return (
            right_queue
            and self.min_nodes <= nodes <= self.max_nodes
            and walltime_min <= self.max_walltime_min
        )


@dataclass(frozen=True)
class Cluster:
    """A played cluster.

    Attributes:
        kind: the scheduler that is played.
        hosts: names of the compute hosts.
        flavor: of LSF: ``ibm``, ``compatible`` (OpenLava family) or ``csm`` (Summit: -nnodes and jsrun).
        batch_host: the host on which job scripts run where it is not a compute host; empty: the first one.
        slots: job slots of a compute host.
        gpus: GPUs of a compute host.
        launchers: which of jsrun, blaunch and lsrun are installed.
        limits: what is allowed; no rows: everything.
        queues: the queues, the default one first; a request for another one is refused.
        is_project_needed: whether a job without a project (account) is refused.
        refused: options that the site refuses, without dashes.
        minute_s: seconds of one minute of wall time.
        grace_s: seconds between the signals of a staged kill.
        limit_grace_s: seconds between the warning at the run limit and the kill; 600 on a real LSF.
        requeue_gap_s: seconds for which a requeued job looks finished.
        forget_s: seconds after which a finished job is forgotten.
        facts: more words for one scheduler's commands.
    """

    kind: Literal["lsf", "slurm"]
    hosts: tuple[str, ...]
    flavor: Literal["ibm", "compatible", "csm"] = "ibm"
    batch_host: str = ""
    slots: int = 4
    gpus: int = 0
    launchers: tuple[str, ...] = ()
    limits: tuple[Row, ...] = ()
    queues: tuple[str, ...] = ("normal",)
    is_project_needed: bool = False
    refused: tuple[str, ...] = ()
    minute_s: float = 60.0
    grace_s: float = 2.0
    limit_grace_s: float = 10.0
    requeue_gap_s: float = 0.5
    forget_s: float = 3600.0
    facts: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def addresses(self) -> dict[str, str]:
        """Returns where each host is found: all of 127/8 is this machine."""
        names = [self.batch_host or "-", *self.hosts]
        return {
            name: f"127.0.{number // 250}.{number % 250 + 1}"
            for number, name in enumerate(names)
            if name != "-"
        }

    def refusal(self, *, nodes: int, walltime_min: float, queue: str) -> str | None:
        """Returns which rule a request breaks, in words; None if it breaks none."""
        if queue not in self.queues:
            return f"{queue}: no such queue; queues: {', '.join(self.queues)}"
        if nodes > len(self.hosts) and not self.limits:
            return f"{nodes} nodes asked, the cluster has {len(self.hosts)}"
        if self.limits and not any(row.allows(nodes, walltime_min, queue) for row in self.limits):
            return f"{nodes} node(s) for {walltime_min:g} min in {queue} fit no row of the limits"
        return None


def install(folder: Path, cluster: Cluster) -> dict[str, str]:
    """Makes a played cluster in a folder and returns the variables with which its commands are found.

    Args:
        folder: its place; made if need be, and owned by the cluster alone.
        cluster: what it is.
    """
    folder = folder.absolute()
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(cluster), indent=1)
    (folder / "cluster.json").write_text(text, encoding="utf-8")
    for name in (*_COMMANDS[cluster.kind], *cluster.launchers):
        _write_command(folder / "bin" / name)
    placed = " ".join(f"{name}={address}" for name, address in cluster.addresses.items())
    path = os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", os.defpath)])
    return {FOLDER: str(folder), ADDRESSES: placed, "PATH": path}


def _write_command(file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    # not -m: it would put the caller's folder first in sys.path
    code = "from hpcsngd.launch.rehearse.__main__ import main; main()"
    file.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{code}' {file.name} \"$@\"\n", encoding="utf-8")
    file.chmod(0o755)


def load(folder: Path) -> Cluster:
    """Returns the cluster that a folder stands for."""
    values: dict[str, Any] = json.loads((folder / "cluster.json").read_text(encoding="utf-8"))
    rows = tuple(Row(**row) for row in values.pop("limits"))
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Cluster(**{**values, **lists, "limits": rows})


def here(environment: Mapping[str, str]) -> Path:
    """Returns the folder of the played cluster that a command belongs to.

    Raises:
        SystemExit: it was called outside a rehearsal.
    """
    if FOLDER not in environment:
        raise SystemExit(f"{FOLDER} is not set: this command belongs to a rehearsal")
    return Path(environment[FOLDER])
