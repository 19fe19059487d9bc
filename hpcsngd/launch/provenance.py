"""What a run came from: code, versions, command line, image, machine, time.

Values are taken from lists of what may be recorded; what looks like a secret is blanked, diffs included.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hpcsngd import __version__, rundir
from hpcsngd.launch import secrets

MAX_DIFF_BYTES = 200_000
"""A larger diff is cut; somebody's data files are in it."""

PACKAGES = ("submitit", "click", "pydantic", "PyYAML", "torch", "torchvision", "numpy", "scikit-learn")
"""Distributions whose versions are recorded, where they are installed."""

_VARIABLES = frozenset({"CONDA_DEFAULT_ENV", "LOADEDMODULES", "VIRTUAL_ENV", "LANG"})
_VARIABLE_PREFIXES = (
    "CUDA_",
    "FI_",
    "GLOO_",
    "HIP_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "PYTORCH_",
    "RCCL_",
    "ROCR_",
    "TORCH_",
    "UCX_",
)


def collect(argv: Sequence[str], folder: Path | None = None, *, image: str | None = None) -> dict[str, Any]:
    """Returns the provenance of a run as plain data.

    Args:
        argv: the command line.
        folder: a folder of the code's repository; default: where hpcsngd is imported from.
        image: path of the image; its SHA-256 is taken, at about half a gigabyte per second.
    """
    folder = folder or Path(__file__).resolve().parent
    return {
        "hpcsngd": __version__,
        "python": platform.python_version(),
        "versions": versions(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cwd": str(Path.cwd()),
        "argv": [secrets.redact(word) for word in argv],
        "environment": variables(os.environ),
        "image": image_facts(Path(image)) if image else None,
        "utc": rundir.utc_now(),
        "git": git_state(folder),
    }


def versions() -> dict[str, str]:
    """Returns the versions of the `PACKAGES` that are installed beside us."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that change how training runs; all others stay unrecorded."""
    return {
        name: secrets.redact(value)
        for name, value in sorted(environment.items())
        if (name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES)) and not secrets.is_secret(name, value)
    }


@functools.lru_cache
def image_facts(image: Path) -> dict[str, Any] | None:
    """Returns path, size and SHA-256 of an image; None if it cannot be read."""
    try:
        with image.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
            size = file.tell()
    except OSError:
        return None
    return {"path": str(image), "size_bytes": size, "sha256": digest.hexdigest()}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Returns commit, whether files differ from it, and the difference; None outside a repository.

    Untracked files are named, not stored.
    """
    sha = _git(folder, "rev-parse", "HEAD")
    if sha is None:
        return None
    status = _git(folder, "status", "--porcelain") or ""
    diff = secrets.redact(_git(folder, "diff", "HEAD") or "")
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
