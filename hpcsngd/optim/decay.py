"""Weight decay, said once for all methods.

With g the gradient of the loss, w the weights, P the preconditioner and lr the learning rate:

    coupled      P (g + weight_decay w)            ``weight_decay`` of `MFAC` and `GGT`
    decoupled    w <- (1 - lr weight_decay) w      ``weight_decay`` of `DecoupledSGD`, or of torch's AdamW
    both         both arguments; they add up

Coupled decay belongs to the loss: where curvature is large it is divided by it, like the gradient. M-FAC
preconditions it and keeps it out of the window, which stays the Fisher matrix of the loss alone. GGT stores
``g + weight_decay w``, as Adam does, since whatever lies outside its window would be divided by eps.

Decoupled decay passes by preconditioner, clipping and momentum. torch's SGD is in between: it adds
``weight_decay w`` after preconditioning and before momentum, which without momentum is decoupled decay and
with it is not. Who decays at all is a matter of parameter groups (``weight_decay`` 0 in a group; experiments
say it by ``optimizer.no_decay``); coupled decay is that of every parameter the preconditioner does not skip.

Sources: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019; EFCP (Modoranu et al.,
ICML 2024) has the three forms, its decoupled one without lr.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch


class DecoupledSGD(torch.optim.SGD):
    """SGD whose weight decay is decoupled (SGDW): ``w <- (1 - lr weight_decay) w``, then torch's step.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        weight_decay: decoupled; a group may have its own.
        options: those of torch.optim.SGD.

    Raises:
        ValueError: a negative weight decay, or what torch.optim.SGD refuses.
    """

    def __init__(self, params: Any, lr: float = 1e-3, *, weight_decay: float = 0.0, **options: Any) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, its decay under ``decoupled_weight_decay``, where torch's step leaves it alone."""
        decay = param_group.get("weight_decay", self.defaults["weight_decay"])
        if decay < 0:
            raise ValueError(f"weight_decay={decay}: must not be negative")
        super().add_param_group({**param_group, "weight_decay": 0.0, "decoupled_weight_decay": decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Decays the weights that have a gradient, then does SGD's step.

        Args:
            closure: computes gradients anew and returns the loss.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            factor = 1 - group["lr"] * group["decoupled_weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is not None and factor != 1:
                    parameter.mul_(factor)
        super().step()
        return loss
