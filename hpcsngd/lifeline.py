"""What ties workers to their agent while they run: heartbeats, and the end that they share.

Every rank and every agent overwrites one small file of its own in the attempt's folder: where it stands, and
a count that rises with each piece of progress. Whoever watches compares counts on its own clock, so the
clocks of hosts need not agree. Nothing is flushed to disk: a heartbeat is worth nothing after a crash.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

PHASES = (
    "import",
    "rendezvous",
    "build",
    "between steps",
    "evaluate",
    "checkpoint",
    "data",
    "compute",
    "reduce",
    "update",
    "done",
)
"""Where a rank may stand, in the order of an attempt and of a step; ``reduce`` waits for the other ranks."""
STARTING = frozenset({"import", "rendezvous", "build"})
WATCHING, ENDED = "watching", "ended"
"""Phases of an agent: only one that watches owes signs of life."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Beat:
    """One process at one moment.

    Attributes:
        name: ``rank<r>`` or ``agent<k>``.
        host: its host name.
        pid: its process id.
        phase: one of `PHASES`, or an agent's.
        step: optimizer steps done.
        beats: rises with every piece of progress.
        checkpoint_s: longest time that a checkpoint has taken so far, in seconds.
        boundary_s: longest time between two looks for a stop request so far, without checkpoints, in seconds.
        utc: when it was written, ISO 8601; for people.
    """

    name: str
    host: str
    pid: int
    phase: str
    step: int = 0
    beats: int = 0
    checkpoint_s: float = 0.0
    boundary_s: float = 0.0
    utc: str = ""

    @property
    def position(self) -> tuple[int, int]:
        """Returns how far a rank is: steps done, then the place of its phase within a step."""
        return self.step, PHASES.index(self.phase) if self.phase in PHASES else 0

    def line(self) -> str:
        """Returns where the process stands, for people."""
        return f"{self.name.replace('rank', 'rank ')} on {self.host}: after step {self.step}, {self.phase}"


def write_beat(folder: Path, beat: Beat) -> None:
    """Overwrites a process's heartbeat; readers see the old one or the new one.

    Raises:
        OSError: the file system refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{beat.name}.{beat.pid}.tmp"
    temporary.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
    temporary.replace(folder / f"{beat.name}.json")


def read_beat(folder: Path, name: str) -> Beat | None:
    """Returns a process's newest heartbeat; None while there is none, or none that can be read."""
    try:
        return Beat(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def bind_to_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Has the kernel send this process a signal as soon as its parent ends; nothing where there is no prctl.

    The binding survives ``exec`` and is not inherited by children, so each process binds itself.
    """
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os.kill(os.getpid(), number)  # the parent ended while we were about it
