"""Signals and the clock that ask an agent to stop, and how long its workers then have.

submitit sends SIGUSR2 some time before the wall-time limit and on preemption, schedulers send SIGTERM before
they kill, submitit's local controller sends SIGINT right before it kills. Handlers only take note: files are
touched by the agent's loop.
"""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

# Slurm kills KillWait seconds after SIGTERM (30 by default); submitit's warning comes 90 s before the limit
GRACE_S = {signal.SIGUSR2: 75.0, signal.SIGTERM: 20.0, signal.SIGINT: 0.0}


class Stop:
    """Takes note of stop signals while it is entered; must be entered in the main thread."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self.is_at_limit = False
        self._deadline: float | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Stop:
        """Replaces the handlers, submitit's among them."""
        self._before = {number: signal.signal(number, self._note) for number in GRACE_S}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Puts the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def is_requested(self) -> bool:
        """Returns whether any stop signal has come, or the wall time is nearly over."""
        return bool(self.received) or self.is_at_limit

    @property
    def is_terminated(self) -> bool:
        """Returns whether the scheduler has begun to end the job: it kills seconds later."""
        return signal.SIGTERM in self.received

    @property
    def is_hard(self) -> bool:
        """Returns whether there is no time left for an orderly end."""
        return signal.SIGINT in self.received

    def is_due(self, now: float) -> bool:
        """Returns whether the workers' grace is over at this reading of the monotonic clock."""
        return self._deadline is not None and now >= self._deadline

    def words(self) -> str:
        """Returns the signals received, for people."""
        return ", ".join(dict.fromkeys(number.name for number in self.received))

    def warn(self, deadline: float) -> None:
        """Takes note that the wall time is nearly over; until then a mere warning may use what is left.

        Args:
            deadline: reading of the monotonic clock at which the workers must be gone.
        """
        self.is_at_limit = True
        if not {signal.SIGTERM, signal.SIGINT} & set(self.received):
            self._deadline = deadline

    def _note(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        self.received.append(received)
        due = time.monotonic() + GRACE_S[received]
        self._deadline = due if self._deadline is None else min(due, self._deadline)
