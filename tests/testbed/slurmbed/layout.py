"""Names, addresses, ports and paths of the testbed: each is spelled here and nowhere else.

All names start with ``hpcsngd-`` and the ports keep clear of Slurm's own (6817-6819), so that a site's Slurm
or somebody else's testbed on the same machine stays untouched. Interface names have at most 15 characters.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError

BRIDGE = "hpcsngd-br"
CONTROLLER_PORT = 26817
ACCOUNTING_PORT = 26819
NODE_PORT_BASE = 26820  # node k listens on NODE_PORT_BASE + k: in loopback mode they share one address
MACHINE_DIR = Path(
    "/run/hpcsngd-testbed"
)  # locks: the names above are per machine, whatever the state directory
LOGIN_CONF = Path("/etc/slurm/slurm.conf")
DEFAULT_DIR = "/tmp/hpcsngd-testbed"
DEFAULT_NET = "10.214.88"
MAX_NODES = 64
PROGRAM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


def node_name(index: int) -> str:
    """Returns the name of node ``index`` (from 1): Slurm node, host, namespace and interface alike."""
    return f"hpcsngd-{index}"


def login_name() -> str:
    """Returns this machine's short host name, which slurmctld insists on."""
    return platform.node().split(".")[0]


@dataclass(frozen=True)
class Shape:
    """What a cluster consists of; ``cpus`` and ``gpus`` are per node, and the GPUs are not real."""

    nodes: int = 3
    cpus: int = 4
    gpus: int = 4

    def __post_init__(self) -> None:
        for name, low, high in (("nodes", 1, MAX_NODES), ("cpus", 1, 1024), ("gpus", 0, 64)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"--{name} {value}: allowed are {low} to {high}")

    def __str__(self) -> str:
        return f"nodes={self.nodes} cpus={self.cpus} gpus={self.gpus}"

    @property
    def node_names(self) -> tuple[str, ...]:
        """The nodes' names in order."""
        return tuple(node_name(index) for index in range(1, self.nodes + 1))


@dataclass(frozen=True)
class Layout:
    """Where one testbed keeps its state, and which addresses it uses.

    Args:
        root: The state directory: configuration, logs, pid files, database.
        net: First three bytes of the nodes' addresses, such as ``10.214.88``.
    """

    root: Path
    net: str = DEFAULT_NET

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d{1,3}(\.\d{1,3}){2}", self.net):
            raise UsageError(f"HPCSNGD_TESTBED_NET={self.net}: three bytes are needed, such as {DEFAULT_NET}")
        if not self.root.is_absolute() or re.search(r"[^\w./+-]", str(self.root)):
            # slurm.conf has no quoting, and % and spaces mean something in it
            raise UsageError(
                f"HPCSNGD_TESTBED_DIR={self.root}: an absolute path of plain characters is needed"
            )

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Layout:
        """Reads ``HPCSNGD_TESTBED_DIR`` and ``HPCSNGD_TESTBED_NET``; both have defaults."""
        root = env.get("HPCSNGD_TESTBED_DIR") or DEFAULT_DIR
        return cls(Path(root), env.get("HPCSNGD_TESTBED_NET") or DEFAULT_NET)

    @property
    def etc(self) -> Path:
        """The directory that the nodes see as /etc/slurm."""
        return self.root / "etc" / "slurm"

    @property
    def slurm_conf(self) -> Path:
        """What ``SLURM_CONF`` has to name."""
        return self.etc / "slurm.conf"

    @property
    def hosts(self) -> Path:
        """The file that the nodes see as /etc/hosts."""
        return self.root / "etc" / "hosts"

    @property
    def munge_socket(self) -> Path:
        """The socket of our own munged; its key is not the machine's."""
        return self.run / "munge.socket"

    @property
    def database(self) -> Path:
        """MariaDB's data directory, readable by root only."""
        return self.root / "database"

    @property
    def database_socket(self) -> Path:
        """MariaDB's only way in."""
        return self.database / "mysql.socket"

    @property
    def run(self) -> Path:
        """Pid files and sockets."""
        return self.root / "run"

    @property
    def log(self) -> Path:
        """One log file per daemon."""
        return self.root / "log"

    @property
    def facts(self) -> Path:
        """Written when a cluster is up, removed when it goes down: its shape and kind of network."""
        return self.root / "cluster.json"

    @property
    def seal(self) -> Path:
        """Marks the state directory as ours: a directory without it is never emptied."""
        return self.root / ".hpcsngd-testbed"

    @property
    def by_tests(self) -> Path:
        """Exists while the cluster belongs to test sessions; the last of them takes it down."""
        return self.root / "started-by-tests"
