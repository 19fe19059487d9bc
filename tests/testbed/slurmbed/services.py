"""The daemons: how each is started and when it is ready, and the clients that ask them.

munged comes first, then the database, slurmdbd, slurmctld and the nodes; each needs the ones before it.
"""

from __future__ import annotations

import functools
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from .config import Site
from .errors import TestbedError
from .layout import ACCOUNTING_PORT, NODE_PORT_BASE, PROGRAM_PATH, Layout
from .processes import Daemon, wait_for

SERVICES = ("munged", "mariadbd", "slurmdbd", "slurmctld")  # in starting order
SYSTEM_TABLES = Path("/usr/share/mysql/mysql_system_tables.sql")
DATABASE_OPTIONS = (
    "--no-defaults",
    "--user=root",
    "--innodb-buffer-pool-size=32M",
    "--innodb-log-file-size=16M",
)
# A node sees our configuration as /etc/slurm, whatever the machine has there: clients inside jobs find the
# cluster even where the environment was cleaned and SLURM_CONF is lost.
NODE_SETUP = (
    'hostname "$1" && mount --bind "$2" /etc/hosts && mount --bind "$3" /etc/slurm && shift 3 && exec "$@"'
)


def daemon(layout: Layout, name: str) -> Daemon:
    """Returns the handle of one daemon: a service, or ``slurmd.NODE``."""
    return Daemon(name, layout.run, layout.log)


def _environment(layout: Layout) -> dict[str, str]:
    # Nothing of the caller's environment: it may be a Slurm job or a test session itself.
    return {
        "PATH": PROGRAM_PATH,
        "LC_ALL": "C",
        "SLURM_CONF": str(layout.slurm_conf),
        "MYSQL_UNIX_PORT": str(layout.database_socket),
    }


def start_services(site: Site) -> None:
    """Starts all daemons of the login node; raises TestbedError if one does not get ready."""
    layout, env = site.layout, _environment(site.layout)

    def start(name: str, argv: list[str], ready: Callable[[], bool]) -> None:
        daemon(layout, name).start(argv, env, ready)

    key, seed = layout.root / "etc" / "munge.key", layout.run / "munge.seed"
    munge = [f"--socket={layout.munge_socket}", f"--key-file={key}", f"--seed-file={seed}"]
    munge += [f"--pid-file={layout.root}/spool/munged.pid", f"--log-file={layout.log}/munged.log"]
    start("munged", ["munged", "--foreground", *munge], layout.munge_socket.is_socket)
    database = [*DATABASE_OPTIONS, f"--datadir={layout.database}"]
    _create_database(layout, ["mariadbd", *database])
    # No accounts are checked: there is no port, and only root reaches the socket.
    database += ["--skip-networking", "--skip-grant-tables", "--innodb-flush-log-at-trx-commit=0"]
    database += [f"--socket={layout.database_socket}", f"--pid-file={layout.database}/mariadbd.pid"]
    start("mariadbd", ["mariadbd", *database], layout.database_socket.is_socket)
    # slurmctld gives up for good where its first start finds no slurmdbd.
    start("slurmdbd", ["slurmdbd", "-D"], lambda: _accepts(site.login_address, ACCOUNTING_PORT))
    start("slurmctld", ["slurmctld", "-D"], lambda: controller_answers(layout))


def _create_database(layout: Layout, server: list[str]) -> None:
    # Bootstrap mode takes one statement per line end.
    sql = "CREATE DATABASE mysql;\nCREATE DATABASE slurm_acct_db;\nUSE mysql;\n" + SYSTEM_TABLES.read_text()
    # It has no pid file; so that it cannot outlive a killed "up", it ends with us.
    bootstrap = ["setpriv", "--pdeathsig", "KILL", *server, "--bootstrap"]
    output = layout.log / "bootstrap.out"
    with output.open("wb") as sink:
        done = subprocess.run(
            bootstrap, input=sql.encode(), stdout=sink, stderr=sink, env=_environment(layout), check=False
        )
    if done.returncode != 0:
        raise TestbedError(f"mariadbd cannot make a database; see {output}")


def start_nodes(site: Site) -> None:
    """Starts one slurmd per node; raises TestbedError if not all nodes become idle."""
    for index in range(1, site.shape.nodes + 1):
        start_node(site, index)
    if not wait_for(lambda: _idle_nodes(site.layout) == site.shape.nodes, timeout_s=30):
        names = ", ".join(site.shape.node_names)
        raise TestbedError(f"not all of {names} became idle; see {site.layout.log}")


def start_node(site: Site, index: int) -> None:
    """Starts the slurmd of node ``index`` (from 1), at first or after a crash."""
    layout, name = site.layout, site.shape.node_names[index - 1]
    address, port = site.node_address(index), NODE_PORT_BASE + index
    argv = ["slurmd", "-D", "-N", name]
    if site.network == "netns":
        # Not "ip netns exec": it mounts a new /sys, without the cgroups that slurmd looks for.
        enter = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount"]
        argv = [*enter, "sh", "-c", NODE_SETUP, "sh", name, str(layout.hosts), str(layout.etc), *argv]
    ready = functools.partial(_accepts, address, port)
    daemon(layout, f"slurmd.{name}").start(argv, _environment(layout), ready)


def _accepts(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1):
            return True
    except OSError:
        return False


def client(layout: Layout, *argv: str, timeout_s: float = 10) -> str:
    """Runs one of Slurm's client programs; returns what it prints, or nothing if it fails."""
    try:
        done = subprocess.run(
            argv, env=_environment(layout), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def controller_answers(layout: Layout) -> bool:
    """Returns whether slurmctld runs and says that it is up."""
    # Without a process nobody answers, and without the bridge asking takes until a time-out.
    if daemon(layout, "slurmctld").pid() is None:
        return False
    return "is UP" in client(layout, "scontrol", "ping")


def _idle_nodes(layout: Layout) -> int:
    return len(client(layout, "sinfo", "-h", "-N", "-p", "debug", "-t", "idle", "-o", "%N").split())


def cancel_all_jobs(layout: Layout) -> None:
    """Cancels all jobs, and waits for their end as long as a stubborn job may take."""
    ids = client(layout, "squeue", "-h", "-o", "%A").split()
    if ids:
        client(layout, "scancel", *sorted(set(ids)))
        wait_for(lambda: not client(layout, "squeue", "-h").strip(), timeout_s=20)
