"""The commands that start tasks on the hosts of an LSF job, and what they tell the tasks. Pure.

LSF itself starts one process, on the first host. The rest is a launcher's: ``jsrun`` where CSM is (Summit),
``blaunch`` on IBM LSF, ``lsrun`` in the OpenLava family, nothing on a single host. Facts: the archived Summit
user guide (resource sets), IBM's reference of ``jsrun`` and ``blaunch``; ``lsrun`` as seen on an
LSF-compatible scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Visibility = Literal["all", "one"]
LAUNCHERS = ("jsrun", "blaunch", "lsrun", "none")
STARTER = ("-u", "-m", "hpcsngd.launch.lsf.node")
"""What launchers start on the compute hosts, after the interpreter."""


@dataclass(frozen=True)
class ResourceSets:
    """How jsrun cuts a host; a set never spans hosts, and a task sees the cores and GPUs of its set only.

    Attributes:
        per_host: sets on each host (``-r``).
        tasks: tasks in each set (``-a``).
        gpus: GPUs of each set (``-g``).
        cores: physical cores of each set (``-c``).
        bind: how tasks are bound to the cores of their set (``-b``): ``none``, ``rs`` or ``packed:N``.
    """

    per_host: int
    tasks: int
    gpus: int
    cores: int
    bind: str

    @classmethod
    def usual(
        cls, tasks_per_node: int, gpus_per_node: int, cores_per_node: int, visibility: Visibility
    ) -> ResourceSets:
        """Returns the sets for torch.

        A single task is an agent whose workers share the host: it must not be bound, or they would all sit
        on its cores. Several tasks share one set, so that they see all GPUs and can copy between them, or
        have a set each, in which the only GPU is device 0.

        Args:
            tasks_per_node: tasks on each host.
            gpus_per_node: GPUs of each host that are used.
            cores_per_node: physical cores of each host that are used.
            visibility: whether a task sees ``all`` of these GPUs or only its ``one``.
        """
        cores = max(1, cores_per_node // tasks_per_node)
        if tasks_per_node == 1:
            return cls(1, 1, gpus_per_node, cores_per_node, "none")
        if visibility == "one":
            return cls(tasks_per_node, 1, gpus_per_node // tasks_per_node, cores, f"packed:{cores}")
        return cls(1, tasks_per_node, gpus_per_node, cores_per_node, f"packed:{cores}")

    def misfit(self, *, cores: int, gpus: int) -> str | None:
        """Returns why the sets cannot be placed on a host, as words for people; None if they can.

        Args:
            cores: usable cores of a host.
            gpus: its GPUs.
        """
        if self.per_host * self.cores > cores:
            return f"{self.per_host} sets of {self.cores} cores do not fit the {cores} cores of a host"
        if self.per_host * self.gpus > gpus:
            return f"{self.per_host} sets of {self.gpus} GPUs do not fit the {gpus} GPUs of a host"
        kind, _, width = self.bind.partition(":")
        if kind not in ("none", "rs", "packed") or (kind == "packed") != width.isdigit():
            return f"unknown binding {self.bind}; allowed: none, rs, packed:N"
        if kind == "packed" and int(width) * self.tasks > self.cores:
            return f"{self.tasks} tasks of {width} cores do not fit the {self.cores} cores of their set"
        return None

    def words(self, hosts: int) -> list[str]:
        """Returns jsrun's options; all are stated, because the defaults are made by each site.

        Args:
            hosts: compute hosts of the job.
        """
        counts = {
            "-n": hosts * self.per_host,
            "-r": self.per_host,
            "-a": self.tasks,
            "-g": self.gpus,
            "-c": self.cores,
        }
        words = [word for option, count in counts.items() for word in (option, str(count))]
        # packed: consecutive ranks share a host, which is how torch numbers them
        return [*words, "-b", self.bind, "-d", "packed"]


def commands(
    launcher: str,
    hosts: Sequence[str],
    words: Sequence[str],
    *,
    sets: ResourceSets | None = None,
    args: Sequence[str] = (),
) -> list[list[str]]:
    """Returns the commands that start ``words`` on the hosts, all to run at the same time.

    jsrun is one command for all hosts and starts as many tasks as the sets hold. The others are one command
    per host, with the host's number as last word: they tell their tasks nothing that could serve as a rank
    (``lsrun`` calls every task 1, ``blaunch`` counts from 1).

    Args:
        launcher: ``jsrun``, ``blaunch``, ``lsrun`` or ``none``.
        hosts: compute hosts, in the job's order.
        words: plain words without blanks: a remote shell may split them again.
        sets: jsrun's resource sets; other launchers have none.
        args: more words for the launcher.

    Raises:
        ValueError: jsrun without sets, several hosts without a launcher, or a word that would be split.
    """
    if torn := [word for word in words if not word or any(char.isspace() for char in word)]:
        raise ValueError(f"{launcher} would split {torn[0]!r}: use words without blanks")
    if launcher == "jsrun":
        if sets is None:
            raise ValueError("jsrun needs resource sets")
        return [["jsrun", *sets.words(len(hosts)), *args, *words]]
    numbered = [(host, [*words, str(number)]) for number, host in enumerate(hosts)]
    if launcher == "blaunch":
        return [["blaunch", *args, host, *task] for host, task in numbered]
    if launcher == "lsrun":
        # getopt permutes: without -- it takes the task's options for its own
        return [["lsrun", *args, "-m", host, "--", *task] for host, task in numbered]
    if launcher == "none" and len(hosts) == 1:
        return [numbered[0][1]]
    raise ValueError(f"launcher {launcher} cannot start tasks on {len(hosts)} hosts; known: {LAUNCHERS}")


class Ranks(NamedTuple):
    """Which task a process is, by its launcher's word."""

    rank: int
    size: int
    local_rank: int
    local_size: int


_FAMILIES = ("JSM_NAMESPACE_", "OMPI_COMM_WORLD_")


def rank_from(environment: Mapping[str, str]) -> Ranks | None:
    """Returns which task this is; None if no launcher says.

    JSM's own variables come first: those of Spectrum MPI are missing with ``--smpiargs=off``.
    """
    for prefix in _FAMILIES:
        names = [f"{prefix}{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
        if all(name in environment for name in names):
            return Ranks(*(int(environment[name]) for name in names))
    return None
