"""Who computes what next. The server's book of the steps of an epoch; it knows no weights.

An epoch has as many samples for every strategy: all of the training set, in the steps that `ddp` would make.
Asynchronous: a step is one worker's, and it is `batch_size` x `accumulate` samples. Synchronous: a step is
shared by all workers, and it has so many samples for each of them.

Steps are handed out in their order to whoever asks (`free`), up to the workers' shares of the run (`equal`),
or as a replayed run had them. A step whose worker is lost goes to another, so that no sample is left out.
Not safe for threads by itself: the engine calls it under its lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hpcsngd.train.sampler import even_parts, micro_batch_count

Mode = Literal["sync", "async"]


@dataclass(frozen=True)
class Work:
    """The samples of one push.

    Attributes:
        step: of the run's plan, from 0; a synchronous step is in the work of every worker.
        epoch: from 0.
        start: place of the first sample in the order of the epoch.
        count: samples, at least 1.
        micro_batches: how many they are computed in.
        turn: works that this worker had before in this run.
        before: samples in these.
    """

    step: int
    epoch: int
    start: int
    count: int
    micro_batches: int
    turn: int
    before: int


@dataclass
class _Had:
    turns: int = 0
    samples: int = 0


class Ledger:
    """Hands out the steps of a run.

    Args:
        sizes: samples of the steps of an epoch.
        mode: synchronous or asynchronous.
        workers: their numbers, rising.
        batch_size: samples per micro-batch.
        caps: worker -> how many steps of the run it may have; None: as many as it can.
        logged: worker -> the steps that it had in the run that is replayed, in order; None: no replay.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        mode: Mode,
        workers: Sequence[int],
        batch_size: int,
        *,
        caps: Mapping[int, int] | None = None,
        logged: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self._sizes, self._mode, self._batch_size = list(sizes), mode, batch_size
        self._workers = list(workers)
        self._caps = None if caps is None else dict(caps)
        self._logged = None if logged is None else {w: deque(logged.get(w, ())) for w in workers}
        self._had = {worker: _Had() for worker in workers}
        common: deque[int] = deque()
        self._queues = {worker: deque[int]() if mode == "sync" else common for worker in workers}
        self._outstanding: dict[int, int] = {}
        self._held: set[int] = set()
        self._newest = -1

    @property
    def is_idle(self) -> bool:
        """Returns whether everything that was opened has been done or is held back."""
        return not self._outstanding and not any(self._queues.values())

    @property
    def remaining(self) -> list[int]:
        """Returns the opened steps that nobody has begun, in order."""
        return sorted(self._held.union(*self._queues.values()))

    def open(self, steps: Sequence[int]) -> None:
        """Adds steps of the run's plan, in the order in which they are handed out."""
        self._held.clear()
        for queue in self._distinct_queues():
            queue.extend(steps)

    def hold(self) -> None:
        """Hands out no more; a synchronous step that somebody has begun is still finished by all."""
        begun = self._newest if self._mode == "sync" else -1
        for queue in self._distinct_queues():
            while queue and queue[-1] > begun:
                self._held.add(queue.pop())

    def has_work(self, worker: int) -> bool:
        """Returns whether there is a step for a worker now."""
        queue = self._queues[worker]
        if self._logged is not None:
            mine = self._logged[worker]
            return bool(mine) and mine[0] in queue
        if self._caps is not None and self._had[worker].turns >= self._caps[worker]:
            return False
        return bool(queue)

    def take(self, worker: int) -> Work:
        """Returns the next step of a worker; there must be one."""
        queue, had = self._queues[worker], self._had[worker]
        if self._logged is None:
            step = queue.popleft()
        else:
            step = self._logged[worker].popleft()
            queue.remove(step)
        self._newest = max(self._newest, step)
        self._outstanding[worker] = step
        work = self._work(worker, step, had)
        had.turns, had.samples = had.turns + 1, had.samples + work.count
        return work

    def done(self, worker: int) -> None:
        """Takes note that a worker's step is in the weights."""
        self._outstanding.pop(worker, None)

    def lose(self, worker: int) -> None:
        """Gives the step of a lost worker to others; shares no longer count."""
        self._caps = None
        step = self._outstanding.pop(worker, None)
        if step is not None and self._mode == "async":
            self._queues[worker].appendleft(step)

    def state_dict(self) -> dict[str, Any]:
        """Returns what each worker has had."""
        return {"had": {worker: asdict(had) for worker, had in self._had.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`'s result; workers that it does not know begin anew."""
        for worker, had in state["had"].items():
            if worker in self._had:
                self._had[worker] = _Had(**had)
        if self._logged is not None:
            for worker, steps in self._logged.items():
                for _ in range(self._had[worker].turns):
                    steps.popleft()

    def _distinct_queues(self) -> list[deque[int]]:
        return list({id(queue): queue for queue in self._queues.values()}.values())

    def _work(self, worker: int, step: int, had: _Had) -> Work:
        epoch, place = divmod(step, len(self._sizes))
        start, size = sum(self._sizes[:place]), self._sizes[place]
        ranks = len(self._workers) if self._mode == "sync" else 1
        shares, index = even_parts(size, ranks), self._workers.index(worker) if ranks > 1 else 0
        return Work(
            step,
            epoch,
            start + sum(shares[:index]),
            shares[index],
            micro_batch_count(size, self._batch_size, ranks),
            had.turns,
            had.samples,
        )


def caps(steps: int, parts: Mapping[int, int]) -> dict[int, int]:
    """Returns worker -> its share of the steps of a run, in proportion to the size of its part.

    Args:
        steps: of the run.
        parts: worker -> samples of its part.
    """
    total, found, before = sum(parts.values()), {}, 0
    for worker, size in parts.items():
        upto = before + size
        found[worker] = steps * upto // total - steps * before // total
        before = upto
    return found
