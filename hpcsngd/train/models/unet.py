"""U-Net for segmentation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpcsngd.train.faults import SettingError

_LEVELS = 4


class UNet(nn.Module):
    """U-Net with batch norm: four halvings, as many transposed convolutions back, and links across.

    Source: Ronneberger et al., MICCAI 2015, figure 1, in the form of Buda et al., Computers in Biology and
    Medicine 109 (2019), section 3.2, which HyLo trains: 32 features, padding, batch norm.

    Args:
        classes: channels of the output, logits for each pixel.
        in_channels: channels of the images.
        width: features of the first level; each next one has twice as many.
    """

    def __init__(self, classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        features = [width * 2**level for level in range(_LEVELS + 1)]
        self.down = nn.ModuleList(
            _pair(d_in, d_out) for d_in, d_out in zip([in_channels, *features], features[:-1], strict=False)
        )
        self.bottom = _pair(features[-2], features[-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * f, f, 2, 2) for f in features[-2::-1])
        self.join = nn.ModuleList(_pair(2 * f, f) for f in features[-2::-1])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits, ``(n, classes, size, size)``.

        The published network ends in a sigmoid; here it belongs to the loss, where it is computed in full
        precision.
        """
        links: list[Tensor] = []
        for pair in self.down:
            x = pair(x)
            links.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, pair in zip(self.up, self.join, strict=True):
            x = pair(torch.cat([up(x), links.pop()], dim=1))
        result: Tensor = self.head(x)
        return result


def unet(num_classes: int, in_channels: int, image_size: int, *, width: int = 32) -> nn.Module:
    """Returns U-Net; 7,763,041 parameters for one class and three channels.

    Args:
        num_classes: channels of the output; 1 for a mask.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; a multiple of 16.
        width: features of the first level.

    Raises:
        SettingError: images that cannot be halved four times.
    """
    if image_size % 2**_LEVELS:
        raise SettingError(f"U-Net needs images of a multiple of {2**_LEVELS} pixels, not {image_size}")
    return UNet(num_classes, in_channels, width)


def _pair(d_in: int, d_out: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (d_in, d_out):
        layers += [nn.Conv2d(channels, d_out, 3, padding=1, bias=False), nn.BatchNorm2d(d_out), nn.ReLU()]
    return nn.Sequential(*layers)
