"""Child processes: started in a session of their own, ended with everything that they started.

torchrun gives each worker a session of its own, so a signal to torchrun's process group does not reach them.
The agent therefore adopts orphans (Linux' child subreaper) and ends its descendants as the kernel lists them:
by process id, never by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcsngd import lifeline

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_TAIL_BYTES = 65536


def adopt_orphans() -> bool:
    """Makes this process the parent of descendants whose own parent ends; returns whether that worked."""
    try:
        return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


class Child:
    """A process whose output is appended to two files.

    Args:
        words: the command.
        environment: all its variables.
        out: file for standard output.
        err: file for standard error.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], out: Path, err: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self._files = {file: _size(file) for file in (out, err)}
        with out.open("ab") as out_file, err.open("ab") as err_file:
            self._process = subprocess.Popen(
                list(words),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                start_new_session=True,
                # an agent that is killed cannot end its workers; agents have no threads
                preexec_fn=lifeline.bind_to_parent,  # noqa: PLW1509
            )

    def poll(self) -> int | None:
        """Returns the exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def tail(self) -> list[str]:
        """Returns the last lines that this child wrote: standard output, then standard error."""
        lines = []
        for file, start in self._files.items():
            with file.open("rb") as stream:
                stream.seek(max(start, _size(file) - _TAIL_BYTES))
                lines += stream.read().decode("utf-8", errors="replace").splitlines()
        return lines

    def terminate(self) -> None:
        """Asks the child's process group to end; torchrun hands the request on to its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def end(self, grace_s: float) -> None:
        """Ends the child: asks, waits up to ``grace_s``, then kills it with all that it started."""
        if self.poll() is not None:
            return
        self.terminate()
        try:
            self._process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            kill([self._process.pid, *descendants(self._process.pid)])
            self._process.wait()


def kill(pids: Sequence[int]) -> None:
    """Kills processes at once; those that are gone already are no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_descendants(*, timeout_s: float = 10.0) -> None:
    """Kills all that this process started or adopted and waits until it is gone."""
    deadline = time.monotonic() + timeout_s
    while (alive := descendants(os.getpid())) and time.monotonic() < deadline:
        kill(alive)
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    """Returns the running descendants of a process, nearest first; zombies are not running."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))) and fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def start_ticks(pid: int) -> int | None:
    """Returns when a process started, in clock ticks since boot; None if it is gone or a zombie.

    Process id and start together name one process for as long as the machine is up.
    """
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] != "Z" else None


def _stat(pid: int) -> list[str] | None:
    """Returns the fields of /proc/PID/stat after the name (which may hold spaces): state, parent, ..."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
