"""VGG with batch norm for 32x32 images."""

from __future__ import annotations

from functools import partial

from torch import nn

from hpcsngd.train.faults import SettingError
from hpcsngd.train.models.draw import draw_he

# convolutions of each stage, and their channels in units of the first stage's
_MULTIPLES = (1, 2, 4, 8, 8)
_SMALLEST = 2 ** len(_MULTIPLES)


def vgg(
    convolutions: tuple[int, ...], num_classes: int, in_channels: int, image_size: int, *, width: int = 64
) -> nn.Module:
    """Returns a VGG network: stages of 3x3 convolutions with batch norm, a pool after each, one linear layer.

    Source: Simonyan and Zisserman, ICLR 2015, table 1 (D and E), in the form that is usual for CIFAR: batch
    norm, and one linear layer in place of three. VGG-16 has 14,728,266 parameters for 10 classes, VGG-19 has
    20,040,522.

    Args:
        convolutions: number in each of the five stages.
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; at least 32.
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.

    Raises:
        SettingError: the images are too small for five pools.
    """
    if image_size < _SMALLEST:
        raise SettingError(f"VGG halves images five times: {image_size} pixels are under {_SMALLEST}")
    layers: list[nn.Module] = []
    d_in = in_channels
    for count, multiple in zip(convolutions, _MULTIPLES, strict=True):
        for _ in range(count):
            d_out = width * multiple
            layers += [nn.Conv2d(d_in, d_out, 3, padding=1), nn.BatchNorm2d(d_out), nn.ReLU()]
            d_in = d_out
        layers.append(nn.MaxPool2d(2))
    head = [nn.Flatten(), nn.Linear(d_in * (image_size // _SMALLEST) ** 2, num_classes)]
    return draw_he(nn.Sequential(*layers, *head))


vgg16 = partial(vgg, (2, 2, 3, 3, 3))
vgg19 = partial(vgg, (2, 2, 4, 4, 4))
