"""How workers learn that they should checkpoint and leave.

The agent touches a file, which rank 0 looks for; and some schedulers send SIGTERM to every process of a job,
so each worker takes note of that instead of dying of it. The loop adds the ranks' answers up in the message
that each step sends anyway: all ranks leave after the same step, and a step costs nothing more.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType

from hpcsngd import dist

POLL_S = 0.5
"""Rank 0 looks for the file at most this often: each look is a question to the file system."""


class StopRequest:
    """Whether this rank has been asked to stop; takes note of SIGTERM while it is entered.

    Args:
        file: exists when the run should checkpoint and leave.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._next_poll = 0.0
        self._is_signalled = False
        self._before: signal._HANDLER = None

    def __enter__(self) -> StopRequest:
        """Replaces the handler of SIGTERM; only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the former handler back."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def is_seen(self) -> bool:
        """Returns whether this rank knows of a request; the others may not yet."""
        if not self._is_signalled and dist.rank() == 0 and time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + POLL_S
            return self._file.exists()
        return self._is_signalled

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._is_signalled = True
