"""Residual networks for 32x32 images: those of He et al., and wide ones."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from hpcsngd.train.faults import SettingError
from hpcsngd.train.models.draw import draw_he

Shortcut = Literal["pad", "project"]


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., CVPR 2016, section 3.3).

    Args:
        d_in: channels of the input.
        d_out: channels of the output.
        stride: of the first convolution.
        shortcut: where the shape changes, fill up with zeros (their option A) or project (option B).
        bias: whether convolutions have one.
    """

    def __init__(
        self, d_in: int, d_out: int, stride: int, *, shortcut: Shortcut = "pad", bias: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride, padding=1, bias=bias)
        self.norm1 = nn.BatchNorm2d(d_out)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, padding=1, bias=bias)
        self.norm2 = nn.BatchNorm2d(d_out)
        self.stride, self.more = stride, d_out - d_in
        self.project: nn.Module | None = None
        if shortcut == "project" and (stride > 1 or d_in != d_out):
            self.project = nn.Sequential(nn.Conv2d(d_in, d_out, 1, stride, bias=bias), nn.BatchNorm2d(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output."""
        hidden = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(hidden)) + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.project is not None:
            projected: Tensor = self.project(x)
            return projected
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))


def cifar_resnet(
    blocks_each: int,
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    width: int = 16,
    bias: bool = False,
    shortcut: Shortcut = "pad",
) -> nn.Module:
    """Returns the residual network of ``6 blocks_each + 2`` layers for small images.

    Source: He et al., CVPR 2016, section 4.2; weights as He et al., ICCV 2015 draw them.

    Args:
        blocks_each: blocks of each of the three widths.
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; any.
        width: channels of the first third; the others have twice and four times as many.
        bias: whether convolutions have one. The paper has none; the published code of HyLo has.
        shortcut: ``"pad"``, the paper's option A, without parameters; or ``"project"``, option B.

    Raises:
        SettingError: another shortcut.
    """
    if shortcut not in get_args(Shortcut):
        raise SettingError(f"shortcut {shortcut!r}; allowed: {', '.join(get_args(Shortcut))}")
    blocks: list[nn.Module] = []
    d_in = width
    for group in range(3):
        for index in range(blocks_each):
            d_out, stride = width * 2**group, 2 if group and index == 0 else 1
            blocks.append(Block(d_in, d_out, stride, shortcut=shortcut, bias=bias))
            d_in = d_out
    stem = [nn.Conv2d(in_channels, width, 3, padding=1, bias=bias), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d_in, num_classes)]
    return draw_he(nn.Sequential(*stem, *blocks, *head))


resnet20 = partial(cifar_resnet, 3)
resnet32 = partial(cifar_resnet, 5)
resnet44 = partial(cifar_resnet, 7)
resnet56 = partial(cifar_resnet, 9)
resnet110 = partial(cifar_resnet, 18)


def resnet18_cifar(num_classes: int, in_channels: int, image_size: int, *, width: int = 64) -> nn.Module:
    """Returns ResNet-18 with a 3x3 stem and no first pool, for 32x32 images.

    Source: He et al., CVPR 2016, table 1, option B; 11,173,962 parameters for CIFAR-10, as in the OptML study
    of asynchronous SGD (2023).

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; any.
        width: channels of the first quarter; each next one has twice as many.
    """
    blocks: list[nn.Module] = []
    d_in = width
    for group in range(4):
        d_out = width * 2**group
        blocks += [
            Block(d_in, d_out, 2 if group else 1, shortcut="project"),
            Block(d_out, d_out, 1, shortcut="project"),
        ]
        d_in = d_out
    stem = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d_in, num_classes)]
    return draw_he(nn.Sequential(*stem, *blocks, *head))


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, beside a shortcut (Zagoruyko et al., figure 1).

    Args:
        d_in: channels of the input.
        d_out: channels of the output.
        stride: of the first convolution.
        dropout: share of the entries that are dropped between the convolutions.
    """

    def __init__(self, d_in: int, d_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(d_in)
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(d_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, padding=1, bias=False)
        is_same = d_in == d_out and stride == 1
        self.project = None if is_same else nn.Conv2d(d_in, d_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output."""
        active = torch.relu(self.norm1(x))
        hidden = self.dropout(torch.relu(self.norm2(self.conv1(active))))
        shortcut: Tensor = x if self.project is None else self.project(active)
        result: Tensor = self.conv2(hidden) + shortcut
        return result


def wide_resnet(
    depth: int,
    widening: int,
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    width: int = 16,
    dropout: float = 0.0,
) -> nn.Module:
    """Returns the wide residual network WRN-depth-widening for small images.

    Source: Zagoruyko and Komodakis, BMVC 2016, table 1.

    Args:
        depth: number of convolutions, 4 more than a multiple of 6.
        widening: their k.
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; any.
        width: channels of the stem; the thirds have ``widening`` times 1, 2 and 4 as many.
        dropout: share of the entries that are dropped inside the blocks.
    """
    blocks: list[nn.Module] = []
    d_in = width
    for group in range(3):
        for index in range((depth - 4) // 6):
            d_out, stride = width * widening * 2**group, 2 if group and index == 0 else 1
            blocks.append(WideBlock(d_in, d_out, stride, dropout))
            d_in = d_out
    stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    pool = [nn.BatchNorm2d(d_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return draw_he(nn.Sequential(stem, *blocks, *pool, nn.Linear(d_in, num_classes)))


wrn28_10 = partial(wide_resnet, 28, 10)
wrn28_20 = partial(wide_resnet, 28, 20)
wrn22_2 = partial(wide_resnet, 22, 2)
wrn22_4 = partial(wide_resnet, 22, 4)
wrn40_2 = partial(wide_resnet, 40, 2)
wrn40_4 = partial(wide_resnet, 40, 4)
