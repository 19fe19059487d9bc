"""The layers of a model as rows of layers.csv: what they are and how large."""

from __future__ import annotations

from torch import nn

from hpcsngd.rundir import Value

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layer_rows(model: nn.Module) -> list[dict[str, Value]]:
    """Returns one row of `hpcsngd.tables` ``layers`` per module with parameters of its own, in their order.

    A weight counts as the matrix of a linear layer, a convolution's as that of the product with its patches
    (HyLo, section 2: dimensions ``d_in`` and ``d_out``): inputs of one group times kernel size, by outputs.
    Modules that are used several times are listed once. The model's own parameters go by ``""``.
    """
    return [
        _row(name, module)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]


def _row(name: str, module: nn.Module) -> dict[str, Value]:
    weight = module.weight if isinstance(module, (nn.Linear, *_CONVOLUTIONS)) else None
    return {
        "layer": name,
        "kind": type(module).__name__,
        "d_in": 0 if weight is None else weight[0].numel(),
        "d_out": 0 if weight is None else len(weight),
        "has_bias": int(getattr(module, "bias", None) is not None),
        "parameters": sum(parameter.numel() for parameter in module.parameters(recurse=False)),
    }
