"""What a run came from: code, version, command line, machine, time."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcsngd import __version__, rundir

MAX_DIFF_BYTES = 200_000
"""A larger diff is cut; somebody's data files are in it."""


def collect(argv: Sequence[str], folder: Path | None = None) -> dict[str, Any]:
    """Returns the provenance of a run as plain data.

    Args:
        argv: the command line.
        folder: a folder of the code's repository; default: where hpcsngd is imported from.
    """
    folder = folder or Path(__file__).resolve().parent
    return {
        "hpcsngd": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cwd": str(Path.cwd()),
        "argv": list(argv),
        "utc": rundir.utc_now(),
        "git": git_state(folder),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Returns commit, whether files differ from it, and the difference; None outside a repository.

    Untracked files are named, not stored.
    """
    sha = _git(folder, "rev-parse", "HEAD")
    if sha is None:
        return None
    status = _git(folder, "status", "--porcelain") or ""
    diff = _git(folder, "diff", "HEAD") or ""
    kept = diff.encode()[:MAX_DIFF_BYTES].decode(errors="ignore")
    return {
        "sha": sha.strip(),
        "dirty": bool(status.strip()),
        "untracked": [line[3:] for line in status.splitlines() if line.startswith("??")],
        "diff": kept,
        "diff_is_cut": len(kept) < len(diff),
    }


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=30,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
