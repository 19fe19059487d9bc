"""The server's state: weights, versions and what pushes do to them. It knows no network and no files.

Every method may be called from any thread; one lock makes them one after the other.

Versions. The weights have version 0 and one more after every update. A pull returns a snapshot, which is
never changed again, so it cannot be torn. The staleness of a push is the number of updates between the pull
that its gradient was computed at and its own update.

Asynchronous: every push is an update. Synchronous: a round has one push of every worker that still takes
part; the last of them makes one update of the mean over all samples of the round. Gradients are added in the
order of the workers, whoever comes first.

Pushes are numbered by their worker and take effect once: one that is repeated, because its acknowledgement
was lost, is acknowledged again.

Buffers (batch norm's running statistics): a worker computes with the server's and pushes what it made of
them. Those of floating point become the mean of what every worker pushed last; all others become the largest.

Work. With a ledger the engine hands out the samples too: `begin` is a pull that waits until there is work.

Replay. `events` lists pulls and pushes in their order. An engine that is given such a list lets them happen
in this order only, so that a run with the same gradients ends with the same weights, bit for bit.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpcsngd.train.faults import NotFiniteError, TrainError
from hpcsngd.train.parameter_server.compensation import Compensation, Rule
from hpcsngd.train.parameter_server.work import Ledger, Mode, Work

Verb = Literal["pull", "push"]
#: A verb and the worker that did it.
Event = tuple[Verb, int]


class LostWorkerError(TrainError):
    """A worker is gone and its mode cannot do without it."""

    kind = "killed"


@dataclass(frozen=True)
class Snapshot:
    """Weights at one moment, on the CPU, as they travel; nobody changes them.

    Attributes:
        version: updates before it.
        parameters: in the model's order.
        buffers: in the model's order.
    """

    version: int
    parameters: tuple[Tensor, ...]
    buffers: tuple[Tensor, ...]


@dataclass(frozen=True)
class Push:
    """What a worker sends.

    Attributes:
        number: counts the worker's pushes, from 0.
        version: of the snapshot that the gradients were computed at.
        gradients: of the mean of the samples' losses, in the model's order.
        buffers: after the forward pass, in the model's order.
        loss_sum: of the samples.
        correct: predictions that were right.
        samples: at least 1.
        work: step of the run's plan that they belong to, from 0; for the record.
        delay_s: how long the worker waited on purpose before it pushed; for the record.
    """

    number: int
    version: int
    gradients: Sequence[Tensor]
    buffers: Sequence[Tensor]
    loss_sum: float
    correct: float
    samples: int
    work: int = 0
    delay_s: float = 0.0


@dataclass(frozen=True)
class Part:
    """One push in an update, for the record.

    Attributes:
        worker: whose it was.
        pulled: version that it was computed at.
        staleness: updates since then.
        work: step of the run's plan.
        delay_s: how long the worker waited on purpose.
    """

    worker: int
    pulled: int
    staleness: int
    work: int
    delay_s: float


@dataclass(frozen=True)
class Update:
    """One update of the weights, for the record.

    Attributes:
        version: after it.
        worker: whose push made it; in a synchronous round, the last one's.
        staleness: of that push.
        loss_sum: of the samples in it.
        correct: right predictions among them.
        samples: in it.
        parts: its pushes, by worker.
    """

    version: int
    worker: int
    staleness: int
    loss_sum: float
    correct: float
    samples: int
    parts: tuple[Part, ...]


@dataclass
class _Worker:
    pulled: Snapshot | None = None
    pushed: int = 0
    is_lost: bool = False
    has_finished: bool = False
    buffers: Sequence[Tensor] | None = None


class Engine:
    """The weights and everything that changes them.

    Args:
        model: its parameters are updated in place.
        optimizers: of these parameters.
        mode: synchronous or asynchronous.
        workers: their numbers.
        compensation: of delays, asynchronous only; None for none.
        before_update: called before each update, when the gradients are in place, with the samples that the
            updates before it had: clips, sets learning rates.
        after_update: called after each update, under the lock.
        replay: events to follow; None for none.
        ledger: of the work that `begin` hands out; None where workers know their samples.

    Raises:
        ValueError: compensation in a synchronous mode, or no worker.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        mode: Mode,
        workers: Sequence[int],
        compensation: Rule | None = None,
        before_update: Callable[[int], None] | None = None,
        after_update: Callable[[Update], None] | None = None,
        replay: Sequence[Event] | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        if not workers:
            raise ValueError("a parameter server needs at least one worker")
        if mode == "sync" and compensation is not None:
            raise ValueError("synchronous updates have no delay to compensate")
        self._parameters = [each for each in model.parameters() if each.requires_grad]
        self._buffers = list(model.buffers())
        self._optimizers, self._mode = list(optimizers), mode
        self._workers = {number: _Worker() for number in workers}
        rule = compensation
        self._compensation = None if rule is None else Compensation(rule, self._parameters)
        self._before_update, self._after_update = before_update, after_update
        self._replay = None if replay is None else list(replay)
        self._turn = threading.Condition()
        self._round: dict[int, Push] = {}
        self._failure: BaseException | None = None
        self._ledger = Ledger([], mode, list(workers), 1) if ledger is None else ledger
        self._has_ended = False
        self._samples = 0
        self.events: list[Event] = []
        self._snapshot = self._take_snapshot(0)

    @property
    def version(self) -> int:
        """Returns the number of updates so far."""
        return self._snapshot.version

    @property
    def samples(self) -> int:
        """Returns the samples in all updates so far."""
        return self._samples

    @property
    def failure(self) -> BaseException | None:
        """Returns what has ended this server; None while it works."""
        return self._failure

    def begin(self, worker: int) -> tuple[Work, Snapshot] | None:
        """Returns a worker's next samples and the weights of now, as soon as there are any; None at the end.

        Raises:
            LostWorkerError: this worker was taken for lost.
            Exception: whatever has ended the server.
        """
        with self._turn:
            self._turn.wait_for(
                lambda: (
                    self._has_ended
                    or self._is_over_for(worker)
                    or (self._ledger.has_work(worker) and self._is_turn("pull", worker))
                )
            )
            if self._has_ended:
                return None
            self._check_alive(worker)
            work = self._ledger.take(worker)
            self._workers[worker].pulled = self._snapshot
            self._happened("pull", worker)
            return work, self._snapshot

    def open(self, steps: Sequence[int]) -> None:
        """Lets workers begin steps of the run's plan."""
        with self._turn:
            self._ledger.open(steps)
            self._turn.notify_all()

    def hold(self) -> None:
        """Lets workers finish what they have begun, and begin nothing more."""
        with self._turn:
            self._ledger.hold()
            self._turn.notify_all()

    def remaining(self) -> list[int]:
        """Returns the opened steps that nobody has begun, in order."""
        with self._turn:
            return self._ledger.remaining

    def is_idle(self, timeout_s: float) -> bool:
        """Returns whether no worker has anything left to do, as soon as that is so, or after a time.

        Raises:
            Exception: whatever has ended the server.
        """
        with self._turn:
            is_idle = self._turn.wait_for(
                lambda: self._failure is not None or self._ledger.is_idle, timeout_s
            )
            if self._failure is not None:
                raise self._failure
            return is_idle

    def end(self) -> None:
        """Tells all workers that wait for work, or will, that there is no more."""
        with self._turn:
            self._has_ended = True
            self._turn.notify_all()

    def pull(self, worker: int) -> Snapshot:
        """Returns the weights of now.

        Raises:
            LostWorkerError: this worker was taken for lost.
            Exception: whatever has ended the server.
        """
        with self._turn:
            self._await_turn("pull", worker)
            self._workers[worker].pulled = self._snapshot
            self._happened("pull", worker)
            return self._snapshot

    def push(self, worker: int, push: Push) -> int:
        """Takes in a gradient; in synchronous mode, returns when the round's update is done.

        Returns:
            The version after the update that it is part of, or of now if it is a repetition.

        Raises:
            ValueError: a push of another snapshot than the worker's last, or one out of order.
            LostWorkerError: this worker was taken for lost, or another one and the mode is synchronous.
            Exception: whatever has ended the server.
        """
        with self._turn:
            own = self._workers[worker]
            if push.number < own.pushed:
                return self.version
            self._check_push(own, worker, push)
            self._await_turn("push", worker)
            own.pushed, own.buffers = push.number + 1, push.buffers
            self._happened("push", worker)
            if self._mode == "async":
                self._update({worker: push}, worker)
            else:
                self._join_round(worker, push)
            self._ledger.done(worker)
            self._turn.notify_all()
            return self.version

    def finish(self, worker: int) -> None:
        """Takes note that a worker has no more batches: rounds no longer wait for it."""
        with self._turn:
            self._workers[worker].has_finished = True
            self._complete_round(worker)

    def lose(self, worker: int, how: str = "is gone") -> None:
        """Takes note that a worker is gone.

        Asynchronous training goes on without it; synchronous training, or one without any worker left, ends.

        Args:
            worker: which.
            how: what is known about it, to stand after ``worker <n>``.
        """
        with self._turn:
            own = self._workers[worker]
            if own.is_lost or own.has_finished:
                return
            own.is_lost = True
            self._ledger.lose(worker)
            if self._mode == "sync":
                self._fail(LostWorkerError(f"worker {worker} {how}, and synchronous updates need it"))
            elif all(each.is_lost for each in self._workers.values()):
                self._fail(LostWorkerError(f"all workers are gone; the last: worker {worker} {how}"))
            self._turn.notify_all()

    def fail(self, error: BaseException) -> None:
        """Ends the server: every call from now on, and every one that waits, raises the error."""
        with self._turn:
            self._fail(error)

    def state_dict(self) -> dict[str, Any]:
        """Returns all but the weights and the optimizers, which have their own; none may be under way."""
        with self._turn:
            compensation = None if self._compensation is None else self._compensation.state_dict()
            buffers = {
                number: [each.clone() for each in own.buffers]
                for number, own in self._workers.items()
                if own.buffers is not None
            }
            return {
                "version": self.version,
                "samples": self._samples,
                "compensation": compensation,
                "buffers": buffers,
                "ledger": self._ledger.state_dict(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`'s result, with the weights as they are now; workers must pull anew."""
        with self._turn:
            if self._compensation is not None and state["compensation"] is not None:
                self._compensation.load_state_dict(state["compensation"])
            for number, buffers in state["buffers"].items():
                if number in self._workers:
                    self._workers[number].buffers = buffers
            self._ledger.load_state_dict(state["ledger"])
            self._samples = state["samples"]
            self._snapshot = self._take_snapshot(state["version"])

    def _check_push(self, own: _Worker, worker: int, push: Push) -> None:
        if push.number > own.pushed:
            raise ValueError(f"worker {worker}: push {push.number} came before push {own.pushed}")
        if own.pulled is None or own.pulled.version != push.version:
            had = "no snapshot" if own.pulled is None else f"snapshot {own.pulled.version}"
            raise ValueError(f"worker {worker}: push of snapshot {push.version}, but it has {had}")
        if push.samples < 1:
            raise ValueError(f"worker {worker}: push of {push.samples} samples")

    def _await_turn(self, verb: Verb, worker: int) -> None:
        """Returns when it is this event's turn: at once without a replay."""
        self._turn.wait_for(lambda: self._is_over_for(worker) or self._is_turn(verb, worker))
        self._check_alive(worker)

    def _is_turn(self, verb: Verb, worker: int) -> bool:
        if self._replay is None:
            return True
        place = len(self.events)
        return place < len(self._replay) and self._replay[place] == (verb, worker)

    def _is_over_for(self, worker: int) -> bool:
        return self._failure is not None or self._workers[worker].is_lost

    def _check_alive(self, worker: int) -> None:
        if self._failure is not None:
            raise self._failure
        if self._workers[worker].is_lost:
            raise LostWorkerError(f"worker {worker} was taken for lost; its push does not count")

    def _happened(self, verb: Verb, worker: int) -> None:
        self.events.append((verb, worker))
        self._turn.notify_all()

    def _join_round(self, worker: int, push: Push) -> None:
        version = self.version
        self._round[worker] = push
        self._complete_round(worker)
        self._turn.wait_for(lambda: self.version > version or self._failure is not None)
        self._check_alive(worker)

    def _complete_round(self, last: int) -> None:
        """Updates if everybody has pushed who still takes part."""
        wanted = {number for number, each in self._workers.items() if not each.has_finished}
        if self._round and wanted <= set(self._round):
            pushes, self._round = dict(sorted(self._round.items())), {}
            self._update(pushes, last)

    def _update(self, pushes: Mapping[int, Push], last: int) -> None:
        """Makes one update of one or several pushes; an error in it ends the server."""
        try:
            update = self._apply(pushes, last)
            if self._after_update is not None:
                self._after_update(update)
        except BaseException as error:
            self._fail(error)
            raise
        self._turn.notify_all()

    @torch.no_grad()
    def _apply(self, pushes: Mapping[int, Push], last: int) -> Update:
        samples = sum(push.samples for push in pushes.values())
        loss_sum = sum(push.loss_sum for push in pushes.values())
        if not math.isfinite(loss_sum):
            where = f"update {self.version + 1}, pushed by worker {last}"
            raise NotFiniteError(f"loss is {loss_sum / samples} in {where}")
        parts = tuple(
            Part(worker, push.version, self.version - push.version, push.work, push.delay_s)
            for worker, push in pushes.items()
        )
        staleness = self.version - pushes[last].version if last in pushes else 0
        for parameter, gradient in zip(self._parameters, self._mean(pushes, samples), strict=True):
            parameter.grad = gradient.to(parameter.device)
        if self._before_update is not None:
            self._before_update(self._samples)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._join_buffers()
        self._samples += samples
        self._snapshot = self._take_snapshot(self.version + 1)
        correct = sum(push.correct for push in pushes.values())
        return Update(self.version, last, staleness, loss_sum, correct, samples, parts)

    def _mean(self, pushes: Mapping[int, Push], samples: int) -> list[Tensor]:
        """Returns the gradient of all samples' mean loss, compensated if asked; one push stays as it is."""
        if len(pushes) > 1:
            weights = [push.samples / samples for push in pushes.values()]
            columns = zip(*(push.gradients for push in pushes.values()), strict=True)
            return [sum(w * g for w, g in zip(weights, column, strict=True)) for column in columns]
        [(worker, push)] = pushes.items()
        if self._compensation is None:
            return list(push.gradients)
        pulled = self._workers[worker].pulled
        then = self._snapshot.parameters if pulled is None else pulled.parameters
        # wherever the model is, gradients and snapshots are on the CPU
        here = [
            [each.to(own.device) for each, own in zip(group, self._parameters, strict=True)]
            for group in (push.gradients, then)
        ]
        return self._compensation.apply(here[0], self._parameters, here[1])

    def _join_buffers(self) -> None:
        latest = [each.buffers for each in self._workers.values() if each.buffers is not None]
        for buffer, column in zip(self._buffers, zip(*latest, strict=True), strict=False):
            stacked = torch.stack(list(column))
            buffer.copy_(stacked.mean(0) if buffer.is_floating_point() else stacked.amax(0))

    def _take_snapshot(self, version: int) -> Snapshot:
        groups = (self._parameters, self._buffers)
        parameters, buffers = (
            tuple(each.detach().to("cpu", copy=True) for each in group) for group in groups
        )
        return Snapshot(version, parameters, buffers)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._turn.notify_all()
