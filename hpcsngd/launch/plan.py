"""What will be asked for and started: one frozen record, made by arithmetic from a resolved configuration.

`make` refuses, all at once, what the site's rules or this version cannot carry out, before anything is
written or submitted. The plan is stored in ``run.yaml``: the agent on the node does what was decided at
submission and decides nothing again.
"""

from __future__ import annotations

import dataclasses
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hpcsngd.config.fields import port_range
from hpcsngd.config.resolve import Resolved
from hpcsngd.errors import PreflightError
from hpcsngd.launch import container, directives, limits, refusals
from hpcsngd.launch.lsf import flavors
from hpcsngd.launch.lsf.flavors import Flavor
from hpcsngd.launch.lsf.launchers import ResourceSets
from hpcsngd.launch.ssh.words import Ssh

WORKER = "hpcsngd.train.worker"
WITHOUT_QUEUE = ("local", "ssh")
"""Kinds of sites whose jobs start at once."""

Directive = str | int | bool


@dataclass(frozen=True)
class Host:
    """What `make` must know of the machine that submits.

    Attributes:
        machine: its architecture, such as ``x86_64``.
        python: the interpreter that runs us; it runs the agents too.
        exists: whether a path exists.
        image_arch: architecture of an image file, None if it cannot be told.
        runtime: the installed container runtime, None if there is none.
        image_problem: why an image file cannot be used with a site's ``container.code``, None if it can.
        flavor: the flavor of the LSF that jobs are sent to; asked only if the site does not say.
    """

    machine: str
    python: str
    exists: Callable[[str], bool]
    image_arch: Callable[[str], str | None]
    runtime: str | None = None
    image_problem: Callable[[str, str], str | None] = lambda path, code: None
    flavor: Callable[[], Flavor] = lambda: "ibm"

    @classmethod
    def here(cls) -> Host:
        """Returns this machine."""
        return cls(
            machine=platform.machine(),
            python=sys.executable,
            exists=lambda path: Path(path).expanduser().exists(),
            image_arch=lambda path: container.image_arch(Path(path).expanduser()),
            runtime=next((name for name in container.RUNTIMES if shutil.which(name)), None),
            flavor=_flavor_here,
            image_problem=lambda path, code: container.image_problem(Path(path).expanduser(), code),
        )


@dataclass(frozen=True)
class Plan:
    """What one attempt of a run asks for and starts.

    Attributes:
        site_name: the site.
        exp_name: the experiment.
        job_name: the experiment's name as schedulers accept it.
        scheduler: ``slurm``, ``lsf``, ``ssh`` or ``local``.
        nodes: nodes of the job.
        ranks_per_node: workers on each node.
        gpus_per_node: GPUs asked for on each node.
        cpus_per_rank: cores of one worker; None where the site does not count them.
        walltime_min: minutes after which the scheduler ends the attempt; at most the site's limit.
        mode: ``torchrun`` starts one agent per node, ``per_rank`` one agent per rank.
        launcher: what starts the agents: ``srun``, ``jsrun``, ``blaunch``, ``lsrun`` or ``none``.
        launch_args: more words for the launcher.
        agent_python: the interpreter of the agents, on the nodes but outside any image.
        python: the interpreter of the workers.
        worker: the module that a worker runs.
        preload: shell lines run on each node before the workers.
        env: variables set for the workers.
        container: words that run a command in the image, without the binds; empty without an image.
        image: the image's path; None without one.
        binds: bind mounts of the image besides the run directory; a node that lacks one cannot run it.
        binds_if_present: bind mounts that are left out on nodes that lack them.
        pass_env: variables that reach the workers in an image; ``*`` stands for any ending.
        gpu_visibility: ``all`` or ``one``.
        backend: ``gloo`` or ``nccl``.
        rendezvous_timeout_s: how long ranks wait for each other at the start, in seconds.
        ports: first and last port that may be leased for the rendezvous.
        directives: what the scheduler is asked, in its own names without dashes.
        skip_options: directives that the site refuses; they are left out.
        command_timeout_s: seconds given to one scheduler command.
        restart_on: ends that put the run back in the queue.
        max_attempts: how many attempts in a row there may be.
        stop_margin_s: seconds before the end of the wall time at which workers are asked to leave; None: as
            measured.
        hang_timeout_s: seconds without progress that count as a hang.
        start_timeout_s: the same until the first step.
        flavor: of LSF: ``ibm``, ``compatible`` or ``csm``; empty elsewhere.
        batch_host: of LSF: whether the first host is no compute node: ``yes``, ``no`` or ``auto``.
        resource_sets: what the site sets for jsrun, by the names of `ResourceSets`; None: the usual ones.
        after: paths of runs that must have completed before this one begins, see `hpcsngd.launch.turn`.
        ssh: the hosts and how they are reached; None where a scheduler or nobody gives hosts.
        is_served: whether there is a parameter server. Ranks then begin and end one by one: agents start each
            rank themselves in either mode, and one that is lost does not end the others.
    """

    site_name: str
    exp_name: str
    job_name: str
    scheduler: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_rank: int | None
    walltime_min: int
    mode: Literal["torchrun", "per_rank"]
    launcher: str
    launch_args: tuple[str, ...]
    agent_python: str
    python: str
    worker: str
    preload: tuple[str, ...]
    env: dict[str, str]
    container: tuple[str, ...]
    gpu_visibility: Literal["all", "one"]
    backend: str
    rendezvous_timeout_s: float
    ports: tuple[int, int]
    image: str | None = None
    binds: tuple[str, ...] = ()
    binds_if_present: tuple[str, ...] = ()
    pass_env: tuple[str, ...] = ()
    directives: dict[str, Directive] = field(default_factory=dict)
    skip_options: tuple[str, ...] = ()
    command_timeout_s: float = 60.0
    restart_on: tuple[str, ...] = ()
    max_attempts: int = 1
    stop_margin_s: float | None = None
    hang_timeout_s: float = 1800.0
    start_timeout_s: float = 1800.0
    flavor: Flavor | Literal[""] = ""
    batch_host: Literal["auto", "yes", "no"] = "auto"
    resource_sets: dict[str, Any] | None = None
    after: tuple[str, ...] = ()
    ssh: Ssh | None = None
    is_served: bool = False

    @property
    def starts_ranks(self) -> bool:
        """Returns whether agents start ranks themselves, each with logs of its own, and not torchrun."""
        return self.mode == "per_rank" or self.is_served

    @property
    def world_size(self) -> int:
        """Returns the number of workers."""
        return self.nodes * self.ranks_per_node

    @property
    def agents_per_node(self) -> int:
        """Returns how many agents the scheduler starts on each node."""
        return self.ranks_per_node if self.mode == "per_rank" else 1

    @property
    def cpus_per_agent(self) -> int | None:
        """Returns the cores of one agent and its workers; None where the site does not count them."""
        if self.cpus_per_rank is None:
            return None
        return self.cpus_per_rank * self.ranks_per_node // self.agents_per_node

    @property
    def jsrun_sets(self) -> ResourceSets | None:
        """Returns jsrun's resource sets; None with another launcher."""
        if self.launcher != "jsrun":
            return None
        if self.resource_sets:
            return ResourceSets(**self.resource_sets)
        cores = (self.cpus_per_rank or 1) * self.ranks_per_node
        return ResourceSets.usual(self.agents_per_node, self.gpus_per_node, cores, self.gpu_visibility)

    def to_record(self) -> dict[str, Any]:
        """Returns plain data for ``run.yaml``; `from_record` reads it back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Plan:
        """Returns the plan stored in a ``run.yaml``."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
        }
        if values.get("ssh"):
            values["ssh"] = Ssh(**values["ssh"])
        return cls(**values)


def make(resolved: Resolved, *, host: Host | None = None, worker: str = WORKER, is_dry: bool = False) -> Plan:
    """Returns the plan of one attempt; writes nothing.

    Args:
        resolved: the checked configuration.
        host: the machine that submits; default: this one.
        worker: the module that a worker runs; only tests change it.
        is_dry: whether the plan is only looked at: what speaks against this machine is then no objection.

    Raises:
        PreflightError: the site would refuse the request, or it cannot work; every reason is named.
    """
    host = host or Host.here()
    problems = refusals.of_the_site(resolved) if is_dry else refusals.find(resolved, host)
    if problems:
        raise PreflightError("\n".join(problems))
    site, restart = resolved.site, resolved.experiment.restart
    launch = site.launch
    cores = site.cpus_per_node
    python = site.scheduler.python or host.python
    plan = Plan(
        site_name=resolved.site_name,
        exp_name=resolved.exp_name,
        job_name=job_name(resolved.exp_name),
        scheduler=site.scheduler.kind,
        nodes=resolved.nodes,
        ranks_per_node=resolved.ranks_per_node,
        gpus_per_node=resolved.gpus_per_node,
        cpus_per_rank=cores // resolved.ranks_per_node if cores else None,
        walltime_min=limits.job_walltime_min(resolved),
        mode=launch.mode,
        launch_args=tuple(launch.args),
        agent_python=python,
        container=container.exec_words(site.container, host.runtime) if site.container else (),
        python=launch.python or ("python" if site.container else python),
        worker=worker,
        preload=tuple(site.preload),
        env=dict(site.env),
        gpu_visibility=launch.gpu_visibility,
        backend=_backend(launch.backend, resolved.gpus_per_node),
        rendezvous_timeout_s=launch.rendezvous_timeout_s,
        ports=port_range(site.master_port),
        skip_options=tuple(site.scheduler.skip_options),
        command_timeout_s=site.scheduler.command_timeout_s,
        # nobody would start a run again where there is no queue
        restart_on=() if site.scheduler.kind in WITHOUT_QUEUE else tuple(restart.on),
        max_attempts=restart.max_attempts,
        stop_margin_s=site.stop_margin_s,
        hang_timeout_s=restart.hang_timeout_s or site.hang_timeout_s,
        start_timeout_s=max(site.start_timeout_s, launch.rendezvous_timeout_s),
        ssh=Ssh.of(site.scheduler, resolved.nodes) if site.scheduler.kind == "ssh" else None,
        is_served=resolved.experiment.strategy == "parameter_server",
        **_launcher(resolved, host),
        **_image(resolved),
    )
    return dataclasses.replace(plan, directives=directives.wanted(resolved, plan))


def job_name(text: str) -> str:
    """Returns a name that every scheduler accepts: letters, digits, ``._+-``, at most 64 of them."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-")[:64] or "hpcsngd"


def _flavor_here() -> Flavor:
    """Returns the flavor of this machine's LSF; IBM's where there is none, for a dry run."""
    if shutil.which("lsid") is None:
        return "ibm"
    from hpcsngd.launch.lsf.plugin import detected_flavor  # submitit is slow to import

    return detected_flavor()


def _launcher(resolved: Resolved, host: Host) -> dict[str, Any]:
    """Returns the plan's fields about what starts the agents."""
    scheduler, launch = resolved.site.scheduler, resolved.site.launch
    if scheduler.kind != "lsf":
        return {"launcher": launch.launcher or ("srun" if scheduler.kind == "slurm" else "none")}
    flavor = host.flavor() if scheduler.flavor == "auto" else scheduler.flavor
    sets = launch.resource_sets
    return {
        "flavor": flavor,
        "launcher": launch.launcher or flavors.default_launcher(flavor, resolved.nodes),
        "batch_host": scheduler.batch_host,
        "resource_sets": sets.model_dump() if sets else None,
    }


def _backend(asked: str, gpus_per_node: int) -> str:
    if asked != "auto":
        return asked
    return "nccl" if gpus_per_node else "gloo"


def _image(resolved: Resolved) -> dict[str, Any]:
    """Returns the plan's fields about the image: its path, its binds, and the variables that go in."""
    site = resolved.site
    if site.container is None:
        return {}
    data_root = resolved.experiment.data.root or site.data_root
    always = [str(Path(data_root).expanduser().absolute())] if data_root else []
    return {
        "image": str(Path(site.container.image).expanduser().absolute()),
        "binds": container.binds(site.container, []),
        "binds_if_present": (*map(container.escaped, always), *container.optional_binds(site.container)),
        "pass_env": container.passed_names(site.container, site.env),
    }
