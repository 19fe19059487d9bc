"""The networks, by the names that experiments use. Input size and classes come from the data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from hpcsngd.config.catalogue import TORCHVISION_PREFIX
from hpcsngd.config.experiment import Model
from hpcsngd.errors import did_you_mean
from hpcsngd.train.data.samples import Samples
from hpcsngd.train.faults import SettingError
from hpcsngd.train.models import resnet, vgg
from hpcsngd.train.models.blurpool import add_blurpool
from hpcsngd.train.models.densenet import densenet
from hpcsngd.train.models.encoder import encoder
from hpcsngd.train.models.language import recurrent_lm, transformer_lm
from hpcsngd.train.models.mobilenet import mobilenetv2
from hpcsngd.train.models.small import cnn1, cnn2, conv3_linear, digits_cnn, lenet5, lenet5_tanh, linear
from hpcsngd.train.models.transformer import transformer
from hpcsngd.train.models.unet import unet
from hpcsngd.train.models.zoo import from_torchvision

MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits-cnn": digits_cnn,
    "3c1f": conv3_linear,
    "lenet5": lenet5,
    "lenet5-tanh": lenet5_tanh,
    "cnn1": cnn1,
    "cnn2": cnn2,
    "linear": linear,
    "resnet20": resnet.resnet20,
    "resnet32": resnet.resnet32,
    "resnet44": resnet.resnet44,
    "resnet56": resnet.resnet56,
    "resnet110": resnet.resnet110,
    "resnet18-cifar": resnet.resnet18_cifar,
    "wrn28-10": resnet.wrn28_10,
    "wrn28-20": resnet.wrn28_20,
    "wrn22-2": resnet.wrn22_2,
    "wrn22-4": resnet.wrn22_4,
    "wrn40-2": resnet.wrn40_2,
    "wrn40-4": resnet.wrn40_4,
    "vgg16": vgg.vgg16,
    "vgg19": vgg.vgg19,
    "densenet": densenet,
    "mobilenetv2": mobilenetv2,
    "unet": unet,
}


TEXT_MODELS: dict[str, Callable[..., nn.Module]] = {
    "transformer": transformer,
    "lstm-lm": partial(recurrent_lm, "lstm"),
    "gru-lm": partial(recurrent_lm, "gru"),
    "transformer-lm": transformer_lm,
    "encoder": encoder,
}


def build_for(samples: Samples, num_classes: int, config: Model) -> nn.Module:
    """Returns an experiment's network for its data, with freshly drawn weights (torch's global stream).

    Args:
        samples: the training set, which knows the size of its images or its vocabulary.
        num_classes: size of the output, where the data have classes.
        config: the experiment's ``model``.

    Raises:
        SettingError: an unknown name, or arguments that the network does not take.
    """
    if config.name not in TEXT_MODELS:
        shape = (samples.channels, samples.size)
        return build_model(config.name, num_classes, *shape, blurpool=config.blurpool, **config.args)
    if config.blurpool:
        raise SettingError(f"model {config.name} has no convolutions for blurpool")
    try:
        return TEXT_MODELS[config.name](samples, num_classes, **config.args)
    except TypeError as error:
        raise SettingError(f"model {config.name} with args {config.args}: {error}") from error


def build_model(
    name: str,
    num_classes: int,
    in_channels: int,
    image_size: int,
    *,
    blurpool: bool = False,
    **arguments: Any,
) -> nn.Module:
    """Returns a network with freshly drawn weights (torch's global stream).

    Args:
        name: key of `MODELS`, or ``torchvision/<name>``.
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels.
        blurpool: whether strided convolutions see a blurred input.
        arguments: the experiment's ``model.args``.

    Raises:
        SettingError: an unknown name, or arguments that the network does not take.
    """
    try:
        model = _build(name, num_classes, in_channels, image_size, arguments)
    except TypeError as error:
        raise SettingError(f"model {name} with args {arguments}: {error}") from error
    return add_blurpool(model) if blurpool else model


def parameter_count(model: nn.Module) -> int:
    """Returns the number of trainable numbers in a model."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _build(
    name: str, num_classes: int, in_channels: int, image_size: int, arguments: dict[str, Any]
) -> nn.Module:
    if name.startswith(TORCHVISION_PREFIX):
        return from_torchvision(name[len(TORCHVISION_PREFIX) :], num_classes, in_channels, arguments)
    if name not in MODELS:
        raise SettingError(f"unknown model {name!r}{did_you_mean(name, MODELS)} known: {', '.join(MODELS)}")
    return MODELS[name](num_classes, in_channels, image_size, **arguments)
