"""torchvision's classification networks by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hpcsngd.config.catalogue import TORCHVISION_PREFIX
from hpcsngd.errors import did_you_mean
from hpcsngd.train import vision
from hpcsngd.train.faults import SettingError

# These would return a second head's output in training, and warn about their own initialization.
_ONE_OUTPUT = {"aux_logits": False, "init_weights": True}
_DEFAULTS: dict[str, dict[str, Any]] = {"googlenet": _ONE_OUTPUT, "inception_v3": _ONE_OUTPUT}


def from_torchvision(name: str, num_classes: int, in_channels: int, arguments: dict[str, Any]) -> nn.Module:
    """Returns a network of torchvision with fresh weights; grey images are repeated to three channels.

    Inception v3 and GoogLeNet come without their auxiliary heads, so that they have one output in training
    as well.

    Raises:
        SettingError: an unknown name, or images of another number of channels.
    """
    models = vision.load().models
    known = models.list_models(module=models)
    if name not in known:
        raise SettingError(f"torchvision has no classification model {name!r}{did_you_mean(name, known)}")
    model: nn.Module = models.get_model(name, num_classes=num_classes, **_DEFAULTS.get(name, {}) | arguments)
    if in_channels == 1:
        model.register_forward_pre_hook(_grey_to_color)
    elif in_channels != 3:
        raise SettingError(f"{TORCHVISION_PREFIX}{name} takes 1 or 3 channels; the data have {in_channels}")
    return model


def _grey_to_color(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Repeats the one channel of grey images: torchvision's networks begin with three."""
    return (torch.cat([inputs[0]] * 3, dim=1), *inputs[1:])
