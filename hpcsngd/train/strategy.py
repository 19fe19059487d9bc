"""How ranks work together on one step. The loop takes a strategy and has no branches on it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcsngd import dist


class Strategy(Protocol):
    """What the loop asks of a strategy."""

    def prepare(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Returns the module whose forward and backward pass train ``model`` on all ranks."""

    def settle(self, rehearsal: Callable[[], Tensor]) -> None:
        """Does whatever the first step would otherwise do differently from all later ones."""

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Returns the context of a micro-batch's forward and backward pass; a step's last one joins ranks."""

    def join_buffers(self) -> None:
        """Makes buffers (batch norm's running statistics) equal on all ranks: before evaluating or saving."""

    def loss_factor(self, samples: int) -> float:
        """Returns the factor for a sum of losses that makes gradients the mean over a step of ``samples``."""


class DDPStrategy:
    """Synchronous data parallelism by torch's DistributedDataParallel; on one rank the model itself.

    Buffers: rank 0's are broadcast before each synchronized forward pass. That is torch's default and left at
    that, because the argument changed its name. So batch norm computes with the statistics of each rank's own
    micro-batch, and its running statistics are those of rank 0.

    Order: DDP is wrapped around the bare model and rehearsed *before* a preconditioner attaches its hooks, so
    that these never see the rehearsal.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._wrapped: DistributedDataParallel | None = None
        self._gpus: list[torch.device] = []

    def prepare(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Returns the model, wrapped if there are other ranks."""
        self._model = model
        if dist.world_size() == 1:
            return model
        self._gpus = [device] if device.type == "cuda" else []
        self._wrapped = DistributedDataParallel(model, device_ids=self._gpus or None)
        return self._wrapped

    def settle(self, rehearsal: Callable[[], Tensor]) -> None:
        """Runs one throw-away forward and backward pass, so that DDP's buckets are final before step 1.

        DDP lays its buckets out anew after the first backward pass, and from three ranks on the place of a
        number in a bucket decides in which order the ranks are summed. Without this, the first step after a
        resume would differ in its last bits from the same step of a run that was never interrupted.

        Args:
            rehearsal: a forward pass that returns a scalar; its traces in buffers and random streams are
                removed here.
        """
        if self._wrapped is None:
            return
        buffers = [buffer.clone() for buffer in self._wrapped.buffers()]
        with torch.random.fork_rng(self._gpus):
            rehearsal().backward()  # type: ignore[no-untyped-call]
        self._wrapped.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in zip(self._wrapped.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Returns DDP's ``no_sync`` except for the last micro-batch."""
        if self._wrapped is None or is_last:
            return nullcontext()
        context: AbstractContextManager[None] = self._wrapped.no_sync()
        return context

    def join_buffers(self) -> None:
        """Overwrites every rank's buffers by rank 0's."""
        if self._model is not None:
            for buffer in self._model.buffers():
                dist.broadcast(buffer)

    def loss_factor(self, samples: int) -> float:
        """Returns ranks / samples: DDP averages over ranks, so sums of own losses become the exact mean."""
        return dist.world_size() / samples


# full_batch differs in what a step is made of, which the sampler knows, not in how ranks work together
STRATEGIES: dict[str, Callable[[], Strategy]] = {"ddp": DDPStrategy, "full_batch": DDPStrategy}
