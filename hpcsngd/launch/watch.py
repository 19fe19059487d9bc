"""The hang guard: ranks that make no progress are found, named, and asked for their stacks.

Each agent watches the ranks of its own node. Ranks wait for each other in every step, so a rank that hangs
anywhere stops progress everywhere, and no agent needs to read more than its own ranks' heartbeats until then.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from hpcsngd import lifeline
from hpcsngd.launch import processes
from hpcsngd.lifeline import Beat

log = logging.getLogger(__name__)

LOOK_S = 5.0
STACKS_S = 0.5
"""Time for one rank to write its stacks, so that those of several do not mix in one log."""
_NAMED = 8


class Watch:
    """Decides whether the ranks of a node have hung.

    Args:
        folder: of the heartbeats.
        ranks: whom to watch.
        start_timeout_s: seconds without progress that are allowed until the first step.
        hang_timeout_s: seconds without progress that are allowed later.
        now: reading of the monotonic clock at the start.
    """

    def __init__(
        self, folder: Path, ranks: Sequence[int], *, start_timeout_s: float, hang_timeout_s: float, now: float
    ) -> None:
        self._folder, self._names = folder, [f"rank{rank}" for rank in ranks]
        self._start_timeout_s, self._hang_timeout_s = start_timeout_s, hang_timeout_s
        self._every_s = min(LOOK_S, start_timeout_s / 4, hang_timeout_s / 4)
        self._since = self._next = now
        self._seen: list[Beat | None] = [None] * len(self._names)

    def silence(self, now: float) -> float | None:
        """Returns the seconds since the last progress if they are too many, else None; reads files seldom."""
        if now < self._next:
            return None
        self._next = now + self._every_s
        beats = [lifeline.read_beat(self._folder, name) for name in self._names]
        if beats != self._seen:
            self._seen, self._since = beats, now
        is_starting = any(beat is None or beat.step == 0 for beat in beats)
        allowed = self._start_timeout_s if is_starting else self._hang_timeout_s
        return now - self._since if now - self._since > allowed else None


def describe(beats: Sequence[Beat | None], silent_s: float) -> tuple[str, list[str]]:
    """Returns one line that names the ranks that are behind, and a line for each of them.

    Args:
        beats: of all ranks, in their order; None for one that has never reported.
        silent_s: seconds without progress.
    """
    known = [beat for beat in beats if beat is not None]
    silent = [f"rank {rank}: no heartbeat in this attempt" for rank, beat in enumerate(beats) if beat is None]
    if silent:
        behind = silent
    else:
        last = min(beat.position for beat in known)
        late = [beat.line() for beat in known if beat.position == last]
        behind = late if len(late) < len(known) else []
    headline = f"no progress for {silent_s:.0f} s"
    if not behind:
        return f"{headline}; all ranks stand at the same place: {known[0].line()}", [known[0].line()]
    more = f" and {len(behind) - _NAMED} more" if len(behind) > _NAMED else ""
    return f"{headline}; behind: {'; '.join(behind[:_NAMED])}{more}", behind[:_NAMED]


def dump_stacks(folder: Path, ranks: Sequence[int], logs: Sequence[Path]) -> None:
    """Has the ranks that this process started write the stacks of all their threads to their log.

    Args:
        folder: of the heartbeats.
        ranks: of this node.
        logs: the file of standard error of each of them.
    """
    ours = set(processes.descendants(os.getpid()))
    for rank, file in zip(ranks, logs, strict=True):
        beat = lifeline.read_beat(folder, f"rank{rank}")
        if beat is None or beat.pid not in ours:
            log.warning("rank %d has no process that could be asked for its stacks", rank)
            continue
        with file.open("a", encoding="utf-8") as stream:
            stream.write(f"hpcsngd: {beat.line()}, process {beat.pid}, has hung; its stacks:\n")
        os.kill(beat.pid, signal.SIGUSR1)
        time.sleep(STACKS_S)
