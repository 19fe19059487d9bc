"""The server: weights, optimizers, metrics, evaluations and checkpoints, while workers compute.

Training goes in legs, from one boundary to the next: an epoch's end, or a checkpoint's step. At a boundary
every worker has pushed what it had begun and waits, so the weights stand still for evaluation and checkpoint,
and nothing is under way that a resumed run would have to repeat. Between boundaries nobody waits but for the
next step.

Each call of a worker runs in a thread of its own; `Server.run` is the main thread's.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hpcsngd.config.experiment import Experiment
from hpcsngd.train import optimizers, schedules
from hpcsngd.train.checkpoint import Checkpoints
from hpcsngd.train.faults import NotFiniteError
from hpcsngd.train.loop import gradient_norms
from hpcsngd.train.metrics import Progress, Recorder, Sums
from hpcsngd.train.parameter_server.engine import Engine, Push, Update
from hpcsngd.train.parameter_server.link import Assignment, Ending, WorkerFailedError
from hpcsngd.train.pulse import Pulse
from hpcsngd.train.stopping import StopRequest
from hpcsngd.train.tasks import Evaluated

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""How often the server looks for stop requests and lost workers."""
LEAVE_S = 20.0
"""How long workers have to take their leave after a failure."""


@dataclass
class Served:
    """What is trained, and with what.

    Attributes:
        model: updated in place.
        optimizers: of its parameters.
    """

    model: nn.Module
    optimizers: list[Optimizer]

    def state_dict(self) -> dict[str, Any]:
        """Returns the states as `loop.Parts` does, so that checkpoints are read alike."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "preconditioner": None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict`'s result."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


@dataclass
class Position:
    """How far a run is, apart from `Progress`.

    Attributes:
        left: steps of the epoch under way that nobody has done, in order; empty between epochs.
        streams: worker -> states of its random streams.
        lost: what is known of each worker that was lost, over all attempts.
    """

    left: list[int] = field(default_factory=list)
    streams: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


class Updates:
    """What comes before and after each update, under the engine's lock: learning rate, clipping, records.

    Args:
        config: the experiment.
        served: what is trained.
        steps_per_epoch: updates per epoch.
        progress: how far the run is; changed in place.
        recorder: takes the metrics; None where there is none yet.
        pulse: is told where the server stands.
    """

    def __init__(
        self, config: Experiment, served: Served, *, steps_per_epoch: int, progress: Progress, pulse: Pulse
    ) -> None:
        self._config, self._served, self._steps_per_epoch = config, served, steps_per_epoch
        self._progress, self._pulse = progress, pulse
        self.recorder: Recorder | None = None
        self.leg_began: float | None = None
        self._clock = threading.Lock()

    def before(self, samples: int) -> None:
        """Clips the gradients and sets the learning rate."""
        config, model = self._config, self._served.model
        if self.recorder is not None and config.diagnostics.grad_norm:
            self.recorder.gradient_norms(self._progress.step + 1, gradient_norms(model))
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        factor = schedules.multiplier(
            config.schedule,
            self._progress.step,
            steps_per_epoch=self._steps_per_epoch,
            epochs=config.epochs,
            plateaus=self._progress.plateaus,
        )
        optimizers.set_multiplier(self._served.optimizers, factor)

    def after(self, update: Update) -> None:
        """Counts an update and writes its rows."""
        progress = self._progress
        progress.step = update.version
        progress.samples += update.samples
        progress.row.add(update.loss_sum, update.correct, update.samples)
        progress.epoch.add(update.loss_sum, update.correct, update.samples)
        self._pulse.at("between steps", progress.step)
        if self.recorder is None:
            return
        self.recorder.staleness(progress.step, update.parts)
        is_end = progress.step % self._steps_per_epoch == 0
        if is_end or progress.step % self._config.diagnostics.log_every == 0:
            self.write_row()

    def write_row(self) -> None:
        """Writes a row of train.csv, if there was an update since the last one."""
        if self.recorder is not None and self._progress.row.count:
            self.pass_time()
            self.recorder.train(self._progress, self._served.optimizers[0].param_groups[0]["lr"])
            self._progress.row = Sums()

    def pass_time(self) -> None:
        """Adds the time since the last call, or since the leg began, to the training time."""
        with self._clock:
            if self.leg_began is not None:
                now = time.perf_counter()
                self._progress.train_s += now - self.leg_began
                self.leg_began = now


class Server:
    """Serves workers from ``progress`` to the end of the run or to a stop request.

    Args:
        config: the experiment.
        served: what is trained.
        engine: its weights and their versions.
        updates: what the engine calls.
        workers: their numbers.
        steps_per_epoch: updates per epoch.
        evaluate: evaluates the model.
        split: what it is evaluated on, as eval.csv names it.
        recorder: takes the metrics.
        checkpoints: takes the state.
        stop_request: says when the run should checkpoint and leave.
        find_lost: returns worker -> how it was lost, of those that somebody has reported.
        progress: how far the run is; changed in place.
        position: the rest of it; changed in place.
        pulse: is told where the server stands.
        may_hold: whether a stop request is followed before the leg's end; not while a run is replayed.
        lost_after_s: silence after which a worker counts as lost.
    """

    def __init__(
        self,
        config: Experiment,
        served: Served,
        engine: Engine,
        updates: Updates,
        *,
        workers: Sequence[int],
        steps_per_epoch: int,
        evaluate: Callable[[], Evaluated],
        split: str,
        recorder: Recorder,
        checkpoints: Checkpoints,
        stop_request: StopRequest,
        find_lost: Callable[[], Mapping[int, str]],
        progress: Progress,
        position: Position,
        pulse: Pulse,
        may_hold: bool = True,
        lost_after_s: float = math.inf,
    ) -> None:
        self._config, self._served, self._engine, self._updates = config, served, engine, updates
        self._workers, self._steps_per_epoch = list(workers), steps_per_epoch
        self._evaluate_model, self._split = evaluate, split
        self._recorder, self._checkpoints = recorder, checkpoints
        self._stop_request, self._find_lost = stop_request, find_lost
        self.progress, self._position, self._pulse = progress, position, pulse
        self._may_hold, self._lost_after_s = may_hold, lost_after_s
        updates.recorder = recorder
        self._saved_step = progress.step
        self._resumed = dict(position.streams)
        self._heard = dict.fromkeys(self._workers, time.monotonic())
        self._gone: set[int] = set()
        self._ending = Ending(is_finished=False)

    # --- what workers call

    def join(self, worker: int) -> Mapping[str, Any] | None:
        """Returns the random streams that a worker continues with, if any."""
        self.ping(worker)
        return self._resumed.get(worker)

    def ping(self, worker: int) -> None:
        """Takes note that a worker's process lives."""
        self._heard[worker] = time.monotonic()

    def begin(self, worker: int, streams: Mapping[str, Any]) -> Assignment | Ending:
        """Waits for work for a worker."""
        self._position.streams[worker] = streams
        found = self._engine.begin(worker)
        return self._ending if found is None else Assignment(*found)

    def push(self, worker: int, push: Push) -> int:
        """Takes in a gradient; returns the version after its update."""
        return self._engine.push(worker, push)

    def leave(self, worker: int) -> None:
        """Takes note that a worker has left."""
        self._gone.add(worker)

    def fail(self, worker: int, kind: str, message: str) -> None:
        """Ends the run because a worker has failed."""
        self._gone.add(worker)
        self._engine.fail(WorkerFailedError(worker, kind, message))

    # --- the main thread

    def run(self) -> bool:
        """Serves; returns True at the end of the run, False after a stop request.

        Raises:
            LostWorkerError: synchronous training has lost a worker, or asynchronous training all of them.
            WorkerFailedError: a worker has failed.
            Exception: an update, an evaluation or a checkpoint has failed; all workers are told.
        """
        try:
            is_finished = self._legs()
        except BaseException as error:
            self._engine.fail(error)
            self._await_leave(time.monotonic() + LEAVE_S)
            raise
        self._ending = Ending(is_finished)
        return is_finished

    def dismiss(self) -> None:
        """Sends the workers home and waits until they have left, or are lost."""
        self._engine.end()
        self._await_leave(math.inf)

    @property
    def lost(self) -> list[str]:
        """Returns what is known of the workers that were lost."""
        return self._position.lost

    def _legs(self) -> bool:
        is_stopped = False
        while not self._is_complete and not is_stopped:
            leg, rest = self._next_leg()
            is_stopped = self._run_leg(leg)
            self._position.left = [*self._engine.remaining(), *rest]
            self._at_boundary()
        if self._saved_step != self.progress.step:
            self._save()
        return self._is_complete

    @property
    def _is_complete(self) -> bool:
        """Returns whether all epochs are done, or the time for them is over."""
        is_over = self.progress.train_s >= (self._config.train_limit_s or math.inf)
        return is_over or self.progress.step == self._config.epochs * self._steps_per_epoch

    def _next_leg(self) -> tuple[list[int], list[int]]:
        """Returns the steps up to the next boundary, and those of the epoch after it."""
        step, size = self.progress.step, self._steps_per_epoch
        left = self._position.left or list(range(step, (step // size + 1) * size))
        every = self._config.checkpoint.every_steps
        count = len(left) if every is None else min(len(left), every - step % every)
        return left[:count], left[count:]

    def _run_leg(self, steps: Sequence[int]) -> bool:
        """Lets workers do some steps; returns whether a stop request came."""
        is_stopped = False
        self._updates.leg_began = time.perf_counter()
        self._engine.open(steps)
        while not self._engine.is_idle(LOOK_S):
            self._mind_workers()
            self._updates.pass_time()
            is_stopped = is_stopped or self._sees_stop_request()
            if (is_stopped and self._may_hold) or self._is_complete:
                self._engine.hold()
        self._updates.pass_time()
        self._updates.leg_began = None
        return is_stopped or self._sees_stop_request()

    def _sees_stop_request(self) -> bool:
        self._pulse.boundary()
        return self._stop_request.is_seen()

    def _mind_workers(self) -> None:
        now = time.monotonic()
        found = dict(self._find_lost())
        for worker in self._workers:
            silent_s = now - self._heard[worker]
            if silent_s > self._lost_after_s:
                found.setdefault(worker, f"has been silent for {silent_s:.0f} s")
        for worker, how in found.items():
            if worker not in self._gone:
                self._gone.add(worker)
                log.warning("worker %d %s", worker, how)
                self._position.lost.append(f"worker {worker} {how}, seen after step {self._engine.version}")
                self._engine.lose(worker, how)

    def _at_boundary(self) -> None:
        progress, rule = self.progress, self._config.checkpoint
        is_due = rule.every_steps is not None and progress.step % rule.every_steps == 0
        if progress.step % self._steps_per_epoch == 0 or self._is_complete:
            self._updates.write_row()
            self._evaluate()
            progress.epoch = Sums()
            epoch = progress.step // self._steps_per_epoch
            is_due |= rule.every_epochs is not None and epoch % rule.every_epochs == 0
        if is_due and self._saved_step != progress.step:
            self._save()

    def _evaluate(self) -> None:
        progress, started = self.progress, time.perf_counter()
        evaluated = self._evaluate_model()
        progress.take_test(evaluated.sums)
        seconds = time.perf_counter() - started
        self._recorder.evaluation(progress, self._split, evaluated.sums, evaluated.scores, seconds)
        self._recorder.dice(progress.step, evaluated.patients)
        if self._is_complete and evaluated.confusion is not None:
            self._recorder.confusion(progress.step, self._split, evaluated.confusion)
        log.info(
            "epoch %d/%d: loss %.4f, accuracy %.4f; evaluation %.4f, %.4f; %.1f s trained",
            progress.step // self._steps_per_epoch,
            self._config.epochs,
            progress.epoch.mean_loss,
            progress.epoch.accuracy,
            progress.test.mean_loss,
            progress.test.accuracy,
            progress.train_s,
        )

    def _save(self) -> None:
        step, started = self.progress.step, time.monotonic()
        self._pulse.at("checkpoint")
        if not all(bool(weight.isfinite().all()) for weight in self._served.model.parameters()):
            lr = self._config.optimizer.lr
            raise NotFiniteError(f"a weight is not finite after step {step}; lr {lr:g} may be too large")
        common = {
            "seed": self._config.seed,
            "global_batch": 0,
            "steps_per_epoch": self._steps_per_epoch,
            "progress": self.progress.state_dict(),
            "parts": self._served.state_dict(),
            "engine": self._engine.state_dict(),
            "workers": self._workers,
            "left": self._position.left,
            "lost": self._position.lost,
        }
        self._checkpoints.save(step, common, {"streams": self._position.streams})
        self._saved_step = step
        self._pulse.saved(time.monotonic() - started)

    def _await_leave(self, deadline: float) -> None:
        """Waits until every worker has left or is lost, or for a reading of ``time.monotonic``."""
        while set(self._workers) - self._gone and time.monotonic() < deadline:
            self._mind_workers()
            time.sleep(0.02)
