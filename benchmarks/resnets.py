"""The residual networks for 32x32 images that benchmarks train."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (He et al., CVPR 2016, option A)."""

    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(d_out)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(d_out)
        self.stride, self.more = stride, d_out - d_in

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output."""
        hidden = torch.relu(self.norm1(self.conv1(x)))
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return torch.relu(self.norm2(self.conv2(hidden)) + shortcut)


def resnet(blocks_each: int) -> nn.Module:
    """Returns the residual network of ``6 blocks_each + 2`` layers for 32x32 images and 10 classes.

    Source: He et al., CVPR 2016, section 4.2.
    """
    blocks, d_in = [], 16
    for d_out in (16, 32, 64):
        for index in range(blocks_each):
            blocks.append(Block(d_in, d_out, 2 if index == 0 and d_out > 16 else 1))
            d_in = d_out
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet20() -> nn.Module:
    """Returns ResNet-20."""
    return resnet(3)


def resnet32() -> nn.Module:
    """Returns ResNet-32."""
    return resnet(5)
