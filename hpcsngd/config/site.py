"""The site schema: where to run. No science in it."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from hpcsngd.config.fields import Port, Strict, Text, Walltime, walltime_minutes

Directive = bool | Text
_SSH_HOST = re.compile(r"(?!-)[^\s/]+")  # ssh would read a leading dash as an option


class Scheduler(Strict):
    """How jobs reach the nodes."""

    kind: Literal["slurm", "local", "lsf", "ssh"]
    """The scheduler; `local` starts processes on this machine, `ssh` on `hosts`; both have no queue."""
    hosts: list[Text] = Field(default_factory=list)
    """ssh: the hosts, as ssh takes them (a name, `user@name`, an alias of your ssh configuration); a run gets
    the first ones."""
    addresses: dict[str, Text] = Field(default_factory=dict)
    """ssh: host -> address where the other hosts find it; default: its name in `hosts`."""
    user: Text | None = None
    """ssh: login name; default: ssh's."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """ssh: port of the hosts' ssh servers; default: ssh's."""
    python: Text | None = None
    """ssh: Python of the agents, and of workers without an image; default: the one that runs hpcsngd."""
    pass_env: list[Text] = Field(default_factory=list)
    """ssh: variables of the submitter that go along, besides PYTHONPATH; never written to a file."""
    account: Text | None = None
    """Project that is charged."""
    partition: Text | None = None
    """Slurm partition; default: the first one in `limits` that allows the job, else the cluster's own."""
    queue: Text | None = None
    """LSF queue; default: the first one in `limits` that allows the job."""
    flavor: Literal["auto", "ibm", "compatible", "csm"] = "auto"
    """Of LSF: IBM's, a compatible one without IBM's options, or IBM's with CSM and jsrun (Summit); auto: ask
    lsid where the job is submitted."""
    alloc_flags: Text | None = None
    """LSF with CSM: flags of the allocation in one text, such as `smt4 nvme`: only one option counts."""
    batch_host: Literal["auto", "yes", "no"] = "auto"
    """LSF: whether the first host of a job is no compute node; auto: with CSM, or if it has fewer slots."""
    qos: Text | None = None
    """Slurm quality of service."""
    constraint: Text | None = None
    """Slurm node features."""
    reservation: Text | None = None
    """Slurm reservation."""
    wckey: Text | None = None
    """Slurm workload characterisation key; most sites refuse one, so none is sent unless set."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for: --gpus-per-node, --gres=gpu:N, or not at all (whole-node sites)."""
    exclusive: bool = False
    """Ask for whole nodes."""
    options: dict[str, Directive] = Field(default_factory=dict)
    """More directives, name without dashes -> value; `true` writes the bare option. With ssh: more options of
    ssh's configuration, such as `IdentityFile`; `true` is `yes`."""
    skip_options: list[Text] = Field(default_factory=list)
    """Directives to leave out because the site refuses them, such as `mem` or `gpus-per-node`."""
    parallel_cells: int | None = Field(default=None, ge=1)
    """How many cells of a sweep run at once; default: no limit, without a queue (local, ssh) one."""
    poll_s: float = Field(default=30.0, gt=0)
    """Seconds between questions to the scheduler while waiting."""
    command_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds after which a scheduler command that does not answer is given up."""

    @field_validator("hosts")
    @classmethod
    def _hosts_are_hosts(cls, hosts: list[str]) -> list[str]:
        if wrong := [host for host in hosts if not _SSH_HOST.fullmatch(host)]:
            raise ValueError(f"{wrong[0]!r} is no host; allowed: a name, user@name or an address")
        bare = [host.rpartition("@")[2] for host in hosts]
        if twice := [host for host in bare if bare.count(host) > 1]:
            raise ValueError(f"{twice[0]} stands there twice; one agent per host")
        return hosts


class ResourceSets(Strict):
    """How jsrun cuts a node into sets of cores and GPUs."""

    per_host: int = Field(ge=1)
    """Sets on each node: -r."""
    tasks: int = Field(ge=1)
    """Tasks in each set: -a."""
    gpus: int = Field(ge=0)
    """GPUs of each set: -g."""
    cores: int = Field(ge=1)
    """Physical cores of each set: -c."""
    bind: Text = "none"
    """How tasks are bound: none, rs or packed:N (-b)."""


class Launch(Strict):
    """How workers are started on the allocated nodes."""

    mode: Literal["torchrun", "per_rank"] = "torchrun"
    """One torchrun per node, or one process per rank started by the scheduler's launcher."""
    launcher: Literal["srun", "jsrun", "blaunch", "lsrun", "mpirun", "none"] | None = None
    """What starts the agents on the nodes; default: srun on Slurm, by flavor on LSF, none on a local site."""
    args: list[Text] = Field(default_factory=list)
    """More arguments for the launcher."""
    resource_sets: ResourceSets | None = None
    """jsrun's resource sets; default: one per node, or one per rank with `gpu_visibility: one`."""
    gpu_visibility: Literal["all", "one"] = "all"
    """Whether a rank sees all GPUs of its node (device = local rank) or only its own (device 0)."""
    python: Text | None = None
    """Python that runs the workers; default: the one that runs hpcsngd, or `python` inside an image."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """torch.distributed backend; auto: nccl with GPUs, else gloo."""
    rendezvous_timeout_s: float = Field(default=300.0, gt=0)
    """How long ranks wait for each other at the start."""


class ImageBuild(Strict):
    """How the site's image is built; used by `hpcsngd container def` and `hpcsngd container build` alone."""

    base: Literal["debian", "cuda", "cuda-ppc64le", "rocm", "local"] | None = None
    """What the image stands on; default: by architecture and GPUs."""
    parent: Text | None = None
    """Image to start from instead of the base's own: a registry's name, or a path for base local."""
    pins: dict[str, Text] = Field(default_factory=dict)
    """Versions instead of the base's own, such as `TORCH: 2.6.0`."""
    mirror: Text | None = None
    """Debian mirror; default: the one that apt on the building machine uses."""
    how: Literal["plain", "fakeroot", "remote"] = "plain"
    """plain: as root, or as a user where the runtime can by itself; --fakeroot; --remote (SingularityCE)."""
    binds: list[Text] = Field(default_factory=list)
    """Bind mounts while building, such as a folder of certificates."""
    args: list[Text] = Field(default_factory=list)
    """More arguments for `build`."""
    tmp: Text | None = None
    """Folder for the runtime's scratch files; it needs about three times the image's size."""
    compression: Literal["gzip", "zstd"] = "gzip"
    """zstd builds three times as fast; old runtimes (3.x) may not read it."""


class Container(Strict):
    """The image that workers run in."""

    runtime: Literal["auto", "apptainer", "singularity"] = "auto"
    """Which runtime; auto takes whichever is installed."""
    image: str
    """Path of the .sif file."""
    code: Literal["image", "bind"] = "image"
    """Whether workers run the hpcsngd inside the image, or the submitter's, bound over it."""
    binds: list[Text] = Field(default_factory=list)
    """Bind mounts, `host[:inside[:options]]`; the run directory and the data root are always bound."""
    binds_if_present: list[Text] = Field(default_factory=list)
    """Bind mounts that are left out on nodes that lack the path."""
    gpu_flag: Literal["--nv", "--rocm", "none"] = "none"
    """Flag that brings the GPU driver into the image."""
    pass_env: list[Text] = Field(default_factory=list)
    """More variables that reach the workers, besides those of `env`, ranks, GPUs and libraries; `ABC_*`: all
    that begin so."""
    tmp: Text | None = None
    """Folder of the node that is /tmp in the image; default: the node's own /tmp."""
    args: list[Text] = Field(default_factory=list)
    """More arguments for `exec`."""
    build: ImageBuild = ImageBuild()
    """How the image is built."""


class Limit(Strict):
    """One row of the site's table of limits: up to `max_nodes` nodes may run for `max_walltime`."""

    max_nodes: int = Field(ge=1)
    """Largest number of nodes of this row."""
    max_walltime: Walltime
    """Longest wall time for jobs of this row."""
    min_nodes: int = Field(default=1, ge=1)
    """Smallest number of nodes of this row."""
    queue: Text | None = None
    """Partition or queue that the row is about; default: all."""
    on_request: bool = False
    """Whether the row's queue is left alone unless it is named, such as one whose jobs are preempted."""


class Site(Strict):
    """A site: one YAML file in site_configs/."""

    description: Text
    """What and where the system is."""
    contact: str = ""
    """Who keeps this file."""
    docs: list[Text] = Field(default_factory=list)
    """Public documents that the facts come from."""
    checked_on: Text = ""
    """Date on which the facts were last compared with the documents or the machine."""
    status: Literal["live", "template", "retired"] = "live"
    """Whether jobs can be sent there."""
    arch: Literal["any", "x86_64", "aarch64", "ppc64le"] = "any"
    """Architecture of the compute nodes."""
    scheduler: Scheduler
    """How jobs reach the nodes."""
    nodes: int = Field(default=1, ge=1)
    """Nodes, unless the experiment or the command line says otherwise."""
    gpus_per_node: int = Field(default=0, ge=0)
    """GPUs in each node."""
    ranks_per_node: int | None = Field(default=None, ge=1)
    """Workers per node; default: one per GPU, or one on a node without GPUs."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    """Physical cores that jobs may use per node; shared evenly by the ranks."""
    mem_gb_per_node: float | None = Field(default=None, ge=0)
    """Memory to ask for per node; 0 asks for all; default: do not ask."""
    walltime: Walltime = "01:00:00"
    """Wall time, unless the experiment or the command line says otherwise."""
    stop_margin_s: float | None = Field(default=None, gt=0)
    """Seconds before the end of the wall time at which workers checkpoint and leave; default: measured."""
    hang_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds without progress on a node after which a run counts as hung and is stopped."""
    start_timeout_s: float = Field(default=1800.0, gt=0)
    """The same until the first step: imports from a slow file system, the rendezvous, compilation."""
    master_port: Port = "auto"
    """Port of the rendezvous: auto, a number, or a range; leased on node 0 at run time."""
    launch: Launch = Launch()
    """How workers are started on the nodes."""
    preload: list[Text] = Field(default_factory=list)
    """Shell lines run before Python on each node (module load, source, export)."""
    env: dict[str, Text] = Field(default_factory=dict)
    """Environment variables of the workers."""
    container: Container | None = None
    """The image that workers run in; default: none."""
    data_root: Text | None = None
    """Folder that holds the data sets."""
    data_root_on: Literal["all", "nodes"] = "all"
    """Where the data root is seen; nodes: on compute nodes alone, so a submission cannot look into it."""
    run_root: str = "runs"
    """Folder in which run directories are made; relative to where submit is called."""
    limits: list[Limit] = Field(default_factory=list)
    """What the site allows; a request that fits no row is refused before it is submitted."""

    @model_validator(mode="after")
    def _ranks_have_gpus(self) -> Site:
        if self.gpus_per_node and self.ranks_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ValueError(
                f"ranks_per_node {self.ranks_per_node} exceeds gpus_per_node {self.gpus_per_node}"
            )
        return self

    @property
    def walltime_min(self) -> int:
        """Returns the default wall time in minutes."""
        return walltime_minutes(self.walltime)
