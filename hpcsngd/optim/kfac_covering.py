"""Decides which modules K-FAC covers, and says why it leaves the others alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from torch import nn

from hpcsngd.optim.covering import Skip, find_modules, has_trained_bias
from hpcsngd.optim.kfac_layers import CoveredLayer, Sharing
from hpcsngd.optim.kfac_matrix import MatrixLayer
from hpcsngd.optim.kfac_units import EmbeddingLayer, Norm, NormLayer
from hpcsngd.optim.layers import CoveredModule, Layer

#: torch.nn.MultiheadAttention hands its weights to one function that does everything: neither it nor the
#: module `out_proj` is called at a projection, so no hook sees what goes in and comes out.
_ATTENTION = (
    "its projections are applied inside one function of torch; as Linear layers they would be covered"
)


def find_covered(
    model: nn.Module, skip: Sequence[Skip], sharing: Sharing, largest_factor: int | None
) -> tuple[list[CoveredLayer], dict[str, str]]:
    """Returns the covered layers in module order, and why every other module with parameters is not covered.

    Args:
        model: the model, not wrapped.
        skip: as for `hpcsngd.optim.covering.find_modules`.
        sharing: see the module's docstring.
        largest_factor: layers with a factor of more rows are not covered (an output layer over a vocabulary,
            say; an embedding's diagonal does not count); None: all are.

    Raises:
        ValueError: an entry of ``skip`` matches no module, or no layer is left to cover.
    """
    kinds = (*get_args(CoveredModule), nn.Embedding, *get_args(Norm))
    modules, skipped = find_modules(model, skip, kinds)
    skipped.update(_attention(model, skipped))
    layers = []
    for name, module in modules.items():
        if isinstance(module, nn.Embedding) and (module.sparse or module.scale_grad_by_freq):
            skipped[name] = "its gradient is sparse or scaled by frequency"
            continue
        layer = _covered(name, module, sharing)
        rows = max(shape[-1] for shape in layer.factor_shapes() if len(shape) == 3)
        if largest_factor is not None and rows > largest_factor:
            skipped[name] = f"a factor of {rows} rows, more than largest_factor={largest_factor}"
        else:
            layers.append(layer)
    if not layers:
        raise ValueError(f"no layer to precondition; skipped: {skipped}")
    return layers, skipped


def _covered(name: str, module: nn.Module, sharing: Sharing) -> CoveredLayer:
    if isinstance(module, nn.Embedding):
        return EmbeddingLayer(name, module)
    if isinstance(module, Norm):
        return NormLayer(name, module, has_trained_bias(module))
    if isinstance(module, CoveredModule):
        return MatrixLayer(Layer(name, module, has_trained_bias(module)), sharing)
    raise TypeError(f"{type(module).__name__} has no factors")


def _attention(model: nn.Module, skipped: Mapping[str, str]) -> dict[str, str]:
    """Returns the reason for every attention module and its output projection, unless the user skips them."""
    names = [
        part
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for part in (name, f"{name}.out_proj" if name else "out_proj")
    ]
    return {name: _ATTENTION for name in names if "not supported" in skipped.get(name, "")}
