"""Small float64 models, one per situation that a preconditioner must survive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def seeded(build: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns ``build(...)`` in float64, with the same random weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*args, **kwargs).double()


def mlp(*, bias: bool = True) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias)))


def conv_net(**conv: Any) -> nn.Module:
    """One convolution (3 -> 4 channels) with the options under test, then a Linear on the pooled pixels."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, **conv), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        )

    return seeded(build)


class Shared(nn.Module):
    """Uses one Linear twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Optional(nn.Module):
    """Has a branch that is used on request only."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 4)
        self.branch = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)
        self.use_branch = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x) + (self.branch(x) if self.use_branch else 0)
        return self.head(torch.tanh(hidden))


class InPlace(nn.Module):
    """In-place activations directly after the layers, as ResNets have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu_(self.conv(x)).mean((2, 3))
        return self.head(nn.functional.relu(self.fc(hidden), inplace=True))


class Tokens(nn.Module):
    """Linear layers on (samples, tokens, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.token(x)).mean(1))


class SharedConv(nn.Module):
    """Uses one convolution on two sizes of images in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.avg_pool2d(torch.tanh(self.inner(x)), 2)
        return self.head(torch.tanh(self.inner(hidden)).mean((2, 3)))
