"""The programs that the testbed needs, installed through the machine's own apt configuration."""

from __future__ import annotations

import os
import shutil
import subprocess

from .errors import NoSlurmHereError
from .layout import PROGRAM_PATH

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "ip", "nsenter", "unshare")
# mariadb-server-core is all of MariaDB that slurmdbd needs: no service, no account, 8 MB.
PACKAGES = ("slurm-wlm", "slurmdbd", "munge", "mariadb-server-core", "iproute2", "util-linux")
APT_GET = ("apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300")


def missing_programs() -> list[str]:
    """Returns the needed programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PROGRAM_PATH) is None]


def require_root() -> None:
    """Raises NoSlurmHereError unless this is root: namespaces, /etc/hosts and apt all need it."""
    if os.geteuid() != 0:
        raise NoSlurmHereError("no Slurm here: it takes root to start one")


def ensure_installed() -> None:
    """Installs what is missing; with nothing missing, apt is not called.

    Raises:
        NoSlurmHereError: If there is no apt, or it cannot install the packages.
    """
    missing = missing_programs()
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise NoSlurmHereError(f"no Slurm here: {', '.join(missing)} missing, and no apt-get to install them")
    install = [*APT_GET, "install", "--no-install-recommends", *PACKAGES]
    if _apt(install).returncode != 0:  # often only because the package lists are missing or old
        _apt([*APT_GET, "update"])
        last = _apt(install)
        if last.returncode != 0:
            reason = (last.stderr.strip().splitlines() or [f"exit code {last.returncode}"])[-1]
            raise NoSlurmHereError(f"no Slurm here: apt-get cannot install {', '.join(PACKAGES)}: {reason}")


def _apt(argv: list[str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(
        argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
