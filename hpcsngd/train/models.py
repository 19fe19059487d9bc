"""The networks, by the names that experiments use. Input size and classes come from the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hpcsngd.config.catalogue import TORCHVISION_PREFIX
from hpcsngd.errors import did_you_mean
from hpcsngd.train import vision
from hpcsngd.train.faults import SettingError


def digits_cnn(num_classes: int, in_channels: int, image_size: int, *, width: int = 16) -> nn.Module:
    """Returns two 3x3 convolutions and two linear layers.

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; at least 2.
        width: channels of the first convolution; the second has twice as many.
    """
    side = image_size // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * side * side, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def conv3_linear(num_classes: int, in_channels: int, image_size: int, *, width: int = 128) -> nn.Module:
    """Returns HyLo's 3C1F: three 3x3 convolutions, max-pool 3, linear 500, linear classes.

    Source: the published code of Mu et al., "HyLo", SC 2022. For 28x28 images the first linear layer has
    9*9*128 inputs.

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; at least 3.
        width: channels of every convolution.
    """
    side = image_size // 3
    convolutions: list[nn.Module] = []
    for channels in (in_channels, width, width):
        convolutions += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    head = [nn.Linear(side * side * width, 500), nn.ReLU(), nn.Linear(500, num_classes)]
    return nn.Sequential(*convolutions, nn.MaxPool2d(3), nn.Flatten(), *head)


MODELS: dict[str, Callable[..., nn.Module]] = {"digits-cnn": digits_cnn, "3c1f": conv3_linear}


def build_model(
    name: str, num_classes: int, in_channels: int, image_size: int, **arguments: Any
) -> nn.Module:
    """Returns a network with freshly drawn weights (torch's global stream).

    Args:
        name: key of `MODELS`, or ``torchvision/<name>``.
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels.
        arguments: the experiment's ``model.args``.

    Raises:
        SettingError: an unknown name, or arguments that the network does not take.
    """
    try:
        if name.startswith(TORCHVISION_PREFIX):
            return _from_torchvision(name[len(TORCHVISION_PREFIX) :], num_classes, in_channels, arguments)
        if name not in MODELS:
            raise SettingError(
                f"unknown model {name!r}{did_you_mean(name, MODELS)} known: {', '.join(MODELS)}"
            )
        return MODELS[name](num_classes, in_channels, image_size, **arguments)
    except TypeError as error:
        raise SettingError(f"model {name} with args {arguments}: {error}") from error


def parameter_count(model: nn.Module) -> int:
    """Returns the number of trainable numbers in a model."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _from_torchvision(name: str, num_classes: int, in_channels: int, arguments: dict[str, Any]) -> nn.Module:
    models = vision.load().models
    known = models.list_models(module=models)
    if name not in known:
        raise SettingError(f"torchvision has no classification model {name!r}{did_you_mean(name, known)}")
    model: nn.Module = models.get_model(name, num_classes=num_classes, **arguments)
    if in_channels == 1:
        model.register_forward_pre_hook(_grey_to_color)
    elif in_channels != 3:
        raise SettingError(f"{TORCHVISION_PREFIX}{name} takes 1 or 3 channels; the data have {in_channels}")
    return model


def _grey_to_color(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Repeats the one channel of grey images: torchvision's networks begin with three."""
    return (torch.cat([inputs[0]] * 3, dim=1), *inputs[1:])
