"""Who works on the testbed: a lock for each up or down, and a shared one for sessions that use the cluster.

Both are kept by the kernel (flock), so a killed process never leaves one behind.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import TestbedError
from .layout import MACHINE_DIR
from .processes import wait_for

LOCK_WAIT_S = 600.0  # another invocation may be installing packages


def _try_lock(descriptor: int, kind: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return True
    return False


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)  # and with it the lock


@contextmanager
def exclusive(machine_dir: Path = MACHINE_DIR, timeout_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Lets one invocation at a time change the machine.

    Raises:
        TestbedError: If another one is still busy after ``timeout_s`` seconds.
    """
    machine_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    path = machine_dir / "lock"
    with _opened(path) as lock:
        if not _try_lock(lock, fcntl.LOCK_EX):
            print("hpcsngd testbed: waiting for another invocation", file=sys.stderr)
            if not wait_for(lambda: _try_lock(lock, fcntl.LOCK_EX), timeout_s):
                raise TestbedError(f"another invocation holds {path} for {timeout_s:.0f} s")
        yield


class Usage:
    """A session's claim on a running cluster, held until the session ends."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def is_last(self) -> bool:
        """Returns True if no other session uses the cluster; new ones then wait until this claim ends."""
        return self._descriptor is not None and _try_lock(self._descriptor, fcntl.LOCK_EX)


@contextmanager
def usage(machine_dir: Path = MACHINE_DIR) -> Iterator[Usage]:
    """Claims the cluster for a session, together with others; waits while the last one takes it down.

    Who is not root cannot take a cluster down; the claim is then an empty one that is never the last.
    """
    if os.geteuid() != 0:
        yield Usage(None)
        return
    machine_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _opened(machine_dir / "users") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield Usage(lock)


def in_use(machine_dir: Path = MACHINE_DIR) -> bool:
    """Returns whether any session claims the cluster."""
    with _opened(machine_dir / "users") as lock:
        return not _try_lock(lock, fcntl.LOCK_EX)


def owner(machine_dir: Path = MACHINE_DIR) -> Path | None:
    """Returns the state directory of this machine's cluster, up or killed; None once it was stopped."""
    with suppress(FileNotFoundError):
        return Path((machine_dir / "owner").read_text().strip())
    return None


def set_owner(root: Path | None, machine_dir: Path = MACHINE_DIR) -> None:
    """Records whose cluster this machine has; None for nobody's."""
    if root is None:
        (machine_dir / "owner").unlink(missing_ok=True)
    else:
        (machine_dir / "owner").write_text(f"{root}\n")
