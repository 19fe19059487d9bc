"""One worker: fetches weights and samples, computes a gradient, waits if it is told to, and pushes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hpcsngd.config.experiment import Experiment
from hpcsngd.train import devices, seeds
from hpcsngd.train.data import Samples, Wanted
from hpcsngd.train.loop import to_device
from hpcsngd.train.parameter_server.delays import DelayModel
from hpcsngd.train.parameter_server.engine import Push, Snapshot
from hpcsngd.train.parameter_server.link import Assignment, Ending, Link
from hpcsngd.train.parameter_server.work import Work
from hpcsngd.train.pulse import Pulse
from hpcsngd.train.sampler import ShardedSampler, even_parts
from hpcsngd.train.tasks import Task


class Orders:
    """Which samples a work is of: of the epoch's order, or what comes next in an order of the worker's own.

    A worker with a part of its own goes through it again and again, each time in a new order that follows
    from (seed, worker, pass).

    Args:
        common: the order of an epoch for all workers.
        seed: of the run.
        worker: its number.
        part: its own samples, int64; None: it takes from the common order.
    """

    def __init__(self, common: ShardedSampler, seed: int, worker: int, part: Tensor | None) -> None:
        self._common, self._seed, self._worker, self._part = common, seed, worker, part
        self._kept: tuple[int, list[int]] = (-1, [])

    def wanted(self, work: Work) -> Iterator[Wanted]:
        """Yields the micro-batches of a work, with the epoch or pass by which samples are changed."""
        chosen = self._chosen(work)
        place = 0
        for size in even_parts(work.count, work.micro_batches):
            pieces = chosen[place : place + size]
            # a batch over the end of a pass is changed as of the pass that it begins in
            yield Wanted([index for _, index in pieces], pieces[0][0])
            place += size

    def _chosen(self, work: Work) -> list[tuple[int, int]]:
        """Returns epoch or pass, and sample."""
        if self._part is None:
            order = self._order(work.epoch)
            return [(work.epoch, index) for index in order[work.start : work.start + work.count]]
        places = (divmod(place, len(self._part)) for place in range(work.before, work.before + work.count))
        return [(number, self._order(number)[place]) for number, place in places]

    def _order(self, number: int) -> list[int]:
        """Returns the order of an epoch or pass; the last one is kept."""
        if self._kept[0] != number:
            self._kept = (number, self._draw(number))
        return self._kept[1]

    def _draw(self, number: int) -> list[int]:
        if self._part is None:
            return self._common.order(number)
        generator = seeds.generator(self._seed, "order", number, "worker", self._worker)
        own: list[int] = self._part[torch.randperm(len(self._part), generator=generator)].tolist()
        return own


class Worker:
    """Computes gradients until the server says that it is enough.

    Args:
        number: from 1.
        config: the experiment.
        model: on the device; its weights are the server's in each step.
        samples: the training set.
        orders: which of them.
        task: what is learned.
        link: to the server.
        device: where the gradients are computed.
        delay: how long to wait before a push; None: not at all.
        pulse: is told where this worker stands.
    """

    def __init__(
        self,
        number: int,
        config: Experiment,
        model: nn.Module,
        *,
        samples: Samples,
        orders: Orders,
        task: Task,
        link: Link,
        device: torch.device,
        delay: DelayModel | None,
        pulse: Pulse,
    ) -> None:
        self._number, self._config, self._model = number, config, model
        self._samples, self._orders, self._task = samples, orders, task
        self._link, self._device, self._delay, self._pulse = link, device, delay, pulse
        self._parameters = [each for each in model.parameters() if each.requires_grad]
        self._pushed = 0

    def run(self) -> bool:
        """Works; returns True at the end of the run, False after a stop request.

        Raises:
            ServerFailedError: the server has ended with an error, or is gone.
            DismissedError: the server goes on without this worker.
        """
        streams = self._link.join()
        if streams is None:
            # as the rank that does the same work under ddp
            seeds.seed_streams(seeds.derive(self._config.seed, "rank", self._number - 1))
        else:
            seeds.restore_streams(streams)
        self._model.train()
        while True:
            self._pulse.at("reduce")
            answer = self._link.begin(seeds.stream_states())
            if isinstance(answer, Ending):
                self._link.leave()
                return answer.is_finished
            push = self._compute(answer)
            self._pulse.at("reduce")
            version = self._link.push(push)
            self._pushed += 1
            self._pulse.at("between steps", version)

    def _compute(self, assignment: Assignment) -> Push:
        """Returns the gradient of a work's samples at a snapshot, after the delay."""
        work, snapshot = assignment.work, assignment.snapshot
        self._load(snapshot)
        self._model.zero_grad(set_to_none=True)
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for wanted in self._orders.wanted(work):
            self._pulse.at("data")
            images, targets = to_device(
                self._samples[wanted], self._device, is_channels_last=self._config.model.channels_last
            )
            self._pulse.at("compute")
            sums += self._micro_batch(images, targets, work.count)
        loss, correct = sums.tolist()
        return Push(
            self._pushed,
            snapshot.version,
            [_gradient(each) for each in self._parameters],
            [each.detach().to("cpu", copy=True) for each in self._model.buffers()],
            loss,
            correct,
            work.count,
            work.step,
            self._wait(work.turn),
        )

    def _micro_batch(self, images: Tensor, targets: Tensor, size: int) -> Tensor:
        """Adds a micro-batch's gradients; returns its summed loss and score."""
        with devices.autocast(self._config.precision, self._device):
            outputs = self._model(images)
        loss = self._task.loss(outputs, targets)
        (loss * (1 / size)).backward()  # type: ignore[no-untyped-call]
        return torch.stack([loss.detach().double(), self._task.score(outputs.detach(), targets)])

    def _wait(self, turn: int) -> float:
        """Waits as the delay model says; returns the seconds that it says."""
        if self._delay is None:
            return 0.0
        seconds = self._delay.seconds(self._config.seed, self._number, turn)
        time.sleep(seconds)
        return seconds

    @torch.no_grad()
    def _load(self, snapshot: Snapshot) -> None:
        for own, given in zip(self._parameters, snapshot.parameters, strict=True):
            own.copy_(given)
        _copy(list(self._model.buffers()), snapshot.buffers)


def _copy(own: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    for buffer, value in zip(own, given, strict=True):
        buffer.copy_(value)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Returns a parameter's gradient on the CPU; zeros if the loss does not depend on it."""
    if parameter.grad is None:
        return torch.zeros_like(parameter, device="cpu")
    return parameter.grad.detach().to("cpu")
