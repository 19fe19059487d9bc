"""The ranks of an agent when there is a parameter server: processes that begin and end one by one.

torchrun and srun end all ranks when one of them ends badly. Asynchronous training goes on without a worker,
so here the agent starts each rank itself and only reports one that is gone without a word: the server reads
that and decides. Rank 0 is the server, and its end is the end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from hpcsngd.handover import EXIT_STOPPED
from hpcsngd.launch import verdict
from hpcsngd.launch.processes import Child
from hpcsngd.rundir import Attempt

log = logging.getLogger(__name__)


class Crew:
    """Several ranks in the place of one `processes.Child`.

    Args:
        children: rank -> its process.
        attempt: where lost ranks are reported.
        host: this node's name.
    """

    def __init__(self, children: Mapping[int, Child], attempt: Attempt, host: str) -> None:
        self._children, self._attempt, self._host = dict(children), attempt, host
        self._ended: dict[int, int] = {}
        self._lost: set[int] = set()

    def poll(self) -> int | None:
        """Returns the exit status of all ranks; None while the run goes on.

        It is that of the server if it has failed; otherwise, once all have ended, that of the first rank that
        ended badly and left a fault, or 0: a rank that is lost counts as ended well.
        """
        for rank, child in self._children.items():
            status = child.poll()
            if status is not None and rank not in self._ended:
                self._ended[rank] = status
                self._note(rank, status)
        if self._ended.get(0, 0) not in (0, EXIT_STOPPED):
            return self._ended[0]
        if len(self._ended) < len(self._children):
            return None
        return next((status for rank, status in self._ended.items() if status and rank not in self._lost), 0)

    def tail(self) -> list[str]:
        """Returns the last lines of the ranks that ended badly, or of all if none did."""
        bad = [rank for rank, status in self._ended.items() if status and rank not in self._lost]
        return [line for rank in bad or self._children for line in self._children[rank].tail()]

    def end(self, grace_s: float) -> None:
        """Ends all ranks: asks them, waits up to ``grace_s``, then kills them with all that they started."""
        running = [child for child in self._children.values() if child.poll() is None]
        for child in running:
            child.terminate()
        deadline = time.monotonic() + grace_s
        for child in running:
            child.end(max(0.0, deadline - time.monotonic()))

    def _note(self, rank: int, status: int) -> None:
        """Reports a worker that has ended badly without saying why."""
        has_told = any(fault.rank == rank for fault in self._attempt.faults())
        if rank == 0 or status in (0, EXIT_STOPPED) or has_told:
            return
        ended = (
            f"was ended by {verdict.signal_name(-status)}" if status < 0 else f"ended with status {status}"
        )
        log.warning("rank %d %s", rank, ended)
        self._lost.add(rank)
        self._attempt.write_lost(rank, f"on {self._host} {ended}")
