"""What an agent works on, what it knows of time and of the other agents, and how its workers ended."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Literal

from hpcsngd import lifeline, rundir
from hpcsngd.launch.place import Place
from hpcsngd.launch.plan import Plan
from hpcsngd.launch.walltime import WallTime
from hpcsngd.lifeline import Beat
from hpcsngd.rundir import Attempt, RunDir


class AgentFaultError(Exception):
    """Something that keeps an agent from starting its workers."""

    def __init__(self, kind: str, message: str, evidence: list[str] | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.evidence = evidence or []


class Context:
    """What an agent works on, and what it tells the other agents.

    Args:
        run: the run.
        plan: what was decided at submission.
        place: where the agent stands.
        attempt: the attempt.
        left_s: seconds until the time limit; default: the plan's wall time.
    """

    def __init__(
        self, run: RunDir, plan: Plan, place: Place, attempt: Attempt, left_s: float | None = None
    ) -> None:
        self.run, self.plan, self.place, self.attempt = run, plan, place, attempt
        self.began = time.monotonic()
        total_s = plan.walltime_min * 60.0
        ends_at = self.began + (total_s if left_s is None else left_s)
        self.walltime = WallTime(ends_at, total_s, plan.stop_margin_s)
        self.first_checkpoint = run.newest_checkpoint()
        self._signs = 0

    @property
    def ranks(self) -> range:
        """Returns the ranks that this agent starts."""
        if self.plan.mode == "per_rank":
            return range(self.place.index, self.place.index + 1)
        first = self.place.node * self.plan.ranks_per_node
        return range(first, first + self.plan.ranks_per_node)

    @property
    def rank_0(self) -> Beat | None:
        """Returns the newest heartbeat of rank 0: it writes the checkpoints."""
        return lifeline.read_beat(self.attempt.heartbeats, "rank0")

    @property
    def is_near_limit(self) -> bool:
        """Returns whether the wall time is nearly used up."""
        return self.walltime.is_near(time.monotonic(), self.rank_0)

    def sign(self, phase: str) -> None:
        """Gives the other agents a sign of life."""
        self._signs += 1
        name, place = f"agent{self.place.index}", self.place
        beat = Beat(name, place.host, os.getpid(), phase, beats=self._signs, utc=rundir.utc_now())
        lifeline.write_beat(self.attempt.heartbeats, beat)

    def agents(self) -> list[Beat | None]:
        """Returns the newest signs of all agents, in their order."""
        folder = self.attempt.heartbeats
        if folder.is_dir():
            list(folder.iterdir())  # NFS: a sign that is cached would pass for silence
        return [lifeline.read_beat(folder, f"agent{index}") for index in range(self.place.agents)]


@dataclass(frozen=True)
class Ended:
    """How the workers of one generation ended.

    Attributes:
        by: ``itself``; or ended by the agent because of a ``stop`` signal, a failed ``peer``, a ``hang``, or
            because the rendezvous ``moved``.
        exit_status: of the shell or torchrun; negative for a signal.
        lines: the last lines that were written.
    """

    by: Literal["itself", "stop", "peer", "moved", "hang"]
    exit_status: int
    lines: list[str] = field(repr=False)
