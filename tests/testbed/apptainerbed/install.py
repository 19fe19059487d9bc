"""Installs Apptainer, checks that it starts containers, and does nothing if it does."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from . import debs, relocate
from .layout import SUITE, Layout, NoApptainerHereError

HELPERS = (
    "ca-certificates",
    "patchelf",
    "debootstrap",
    "squashfs-tools",
    "squashfuse",
    "fuse-overlayfs",
    "fuse3",
    "uidmap",
    "fakeroot",
    "busybox-static",
)
"""Of the machine's own release: Apptainer's helpers, and what the smallest images are made of."""

NEWER = ("apptainer", "libc6", "libseccomp2", "libsqlite3-0")
FUSE = Path("/dev/fuse")


def install(layout: Layout) -> bool:
    """Installs Apptainer unless it works already; returns whether it had to.

    Raises:
        NoApptainerHereError: not root, no packages, or this machine starts no containers.
    """
    if os.geteuid() != 0:
        raise NoApptainerHereError("no Apptainer here: it takes root to install one")
    debs.install(HELPERS)
    if FUSE.exists():
        FUSE.chmod(0o666)  # as udev has it: users other than root mount images through it
    if layout.mark.exists() and not problem(layout):
        return False
    if layout.prefix.exists() and any(layout.prefix.iterdir()) and not layout.mark.exists():
        raise NoApptainerHereError(f"no Apptainer here: {layout.prefix} holds something else")
    with tempfile.TemporaryDirectory() as scratch:
        _unpack_and_assemble(Path(scratch), layout)
    if words := problem(layout):
        raise NoApptainerHereError(f"no Apptainer here: installed, but it starts no container: {words}")
    return True


def problem(layout: Layout) -> str:
    """Returns why no container can be started; empty if it can. The container is made of busybox alone."""
    with tempfile.TemporaryDirectory() as scratch:
        box = Path(scratch)
        for folder in ("bin", "dev", "proc", "sys", "tmp", "etc", "root"):
            (box / folder).mkdir()
        (box / "bin" / "sh").write_bytes(Path("/bin/busybox").read_bytes())
        (box / "bin" / "sh").chmod(0o755)
        if not layout.program.exists():
            return f"{layout.program} does not exist"
        done = debs.run([layout.program, "-s", "exec", "--containall", box, "/bin/sh", "-c", "echo it works"])
    return "" if done.stdout == "it works\n" else done.stderr.strip() or f"exit code {done.returncode}"


def _unpack_and_assemble(scratch: Path, layout: Layout) -> None:
    for deb in debs.fetch(SUITE, NEWER, scratch / "apt"):
        debs.unpack(deb, scratch / ("program" if deb.name.startswith("apptainer_") else "newer"))
    relocate.assemble(scratch / "program", scratch / "newer", layout)
