"""What every preconditioner can do, and hyper-parameters that follow the step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from hpcsngd.optim.records import LayerCheck, StepRecord

#: A hyper-parameter: a number, or a function of the preconditioner's step (0 for the first).
Schedule: TypeAlias = "float | Callable[[int], float]"


def value_at(schedule: Schedule, step: int) -> float:
    """Returns the schedule's value at ``step``."""
    return float(schedule(step)) if callable(schedule) else float(schedule)


class Preconditioner(ABC):
    """Rewrites gradients between ``loss.backward()`` and ``optimizer.step()``; owns no update of its own.

    ::

        preconditioner = HyLo(model, damping=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...
        loss.backward()
        preconditioner.step()
        optimizer.step()

    Learning rates, momentum and decoupled weight decay (`hpcsngd.optim.decay`) belong to the optimizer. Save
    state between ``step()`` and the next forward pass: what is captured in between is not part of it.

    Attributes:
        skipped: module name -> why its parameters keep their plain gradient.
    """

    skipped: Mapping[str, str]

    @abstractmethod
    def step(self, sample_scale: float | None = None, grad_scale: float = 1.0) -> None:
        """Overwrites ``.grad`` of the covered parameters by the preconditioned gradient.

        Args:
            sample_scale: captured output gradients times this are the gradients of each sample's own loss;
                default: derived from the loss reduction and the number of samples.
            grad_scale: the factor of a gradient scaler that captured output gradients still carry; ``.grad``
                must already be unscaled.
        """

    def set_progress(self, epoch: float, lr: float) -> None:  # noqa: B027 - a method may not care
        """Tells how far training is; call it before every ``step()``.

        Does nothing where no hyper-parameter follows epochs or the learning rate.

        Args:
            epoch: epochs done, with its fraction: steps done over steps per epoch.
            lr: learning rate of the coming step.
        """

    def begin_step(self, sample_scale: float | None = None, micro_batches: int = 1) -> None:  # noqa: B027
        """Tells what `step` will be given, before the first forward pass of the step.

        A method may then send what it captures while the backward pass still runs. Optional: without it, it
        sends in `step`.

        Args:
            sample_scale: the argument of the coming `step`; finite and the same on every rank.
            micro_batches: how many forward and backward passes there will be.
        """

    def before_backward(self, outputs: Tensor) -> None:  # noqa: B027 - a method may not care
        """Shows the model's outputs, after each forward pass and before its backward pass.

        Does nothing unless the curvature is made of other gradients than the loss's own.

        Args:
            outputs: of the model, with their graph, samples first.
        """

    @abstractmethod
    def verify(
        self,
        batch: tuple[Tensor, Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        layers: int = 8,
        max_entries: int = 2048,
        max_samples: int = 64,
    ) -> tuple[LayerCheck, ...]:
        """Compares this method with the dense oracle on layers of the user's own model, and prints it.

        On a copy of the model, in float64 and evaluation mode, the oracle computes each sample's gradient by
        itself, forms the curvature matrix and solves; the method runs on the same copy, with its settings and
        damping of now, in this process alone. Model, gradients, random numbers and this preconditioner stay
        as they are.

        Args:
            batch: inputs and targets, samples first.
            loss: of outputs and targets, the mean over the samples (or the sum, as in training).
            layers: how many layers to sample, evenly over those that are small enough.
            max_entries: largest layer to compare, in weight and bias entries: the matrix has their square.
            max_samples: the batch is cut to so many.

        Returns:
            One record for each covered layer; those skipped say why.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns tensors, numbers and strings (``weights_only=True`` loads them), alike on every rank.

        Every rank must call it: what only some have is exchanged.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, also on another number of ranks.

        Raises:
            ValueError: the state belongs to another method, version or model.
        """

    @abstractmethod
    def diagnostics(self) -> StepRecord:
        """Returns the record of the latest step."""

    @abstractmethod
    def close(self) -> None:
        """Removes every hook: the model is as before. Further steps raise RuntimeError."""
