"""Lets the kernel run programs of another architecture through qemu, also inside containers."""

from __future__ import annotations

import platform
from pathlib import Path

from . import debs
from .layout import NoApptainerHereError

BINFMT = Path("/proc/sys/fs/binfmt_misc")
# binfmt-support would register a dozen other things (Java archives, Python byte code) as well
RECIPES = Path("/usr/lib/binfmt.d")


def register(machine: str) -> bool:
    """Lets programs of another machine run here until the next boot; returns whether that was needed.

    Raises:
        NoApptainerHereError: no qemu for it, or a kernel that does not let us.
    """
    if machine == platform.machine() or (BINFMT / f"qemu-{machine}").exists():
        return False
    debs.install(["qemu-user-static"])
    if not (BINFMT / "register").exists():
        debs.must(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT], "the kernel has no binfmt_misc")
    if (BINFMT / f"qemu-{machine}").exists():  # the package's own scripts may have done it
        return True
    recipe = RECIPES / f"qemu-{machine}.conf"
    if not recipe.exists():
        raise NoApptainerHereError(f"qemu cannot run programs of {machine}: no {recipe}")
    (BINFMT / "register").write_bytes(recipe.read_bytes().strip())
    return True
