"""The densely connected network with bottlenecks, for 32x32 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpcsngd.train.faults import SettingError
from hpcsngd.train.models.draw import draw_he

_BLOCKS = 3


class Layer(nn.Module):
    """Adds ``growth`` channels: 1x1 to ``4 growth``, then 3x3 to ``growth``, each after norm and ReLU.

    Args:
        d_in: channels of the input.
        growth: channels that are added.
    """

    def __init__(self, d_in: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(d_in)
        self.conv1 = nn.Conv2d(d_in, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the input and the new channels."""
        hidden = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(hidden)))], dim=1)


def densenet(
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    depth: int = 19,
    width: int = 100,
    compression: float = 0.5,
) -> nn.Module:
    """Returns DenseNet-BC for small images; by default HyLo's, of depth 19 and growth 100.

    Source: Huang et al., CVPR 2017, section 3 (BC: bottlenecks and compression); the size is that of the
    published code of HyLo. ``depth=100, width=12`` is the paper's smallest, of 769,162 parameters.

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; at least 4.
        depth: layers; each of the three blocks has ``(depth - 4) // 6`` pairs of them.
        width: the growth rate k, channels that each pair adds; the stem has twice as many.
        compression: share of the channels that is left between blocks.

    Raises:
        SettingError: a depth without any pair.
    """
    pairs = (depth - 4) // 6
    if pairs < 1:
        raise SettingError(f"densenet of depth {depth}: at least 10")
    channels = 2 * width
    layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)]
    for block in range(_BLOCKS):
        if block:
            kept = int(channels * compression)
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, kept, 1, bias=False)]
            layers.append(nn.AvgPool2d(2))
            channels = kept
        for _ in range(pairs):
            layers.append(Layer(channels, width))
            channels += width
    head = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return draw_he(nn.Sequential(*layers, *head, nn.Linear(channels, num_classes)))
