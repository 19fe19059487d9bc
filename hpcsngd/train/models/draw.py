"""How the weights of our networks are drawn where torch's default is not what a paper uses."""

from __future__ import annotations

from torch import nn


def draw_he(model: nn.Module) -> nn.Module:
    """Draws the weights of convolutions and linear layers anew, as He et al., ICCV 2015, equation 10.

    Normal with variance 2 / inputs; biases are zero. Returns the model.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model
