"""MobileNetV2 for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn

from hpcsngd.train.models.draw import draw_he

# expansion, channels at stem width 32, blocks, stride of the first block (Sandler et al., table 2). For small
# images the stem and the second row do not halve them.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM, _LAST = 32, 1280


class InvertedBlock(nn.Module):
    """1x1 to more channels, 3x3 on each of them, 1x1 back; added to the input where shapes allow.

    Args:
        d_in: channels of the input.
        d_out: channels of the output.
        stride: of the 3x3 convolution.
        expansion: factor of the channels inside.
        dense: let the 3x3 convolution mix channels.
    """

    def __init__(self, d_in: int, d_out: int, stride: int, *, expansion: int, dense: bool) -> None:
        super().__init__()
        inner = d_in * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [nn.Conv2d(d_in, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()]
        groups = 1 if dense else inner
        layers += [
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, d_out, 1, bias=False),
            nn.BatchNorm2d(d_out),
        ]
        self.layers = nn.Sequential(*layers)
        self.is_residual = stride == 1 and d_in == d_out

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output."""
        result: Tensor = self.layers(x)
        return result + x if self.is_residual else result


def mobilenetv2(
    num_classes: int, in_channels: int, image_size: int, *, width: int = _STEM, dense: bool = False
) -> nn.Module:
    """Returns MobileNetV2 for small images; 2,236,682 parameters for 10 classes.

    Source: Sandler et al., CVPR 2018, table 2, with fewer strides.

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; any.
        width: channels of the stem; all others are in proportion.
        dense: the variant of HyLo's published code: 3x3 convolutions mix channels, which its optimizer needs,
            and expansions are half as large. Ours cover convolutions in groups as well.
    """
    d_in = width
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, d_in, 3, padding=1, bias=False),
        nn.BatchNorm2d(d_in),
        nn.ReLU6(),
    ]
    for expansion, channels, blocks, stride in _STAGES:
        factor = max(1, expansion // 2) if dense else expansion
        for index in range(blocks):
            d_out = max(1, channels * width // _STEM)
            layers.append(InvertedBlock(d_in, d_out, 1 if index else stride, expansion=factor, dense=dense))
            d_in = d_out
    last = _LAST * width // _STEM
    layers += [nn.Conv2d(d_in, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, num_classes)]
    return draw_he(nn.Sequential(*layers, *head))
