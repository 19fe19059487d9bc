"""A real sshd on two loopback addresses, with keys of its own: two hosts that share files and processes."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HOSTS = ("127.0.0.1", "127.0.0.2")
START_S = 30.0


@dataclass(frozen=True)
class Bed:
    """Two hosts that answer, and what a site must say to reach them."""

    port: int
    folder: Path

    def scheduler(self, **more: Any) -> dict[str, Any]:
        """Returns a site's ``scheduler`` section."""
        options = {
            "IdentityFile": str(self.folder / "user"),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(self.folder / "known_hosts"),
            "StrictHostKeyChecking": "yes",
        }
        return {
            "kind": "ssh",
            "hosts": list(HOSTS),
            "user": getpass.getuser(),
            "port": self.port,
            "options": options,
            "poll_s": 0.5,
            **more,
        }


@contextmanager
def running(folder: Path) -> Iterator[Bed]:
    """Yields two hosts; their server is ended by its process id."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if sshd is None or shutil.which("ssh") is None:
        words = "no sshd and ssh on this machine: `make system` installs them where it may"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(words)
    bed = _configure(folder)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # privilege separation; the system's own start makes it
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen([str(sshd), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        _wait(bed, server)
        yield bed
    finally:
        server.terminate()
        server.wait()


def _configure(folder: Path) -> Bed:
    folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(words, check=True)
    with socket.create_server((HOSTS[0], 0)) as probe:
        port = probe.getsockname()[1]
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    key = (folder / "host.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"[{host}]:{port} {key}" for host in HOSTS))
    lines = [
        f"Port {port}",
        *(f"ListenAddress {host}" for host in HOSTS),
        f"HostKey {folder / 'host'}",
        f"AuthorizedKeysFile {folder / 'authorized'}",
        "PidFile none",
        "StrictModes no",
        "UsePAM no",
        "PasswordAuthentication no",
        "PermitRootLogin yes",
        "MaxStartups 50",
    ]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    return Bed(port, folder)


def _wait(bed: Bed, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    for host in HOSTS:
        while True:
            try:
                socket.create_connection((host, bed.port), timeout=1).close()
                break
            except OSError:
                log = (bed.folder / "sshd.log").read_text()
                assert server.poll() is None, log
                assert time.monotonic() < deadline, log
                time.sleep(0.05)
