"""A preconditioner and SGD in one ``torch.optim.Optimizer``: a thin face over the same core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn

from hpcsngd.optim.base import Preconditioner


class PreconditionedSGD(torch.optim.SGD):
    """SGD on preconditioned gradients; ``step()`` does both.

    ::

        optimizer = hpcsngd.optim.optimizer("hylo", model, lr=0.1, momentum=0.9, damping=0.3)
        ...
        loss.backward()
        optimizer.step()

    Weight decay is added after preconditioning, as SGD does it. ``state_dict()`` holds the preconditioner's
    too. Learning-rate schedulers work as on any optimizer; with a schedule by epochs or the hybrid method,
    call ``start_step(epoch)`` before each step.

    Args:
        model: the model, or its DistributedDataParallel wrapper. All its parameters are trained.
        preconditioner: attached to the same model.
        lr: learning rate.
        momentum: heavy-ball momentum.
        weight_decay: coupled.
        nesterov: Nesterov's form of momentum.
    """

    def __init__(
        self,
        model: nn.Module,
        preconditioner: Preconditioner,
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(
            model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
        )
        self.preconditioner = preconditioner

    def start_step(self, epoch: float) -> None:
        """Tells the preconditioner how far training is, and the learning rate of now.

        Args:
            epoch: epochs done, with its fraction.
        """
        self.preconditioner.set_progress(epoch, float(self.param_groups[0]["lr"]))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Preconditions the gradients and updates the weights.

        Args:
            closure: computes gradients anew and returns the loss.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.preconditioner.step()
        super().step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Returns SGD's state and the preconditioner's under ``preconditioner``."""
        return {**super().state_dict(), "preconditioner": self.preconditioner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a state of `state_dict`.

        Raises:
            ValueError: it is of another method or model, or has no preconditioner's state.
        """
        if "preconditioner" not in state_dict:
            raise ValueError("this state has no preconditioner; was it saved by another optimizer?")
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.preconditioner.load_state_dict(state_dict["preconditioner"])
