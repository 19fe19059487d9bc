"""The gradients of chosen parameters as one vector, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Span:
    """Where one parameter lies in the vector."""

    name: str
    shape: torch.Size
    start: int
    stop: int


class FlatGradients:
    """Reads the gradients of parameters into one vector and writes a vector back into them.

    Args:
        named: name and parameter, in the order of the vector; all on one device.

    Raises:
        ValueError: no parameters, one that occurs twice, or several devices.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        if not named:
            raise ValueError("no parameters to precondition")
        if len({id(parameter) for _, parameter in named}) < len(named):
            raise ValueError("a parameter occurs twice")
        devices = {parameter.device for _, parameter in named}
        if len(devices) > 1:
            raise ValueError(f"parameters on several devices ({devices}); one vector needs one")
        self.parameters = tuple(parameter for _, parameter in named)
        self.device = devices.pop()
        spans, start = [], 0
        for name, parameter in named:
            spans.append(Span(name, parameter.shape, start, start + parameter.numel()))
            start += parameter.numel()
        self.spans = tuple(spans)
        self.size = start

    def read(self, dtype: torch.dtype) -> Tensor:
        """Returns the gradients, shape ``(size,)``; zeros stand for parameters without one."""
        vector = torch.zeros(self.size, dtype=dtype, device=self.device)
        for span, parameter in zip(self.spans, self.parameters, strict=True):
            if parameter.grad is not None:
                vector[span.start : span.stop] = parameter.grad.reshape(-1)
        return vector

    def read_weights(self, dtype: torch.dtype) -> Tensor:
        """Returns the parameters themselves, shape ``(size,)``."""
        return torch.cat([parameter.detach().reshape(-1).to(dtype) for parameter in self.parameters])

    def write(self, vector: Tensor) -> None:
        """Overwrites the gradients; parameters without one keep none, so that optimizers pass them over."""
        for span, parameter in zip(self.spans, self.parameters, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(vector[span.start : span.stop].view(span.shape))
