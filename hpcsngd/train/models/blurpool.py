"""BlurPool: a blur before every strided convolution, against aliasing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FEWEST_CHANNELS = 16


class Blurred(nn.Module):
    """A convolution whose input is blurred by the binomial 3x3 filter.

    Args:
        conv: the convolution, kept as a child of its own kind, so that preconditioners see it.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("_filter", torch.outer(line, line)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the convolution of the blurred input."""
        channels = x.shape[1]
        kernel = self.get_buffer("_filter").to(x.dtype).expand(channels, 1, 3, 3)
        result: Tensor = self.conv(nn.functional.conv2d(x, kernel, padding=1, groups=channels))
        return result


def add_blurpool(model: nn.Module) -> nn.Module:
    """Blurs the input of every convolution of stride > 1 and at least 16 input channels; returns the model.

    Source: Zhang, ICML 2019, section 3.2, in the form of the FFCV ImageNet recipes, which the published
    S-MFAC script for ResNet-18 starts from: the blur comes before the strided convolution.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(parent, Blurred) or not isinstance(child, nn.Conv2d):
                continue
            if max(child.stride) > 1 and child.in_channels >= _FEWEST_CHANNELS:
                setattr(parent, name, Blurred(child))
    return model
