"""What M-FAC and GGT share: a window of gradients, what goes into it, and what is done with the result."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpcsngd.optim.base import Preconditioner, Schedule, value_at
from hpcsngd.optim.chosen import Parameters, choose_parameters
from hpcsngd.optim.clipping import Clip
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.covering import Skip
from hpcsngd.optim.flat import FlatGradients
from hpcsngd.optim.history import History
from hpcsngd.optim.records import Communication, Fallback, LayerCheck, Memory, PhaseTime, StepRecord
from hpcsngd.optim.shard import Shard, cut_evenly
from hpcsngd.optim.stopwatch import Stopwatch
from hpcsngd.optim.store import joined
from hpcsngd.optim.stored import StoreRule
from hpcsngd.optim.window import Ring

logger = logging.getLogger(__name__)

ALL = "all parameters"
"""What stands for the layer in records: these methods see one vector."""


class Windowed(Preconditioner):
    """The step, the state and the records of a method that keeps a window of gradients.

    Args:
        parameters: see `choose_parameters`.
        capacity: gradients in the window.
        rule: how gradients are stored.
        dtype: of window and products; None for the parameters' own, at least float32.
        skip: see `choose_parameters`.
        scale: of a gradient as it is stored, such as the learning rate.
        weight_decay: coupled, see `hpcsngd.optim.decay`.
        clip: limits the result.
        profile: whether to time the phases.

    Raises:
        ValueError: an argument out of its range, named with what is allowed.
    """

    format: str

    def __init__(
        self,
        parameters: Parameters,
        capacity: int,
        rule: StoreRule,
        *,
        dtype: torch.dtype | None,
        skip: Sequence[Skip],
        scale: Schedule,
        weight_decay: float,
        clip: Clip,
        profile: bool,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"num_grads={capacity}: must be at least 1")
        if weight_decay < 0:
            raise ValueError(f"weight_decay={weight_decay}: must not be negative")
        named, self.skipped = choose_parameters(parameters, skip)
        self._flat = FlatGradients(named)
        self._dtype = dtype or torch.promote_types(named[0][1].dtype, torch.float32)
        self._communicator = Communicator()
        cuts = cut_evenly(rule.boundaries(self._flat.spans), self._communicator.world_size)
        self._shard = Shard(self._communicator, cuts)
        self._store = rule.build(
            capacity,
            self._flat.spans,
            self._shard.start,
            self._shard.stop,
            dtype=self._dtype,
            device=self._flat.device,
        )
        self._ring = Ring(capacity, self._flat.device)
        self._scale, self._weight_decay, self._clip = scale, weight_decay, clip
        self._stopwatch = Stopwatch(profile)
        self._step = self._failures = self._jittered = 0
        self._is_closed = False
        self._record = StepRecord(0, refresh=False, damping=math.nan, failures=0)

    @property
    def capacity(self) -> int:
        """Returns how many gradients the window holds."""
        return self._ring.capacity

    @property
    def history(self) -> History:
        """Returns this rank's part of the window."""
        return self._store.history

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Returns the parameters that are preconditioned, in the order of the vector."""
        return self._flat.parameters

    def step(self, sample_scale: float | None = None, grad_scale: float = 1.0) -> None:
        """Stores the gradient, then overwrites it by the preconditioned one.

        A gradient that is not finite is neither stored nor changed: it is counted as a failure, and a
        gradient scaler or the training loop will see it.

        Args:
            sample_scale: not needed: nothing is captured per sample.
            grad_scale: not needed: ``.grad`` is unscaled by now.
        """
        if self._is_closed:
            raise RuntimeError("this preconditioner is closed")
        phase = self._stopwatch.phase
        with phase("capture"):
            gradient = self._read()
        failure, result = "the gradient is not finite", None
        # a sum that is finite is of finite numbers, and much faster to ask
        if bool(gradient.sum().isfinite()) or bool(gradient.isfinite().all()):
            with phase("compress"):
                slot = self._ring.advance()
                scale = value_at(self._scale, self._step)
                self._store.add(slot, self._shard.cut(gradient), scale)
            with phase("products"):
                row = self._store.history.inner(slot, self._ring.count)
                self._ring.set_row(self._shard.total(row))
            failure = "the Gram matrix could not be factorized"
            result = self._direction(gradient)
        if result is None:
            self._failures += 1
            logger.warning("step %d: %s; the plain gradient is used", self._step + 1, failure)
        else:
            with phase("precondition"):
                self._flat.write(self._clip(result))
        self._step += 1
        self._record = self._make_record("" if result is not None else failure)

    def _read(self) -> Tensor:
        """Returns the gradient that is stored and preconditioned, shape ``(d,)``."""
        return self._flat.read(self._dtype)

    def _products(self, vector: Tensor) -> Tensor:
        """Returns ``G x`` of a whole vector, in float64."""
        with self._stopwatch.phase("products"):
            partial = self._store.history.products(self._shard.cut(vector), self._ring.count)
            return self._shard.total(partial)

    def _combine(self, coefficients: Tensor) -> Tensor:
        """Returns ``G^T c`` as a whole vector."""
        with self._stopwatch.phase("precondition"):
            part = self._store.history.combine(coefficients)
        with self._stopwatch.phase("broadcast"):
            return self._shard.join(part)

    def _row(self, slot: int) -> Tensor:
        """Returns a stored gradient as a whole vector."""
        return self._shard.join(self._store.history.row(slot))

    @abstractmethod
    def _direction(self, gradient: Tensor) -> Tensor | None:
        """Returns the preconditioned gradient, shape ``(d,)``; None if the window could not be solved."""

    @abstractmethod
    def _damping(self) -> float:
        """Returns what is added to the curvature in the coming step."""

    def _held(self) -> dict[str, int]:
        """Returns the bytes held, by kind."""
        return self._store.memory() | {"gram": self._ring.memory_bytes()}

    def _make_record(self, failure: str) -> StepRecord:
        step = self._step
        phases = tuple(PhaseTime(step, name, seconds) for name, seconds in self._stopwatch.take().items())
        held = self._held()
        traffic = self._communicator.take_traffic().items()
        return StepRecord(
            step,
            refresh=not failure,
            damping=self._damping(),
            failures=self._failures,
            jittered=self._jittered,
            phases=phases,
            communication=tuple(Communication(step, *which, *amount) for which, amount in traffic),
            memory=tuple(Memory(step, kind, size) for kind, size in held.items()),
            fallbacks=(Fallback(step, ALL, failure),) if failure else (),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns window, Gram matrix, error and position, of all ranks together."""
        own = self._store.state_dict()
        parts = [self._communicator.object_from(rank, own) for rank in range(self._communicator.world_size)]
        return {
            "format": self.format,
            "size": self._flat.size,
            "capacity": self._ring.capacity,
            "step": self._step,
            "failures": self._failures,
            "ring": self._ring.state_dict(),
            "store": joined(parts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of `state_dict`.

        Raises:
            ValueError: it belongs to another method, window or model.
        """
        own = {"format": self.format, "size": self._flat.size, "capacity": self._ring.capacity}
        for key, value in own.items():
            if state.get(key) != value:
                raise ValueError(f"the state has {key} {state.get(key)!r}; this preconditioner has {value!r}")
        self._store.load_state_dict(state["store"])
        self._ring.load_state_dict(state["ring"])
        self._step, self._failures = int(state["step"]), int(state["failures"])

    def diagnostics(self) -> StepRecord:
        """Returns the record of the latest step."""
        return self._record

    def close(self) -> None:
        """Ends the use of this preconditioner; there are no hooks to remove."""
        self._is_closed = True

    @abstractmethod
    def _checked(self, newest: Tensor) -> tuple[float, float] | None:
        """Returns error and strength of the solution for the newest gradient, without the Gram matrix."""

    def verify(
        self,
        batch: tuple[Tensor, Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        layers: int = 8,
        max_entries: int = 2048,
        max_samples: int = 64,
    ) -> tuple[LayerCheck, ...]:
        """Checks that the solution of the latest step solves the method's own equation, on the whole vector.

        The dense matrix of d x d entries is never formed: it is applied, gradient by gradient in float64, to
        what this method returns for the newest stored gradient. The arguments are those of the contract; the
        window is made of past batches, so none of them changes the answer.

        Returns:
            One record for all parameters together, skipped while the window is empty.
        """
        if self._ring.count == 0:
            reason = "the window is empty"
            return (LayerCheck(ALL, self._flat.size, math.nan, math.nan, reason),)
        newest = self._row(self._ring.newest)
        found = self._checked(newest)
        self._communicator.take_traffic()
        if found is None:
            return (LayerCheck(ALL, self._flat.size, math.nan, math.nan, "the window cannot be solved"),)
        error, strength = found
        return (LayerCheck(ALL, self._flat.size, error, strength),)
