"""The nodes' network: one namespace per node on a bridge, and the nodes' names on the login node.

Where namespaces are not permitted (a container without CAP_NET_ADMIN), ``create`` says so, and the nodes
share the machine's loopback address and host name.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from .config import Site, node_entries
from .errors import TestbedError
from .layout import BRIDGE, PROGRAM_PATH, Layout, Shape
from .processes import wait_for

HOSTS = Path("/etc/hosts")
HOSTS_MARK = "# hpcsngd testbed"
OWN_NAME = re.compile(r"hpcsngd-\d+$")
# What ip says in a container without CAP_NET_ADMIN or CAP_SYS_ADMIN, and on a kernel without bridges.
NOT_PERMITTED = (
    "not permitted",
    "Permission denied",
    "not supported",
    "Unknown device type",
    "Read-only file system",
)


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": PROGRAM_PATH, "LC_ALL": "C"}
    return subprocess.run(("ip", *words), env=env, capture_output=True, text=True, check=False)


def check_free(layout: Layout) -> None:
    """Checks that no interface of this machine uses the testbed's addresses; call it after ``remove``.

    Raises:
        TestbedError: If one does.
    """
    for line in _ip("-4", "-o", "addr", "show").stdout.splitlines():
        if f" {layout.net}." in line:
            raise TestbedError(
                f"{layout.net}.0/24 is in use by {line.split()[1]}; choose another HPCSNGD_TESTBED_NET"
            )


def create(layout: Layout, shape: Shape) -> str:
    """Makes bridge and namespaces; call it after ``remove``.

    Returns:
        An empty string; or, where namespaces are not permitted, why.

    Raises:
        TestbedError: If it fails for another reason: that must not pass for a poorer machine.
    """
    for command in _setup_commands(layout, shape):
        done = _ip(*command.split())
        if done.returncode != 0:
            reason = f"ip {command}: {done.stderr.strip()}"
            if not any(words in done.stderr for words in NOT_PERMITTED):
                raise TestbedError(f"no network for the nodes: {reason}")
            return reason
    return ""


def _setup_commands(layout: Layout, shape: Shape) -> list[str]:
    commands = [f"link add {BRIDGE} type bridge", f"addr add {layout.net}.254/24 dev {BRIDGE}"]
    commands += [f"link set {BRIDGE} up"]
    for index, name in enumerate(shape.node_names, start=1):
        commands += [
            f"netns add {name}",
            f"link add {name} type veth peer name eth0 netns {name}",
            f"link set {name} master {BRIDGE} up",
            f"-n {name} addr add {layout.net}.{index}/24 dev eth0",
            f"-n {name} link set lo up",
            f"-n {name} link set eth0 up",
        ]
    return commands


def remove() -> bool:
    """Removes what ``create`` made and ends what is left inside; returns whether there was anything."""
    names = [line.split()[0] for line in _ip("netns", "list").stdout.splitlines() if line.strip()]
    own = [name for name in names if OWN_NAME.match(name)]
    for name in own:
        wait_for(functools.partial(_emptied, name), timeout_s=10)
        # The kernel takes a namespace apart some time later; until then its interface would keep its name.
        _ip("link", "del", name)
        _ip("netns", "del", name)
    bridge = _ip("link", "del", BRIDGE).returncode == 0
    return bool(own) or bridge


def _emptied(namespace: str) -> bool:
    pids = _ip("netns", "pids", namespace).stdout.split()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    return not pids


def publish_names(site: Site) -> None:
    """Lets the login node resolve the nodes' names."""
    text = HOSTS.read_text()
    lines = [f"{entry} {HOSTS_MARK}\n" for entry in node_entries(site)]
    HOSTS.write_text(text + ("" if text.endswith("\n") or not text else "\n") + "".join(lines))


def withdraw_names() -> None:
    """Takes our lines out of /etc/hosts, in place: in a container the file is often a mount of its own."""
    lines = HOSTS.read_text().splitlines(keepends=True)
    kept = [line for line in lines if HOSTS_MARK not in line]
    if kept != lines:
        HOSTS.write_text("".join(kept))
