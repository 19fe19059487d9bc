"""Starting daemons, knowing them again later, and stopping them.

Every daemon runs in the foreground of a session of its own, and its pid file is ours: process id and start
time. With the start time a reused id is never mistaken for our daemon, so what we did not start we never end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import TestbedError

POLL_S = 0.05


def wait_for(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Polls ``condition``; returns whether it became true within ``timeout_s`` seconds."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


def start_time(pid: int) -> int | None:
    """Returns when process ``pid`` started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the program's name, in parentheses, may hold spaces
    # Zombies count as gone: the first process of some containers is slow to reap them.
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass(frozen=True)
class Daemon:
    """One background process, known by its pid file ``run/NAME.pid``."""

    name: str
    run_dir: Path
    log_dir: Path

    @property
    def pid_file(self) -> Path:
        """Holds process id and start time."""
        return self.run_dir / f"{self.name}.pid"

    def pid(self) -> int | None:
        """Returns the daemon's process id, or None if it does not run."""
        try:
            pid, started = (int(word) for word in self.pid_file.read_text().split())
        except (FileNotFoundError, ValueError):
            return None
        return pid if start_time(pid) == started else None

    def start(
        self, argv: Sequence[str], env: Mapping[str, str], ready: Callable[[], bool], *, timeout_s: float = 30
    ) -> None:
        """Starts ``argv`` and waits until it is ready.

        Raises:
            TestbedError: If it ends or is not ready in time; the end of its output is in the message.
        """
        output = self.log_dir / f"{self.name}.out"
        with output.open("ab") as sink:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=env, start_new_session=True
            )
        self.pid_file.write_text(f"{process.pid} {start_time(process.pid) or 0}\n")
        in_time = wait_for(lambda: process.poll() is not None or ready(), timeout_s)
        ended = process.returncode
        process.returncode = ended or 0  # it outlives us on purpose: Popen must not warn that it still runs
        if ended is not None:
            raise TestbedError(f"{self.name} ended with {ended}; see {self._tail(output)}")
        if not in_time:
            raise TestbedError(f"{self.name} is not ready after {timeout_s:.0f} s; see {self._tail(output)}")

    def stop(self, timeout_s: float = 20) -> bool:
        """Ends the daemon, by force after ``timeout_s`` seconds; returns whether it was running."""
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            if not wait_for(lambda: self.pid() is None, timeout_s):
                os.kill(pid, signal.SIGKILL)
                wait_for(lambda: self.pid() is None, timeout_s)
        self.pid_file.unlink(missing_ok=True)
        return pid is not None

    def _tail(self, output: Path) -> str:
        lines = output.read_text(errors="replace").splitlines()[-5:]
        return "\n  ".join([f"{self.log_dir}:", *lines])
