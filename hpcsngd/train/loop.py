"""The training loop: steps, evaluations, checkpoints and stop requests, in one order for every strategy.

At a step boundary, in this order: the row of train.csv, at the end of an epoch the evaluation and its row,
the checkpoint, the stop request. So a checkpoint of step n includes everything that happened at step n, and a
resumed run repeats exactly what came after.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from hpcsngd import dist
from hpcsngd.config.experiment import Experiment
from hpcsngd.optim import Preconditioner
from hpcsngd.optim.quantify import quantify
from hpcsngd.optim.stopwatch import Stopwatch
from hpcsngd.train import carried, devices, optimizers, schedules, seeds
from hpcsngd.train.checkpoint import Checkpoints
from hpcsngd.train.data import Batch
from hpcsngd.train.faults import NotFiniteError
from hpcsngd.train.metrics import Progress, Recorder, Sums
from hpcsngd.train.pulse import Pulse
from hpcsngd.train.sampler import ShardedSampler
from hpcsngd.train.stepping import Stepping
from hpcsngd.train.stopping import StopRequest
from hpcsngd.train.strategy import Strategy
from hpcsngd.train.tasks import Evaluated, Evaluation, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Scales:
    """How the losses of a step are averaged.

    Attributes:
        divisor: what the sum over all ranks' targets is divided by.
        sample: the averaged loss's gradients at outputs times this are those of each sample's own loss.
    """

    divisor: int
    sample: float


@dataclass(frozen=True)
class Held:
    """A set that is evaluated.

    Attributes:
        name: as eval.csv names it.
        task: of this set.
        batches: this rank's.
    """

    name: str
    task: Task
    batches: DataLoader[Batch]


@dataclass
class Parts:
    """What is trained, and with what.

    Attributes:
        model: the bare model.
        trained: what the strategy made of it; called in training.
        strategy: how ranks work together.
        optimizers: each has a part of the parameters.
        preconditioner: what changes gradients first, if anything.
        scaler: of the loss; does nothing unless the precision is fp16.
        device: where this rank computes.
    """

    model: nn.Module
    trained: nn.Module
    strategy: Strategy
    optimizers: list[Optimizer]
    preconditioner: Preconditioner | None
    scaler: torch.amp.GradScaler
    device: torch.device

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of all parts, alike on every rank."""
        preconditioner = None if self.preconditioner is None else self.preconditioner.state_dict()
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "preconditioner": preconditioner,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`'s result."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.preconditioner is not None:
            self.preconditioner.load_state_dict(state["preconditioner"])
        self.scaler.load_state_dict(state["scaler"])


class Trainer:
    """Trains from ``progress`` to the end of the run or to a stop request.

    Args:
        config: the experiment.
        parts: what is trained; changed in place.
        sampler: of the training set, the one that ``stepping`` goes by.
        stepping: where a step's batches come from, and how its gradients become weights.
        task: what is learned: the loss, and how good a prediction is.
        held: what is evaluated after each epoch; schedules and best values go by the first.
        recorder: takes the metrics.
        checkpoints: takes the state.
        stop_request: says when the run should checkpoint and leave.
        progress: how far the run is; changed in place.
        pulse: is told where this rank stands.
    """

    def __init__(
        self,
        config: Experiment,
        parts: Parts,
        *,
        sampler: ShardedSampler,
        stepping: Stepping,
        task: Task,
        held: Sequence[Held],
        recorder: Recorder,
        checkpoints: Checkpoints,
        stop_request: StopRequest,
        progress: Progress,
        pulse: Pulse,
    ) -> None:
        self._config, self._parts, self._sampler = config, parts, sampler
        self._stepping, self._task, self._held = stepping, task, held
        self._recorder, self._checkpoints, self._stop_request = recorder, checkpoints, stop_request
        self.progress, self._pulse = progress, pulse
        self._saved_step = progress.step
        self._is_time_over = self._has_used_its_time()
        self._stopwatch = Stopwatch(config.diagnostics.profiling)

    def run(self) -> bool:
        """Trains; returns True at the end of the run, False after a stop request.

        Raises:
            NotFiniteError: the loss or a weight is not finite; on every rank.
        """
        total = self._config.epochs * self._sampler.steps_per_epoch
        is_stopped = False
        while self.progress.step < total and not (is_stopped or self._is_time_over):
            is_stopped = self._run_epoch()
        if self._saved_step != self.progress.step:
            self._save()
        return self.progress.step == total or self._is_time_over

    def _run_epoch(self) -> bool:
        """Trains to the end of the epoch; returns whether a stop request came."""
        epoch, first = divmod(self.progress.step, self._sampler.steps_per_epoch)
        self._stepping.start(epoch, first)
        self._parts.trained.train()
        if first == 0:
            carried.reset(self._parts.model)
        for position in range(first, self._sampler.steps_per_epoch):
            started = time.perf_counter()
            is_stopped = self._step(position)
            devices.wait_for(self._parts.device)
            self.progress.train_s += time.perf_counter() - started
            is_end = self._is_time_over or position + 1 == self._sampler.steps_per_epoch
            self._after_step(is_end_of_epoch=is_end)
            if is_stopped or self._is_time_over:
                return is_stopped
        return False

    def _step(self, position: int) -> bool:
        """Does one optimizer step; returns whether a stop request was seen."""
        parts, scales = self._parts, self._scales(position)
        count = self._sampler.micro_batches_in(position)
        if parts.preconditioner is not None:
            parts.preconditioner.begin_step(scales.sample, count)
        sums = self._pass(self._stepping.batches(position), count, scales.divisor)
        own_loss = sums[0] / scales.divisor
        self._pulse.at("reduce")
        sums[2] = self._sees_stop_request()
        # the clock of rank 0 counts, before this step
        sums[3] = dist.rank() == 0 and self._has_used_its_time()
        loss, score, stops, over = dist.all_reduce_sum(sums).tolist()
        targets = self._sampler.targets_in(position)
        if not (math.isfinite(loss) or self._stepping.can_recover):
            raise NotFiniteError(
                f"loss is {loss / targets} at step {self.progress.step + 1}; {self._advice()}"
            )
        self._pulse.at("update")
        self.progress.samples += self._sampler.sizes[position] + self._update(scales.sample, own_loss)
        self.progress.step += 1
        self._pulse.at("between steps", self.progress.step)
        self.progress.row.add(loss, score, targets)
        self.progress.epoch.add(loss, score, targets)
        self._is_time_over = over > 0
        return bool(stops > 0)

    def _pass(self, batches: Iterator[Batch], count: int, divisor: int) -> Tensor:
        """Leaves the averaged gradient of micro-batches; returns sums of loss and score, and two zeros."""
        parts = self._parts
        for optimizer in parts.optimizers:
            optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(4, dtype=torch.float64, device=parts.device)
        for index in range(count):
            self._pulse.at("data")
            with self._stopwatch.phase("data"):
                batch = self._to_device(next(batches))
            self._pulse.at("compute")
            with parts.strategy.micro_batch(is_last=index + 1 == count):
                sums[:2] += self._micro_batch(batch, divisor)
        return sums

    def _pass_again(self, batches: Iterator[Batch], count: int, size: int) -> Tensor:
        """Does a pass in the midst of an update; returns this rank's part of the mean loss."""
        loss = self._pass(batches, count, size)[0] / size
        self._pulse.at("update")
        return loss

    def _scales(self, position: int) -> _Scales:
        """Returns how the losses of a step are averaged."""
        size, ranks = self._sampler.sizes[position], dist.world_size()
        if self._config.loss.average == "none":
            return _Scales(ranks, 1.0)
        is_by_token = self._config.loss.average == "tokens"
        return _Scales(self._sampler.targets_in(position) if is_by_token else size, size / ranks)

    def _micro_batch(self, batch: Batch, divisor: int) -> Tensor:
        """Adds a micro-batch's gradients; returns its summed loss and score."""
        parts = self._parts
        *inputs, targets = batch
        with self._stopwatch.phase("forward"):
            with devices.autocast(self._config.precision, parts.device):
                outputs = parts.trained(*inputs)
            loss = self._task.loss(outputs, targets)
        if parts.preconditioner is not None:
            parts.preconditioner.before_backward(self._task.curvature_outputs(outputs, targets))
        with self._stopwatch.phase("backward"):
            scaled: Tensor = parts.scaler.scale(loss * parts.strategy.loss_factor(divisor))
            scaled.backward()  # type: ignore[no-untyped-call]
        return torch.stack([loss.detach().double(), self._task.score(outputs.detach(), targets)])

    def _update(self, sample_scale: float, own_loss: Tensor) -> int:
        """Turns gradients into weights: unscale, clip, precondition, update; returns samples used again.

        Args:
            sample_scale: see `hpcsngd.optim.Preconditioner.step`.
            own_loss: this rank's part of the mean loss.
        """
        parts, step = self._parts, self.progress.step + 1
        with self._stopwatch.phase("update"):
            for optimizer in parts.optimizers:
                parts.scaler.unscale_(optimizer)
        if self._config.diagnostics.grad_norm:
            self._recorder.gradient_norms(step, gradient_norms(parts.model))
        with self._stopwatch.phase("update"):
            if self._config.clip_norm is not None:
                nn.utils.clip_grad_norm_(parts.model.parameters(), self._config.clip_norm)
            optimizers.set_multiplier(parts.optimizers, self._multiplier())
        if parts.preconditioner is not None:
            epoch = self.progress.step / self._sampler.steps_per_epoch
            parts.preconditioner.set_progress(epoch, parts.optimizers[0].param_groups[0]["lr"])
            before = self._before_measuring(step)
            parts.preconditioner.step(sample_scale=sample_scale, grad_scale=parts.scaler.get_scale())
            if before is not None:
                self._recorder.quantify(step, quantify(before, flat_gradients(parts.model)))
        with self._stopwatch.phase("update"):
            used = self._stepping.update(own_loss, self._pass_again)
        self._record_step(step)
        return used

    def _before_measuring(self, step: int) -> Tensor | None:
        """Returns the gradients if what is done to them is to be measured in this step; rank 0 does."""
        every = self._config.diagnostics.quantify_every
        is_due = every > 0 and (step - 1) % every == 0 and dist.rank() == 0
        return flat_gradients(self._parts.model) if is_due else None

    def _record_step(self, step: int) -> None:
        seconds, refresh = self._stopwatch.take(), False
        if self._parts.preconditioner is not None:
            record = self._parts.preconditioner.diagnostics()
            refresh = record.refresh
            seconds |= {phase.phase: phase.seconds for phase in record.phases}
            self._recorder.preconditioner(step, record)
        self._recorder.phases(step, seconds, refresh=refresh)
        self._stepping.record(self._recorder, step)

    def _after_step(self, *, is_end_of_epoch: bool) -> None:
        progress, rule = self.progress, self._config.checkpoint
        if is_end_of_epoch or progress.step % self._config.diagnostics.log_every == 0:
            self._recorder.train(progress, self._parts.optimizers[0].param_groups[0]["lr"])
            progress.row = Sums()
        is_due = rule.every_steps is not None and progress.step % rule.every_steps == 0
        if is_end_of_epoch:
            self._evaluate()
            progress.epoch = Sums()
            epoch = progress.step // self._sampler.steps_per_epoch
            is_due |= rule.every_epochs is not None and epoch % rule.every_epochs == 0
        if is_due:
            self._save()

    def _evaluate(self) -> None:
        parts, progress = self._parts, self.progress
        parts.strategy.join_buffers()
        is_last = self._is_time_over or progress.step == self._config.epochs * self._sampler.steps_per_epoch
        for place, held in enumerate(self._held):
            started = time.perf_counter()
            found = self._over(held, is_last=is_last)
            if place == 0:
                progress.take_test(found.sums)
                self._recorder.dice(progress.step, found.patients)
                if is_last and found.confusion is not None:
                    self._recorder.confusion(progress.step, held.name, found.confusion)
            self._recorder.evaluation(
                progress, held.name, found.sums, found.scores, time.perf_counter() - started
            )
            scores = dict(found.scores)
            if place:
                scores |= {"loss": found.sums.mean_loss, "accuracy": found.sums.accuracy}
            progress.scores |= {f"{held.name}_{name}": value for name, value in scores.items()}
        log.info(
            "epoch %d/%d: loss %.4f, accuracy %.4f; evaluation %.4f, %.4f%s; lr %.3g, %.1f s trained",
            progress.step // self._sampler.steps_per_epoch,
            self._config.epochs,
            progress.epoch.mean_loss,
            progress.epoch.accuracy,
            progress.test.mean_loss,
            progress.test.accuracy,
            "".join(f", {name} {value:.4g}" for name, value in progress.scores.items()),
            parts.optimizers[0].param_groups[0]["lr"],
            progress.train_s,
        )

    def _over(self, held: Held, *, is_last: bool) -> Evaluated:
        """Returns what the task makes of a set, each sample once."""
        epoch = self.progress.step // self._sampler.steps_per_epoch
        is_full = is_last or epoch % self._config.decoding.every_epochs == 0
        return evaluate(
            self._parts.model,
            held.batches,
            held.task.evaluation(self._parts.device, is_full=is_full),
            move=self._to_device,
            precision=self._config.precision,
            tick=lambda: self._pulse.at("evaluate"),
        )

    def _save(self) -> None:
        parts, step, started = self._parts, self.progress.step, time.monotonic()
        self._pulse.at("checkpoint")
        if not all(bool(weight.isfinite().all()) for weight in parts.model.parameters()):
            raise NotFiniteError(f"a weight is not finite after step {step}; {self._advice()}")
        parts.strategy.join_buffers()
        common = {
            "seed": self._config.seed,
            "global_batch": self._sampler.global_batch,
            "steps_per_epoch": self._sampler.steps_per_epoch,
            "progress": self.progress.state_dict(),
            "parts": parts.state_dict(),
        }
        own = seeds.stream_states() | {"carried": carried.states(parts.model)}
        self._checkpoints.save(step, common, own)
        self._saved_step = step
        self._pulse.saved(time.monotonic() - started)

    def _has_used_its_time(self) -> bool:
        return self.progress.train_s >= (self._config.train_limit_s or math.inf)

    def _sees_stop_request(self) -> bool:
        self._pulse.boundary()
        return self._stop_request.is_seen()

    def _multiplier(self) -> float:
        return schedules.multiplier(
            self._config.schedule,
            self.progress.step,
            steps_per_epoch=self._sampler.steps_per_epoch,
            epochs=self._config.epochs,
            plateaus=self.progress.plateaus,
        )

    def _to_device(self, batch: Batch) -> Batch:
        return to_device(batch, self._parts.device, is_channels_last=self._config.model.channels_last)

    def _advice(self) -> str:
        kept = f"the checkpoint of step {self._saved_step} stays" if self._saved_step else "no checkpoint yet"
        return f"lr {self._config.optimizer.lr:g} may be too large; {kept}"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: DataLoader[Batch],
    evaluation: Evaluation,
    *,
    move: Callable[[Batch], Batch],
    precision: str,
    tick: Callable[[], None] = lambda: None,
) -> Evaluated:
    """Returns what an evaluation makes of a model, which goes to evaluation mode and back to training mode.

    Args:
        model: on this rank's device.
        batches: this rank's.
        evaluation: takes the outputs; its result is collective.
        move: brings a batch to the device.
        precision: of the forward pass.
        tick: called for each batch.
    """
    model.eval()
    carried.reset(model)
    for indices, batch in zip(batches.sampler, batches, strict=True):
        tick()
        *inputs, targets = move(batch)
        with devices.autocast(precision, targets.device):
            evaluation.look(model, indices, tuple(inputs))
            outputs = model(*inputs)
        evaluation.add(indices, outputs, targets)
    model.train()
    return evaluation.result()


def to_device(batch: Batch, device: torch.device, *, is_channels_last: bool) -> Batch:
    """Returns a batch on a device, images in the model's memory format."""
    layout = torch.channels_last if is_channels_last else torch.preserve_format
    *inputs, targets = batch
    moved = [each.to(device, non_blocking=True, memory_format=layout) for each in inputs]
    return (*moved, targets.to(device, non_blocking=True))


def flat_gradients(model: nn.Module) -> Tensor:
    """Returns all gradients as one vector, a copy; parameters without one are left out."""
    gradients = (parameter.grad for parameter in model.parameters())
    return torch.cat([gradient.reshape(-1) for gradient in gradients if gradient is not None])


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Returns layer name -> Frobenius norm of the gradients of its own parameters; the same on every rank.

    Layers without gradients are left out. The model's own parameters, outside any layer, go by ``""``.
    """
    norms: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        gradients = [parameter.grad for parameter in module.parameters(recurse=False)]
        present: Sequence[Tensor] = [gradient for gradient in gradients if gradient is not None]
        if present:
            norms[name] = torch.stack([gradient.norm() for gradient in present]).norm()
    values = torch.stack(list(norms.values())).tolist() if norms else []
    return dict(zip(norms, values, strict=True))
