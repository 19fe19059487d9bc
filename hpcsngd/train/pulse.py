"""Heartbeats of one rank: the training code says where it stands, a thread tells the run directory.

The thread writes only when something has changed and at most every two seconds, so what it costs does not
depend on the length of a step, and a rank that is stuck falls silent. Imports no torch: the import itself is
one of the phases.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

from hpcsngd import rundir
from hpcsngd.lifeline import Beat, write_beat

WRITE_S = 2.0


class Pulse:
    """Where this rank stands; `at` costs less than a microsecond and may be called in every step.

    Args:
        rank: this rank.
    """

    def __init__(self, rank: int = 0) -> None:
        self._name = f"rank{rank}"
        self._phase, self._step, self._beats = "import", 0, 0
        self._checkpoint_s = self._boundary_s = 0.0
        self._boundary = 0.0

    def at(self, phase: str, step: int | None = None) -> None:
        """Says that this rank has come to a phase, one of `lifeline.PHASES`; also that it goes on within one.

        Args:
            phase: the phase.
            step: optimizer steps done; default: as before.
        """
        self._phase = phase
        if step is not None:
            self._step = step
        self._beats += 1

    def boundary(self) -> None:
        """Says that this rank looks for a stop request now; the longest gap tells how soon one is heeded."""
        now = time.monotonic()
        if self._boundary:
            self._boundary_s = max(self._boundary_s, now - self._boundary)
        self._boundary = now

    def saved(self, seconds: float) -> None:
        """Says how long a checkpoint has taken."""
        self._checkpoint_s = max(self._checkpoint_s, seconds)
        self._boundary += seconds  # the gap is without it

    def beat(self) -> Beat:
        """Returns the state now."""
        return Beat(
            self._name,
            socket.gethostname(),
            os.getpid(),
            self._phase,
            self._step,
            self._beats,
            round(self._checkpoint_s, 3),
            round(self._boundary_s, 3),
            rundir.utc_now(),
        )


class Heartbeat:
    """Writes a pulse to a folder while it is entered, first of all when it is entered.

    Args:
        pulse: what is told.
        folder: where the files are.
    """

    def __init__(self, pulse: Pulse, folder: Path) -> None:
        self._pulse, self._folder = pulse, folder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Writes the last state."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        written = -1
        while True:
            is_last = self._ended.wait(0.0 if written < 0 else WRITE_S)
            beat = self._pulse.beat()
            if beat.beats != written:
                # a full disk must not end the training: the checkpoint will say so
                with contextlib.suppress(OSError):
                    write_beat(self._folder, beat)
                written = beat.beats
            if is_last:
                return
