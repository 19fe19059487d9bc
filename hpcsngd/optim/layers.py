"""Which layers a preconditioner covers, and what their inputs and output gradients mean.

Shape contract, the same for every layer type. A layer call maps an input to an output; both carry one sample
per entry of their first dimension and may carry *positions* (tokens, pixels) in further ones. The weight is a
matrix ``(d_out, d_in)`` that is applied at each position s of sample i to an input vector ``x_is``:

    Linear   x_is = the features at a position; positions = every dimension between the first and the last
    Conv2d   x_is = the patch under the kernel, (channel, row, column) flattened; positions = output pixels

With ``g_is`` the gradient at the output, the sample's own gradient is ``sum_s g_is x_is^T``. Both functions
here reduce positions, without ever building the patches:

    input_sums     sum_s x_is          (n, d_in)
    output_sums    sum_s g_is          (n, d_out)

The ``reduce`` mode then models the sample's gradient as ``(sum_s g_is) (mean_s x_is)^T``. That is exact where
a sample has one position, and exact for the bias always.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CoveredModule = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Layer:
    """A covered layer.

    Attributes:
        name: of the module inside the model.
        module: the layer itself.
        has_bias: whether a trainable bias is the last column of the layer's matrix.
    """

    name: str
    module: CoveredModule
    has_bias: bool

    @property
    def parameters(self) -> list[Tensor]:
        """Returns the weight and, if it is covered, the bias."""
        bias = self.module.bias
        return [self.module.weight] if bias is None or not self.has_bias else [self.module.weight, bias]

    @property
    def row_sizes(self) -> tuple[int, int]:
        """Returns ``(d_in, d_out)``, the bias counted in ``d_in``."""
        weight = self.module.weight
        return weight[0].numel() + int(self.has_bias), len(weight)

    def input_sums(self, x: Tensor, output: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
        """Returns the inputs summed over the positions, ``(n, d_in)`` without bias, and their number.

        Always new memory: the caller may reuse its input buffer before the rows are read.

        Args:
            x: the call's input.
            output: the call's output (only its shape is read).
            dtype: of the result; sums are taken in it.
        """
        if isinstance(self.module, nn.Linear):
            batch = _with_positions(x)
            return batch.sum(1, dtype=dtype), batch.shape[1]
        batch = x if x.dim() == 4 else x.unsqueeze(0)
        pixels = (output.shape[-2], output.shape[-1])
        return patch_sums(batch, self.module, pixels, dtype), pixels[0] * pixels[1]

    def output_sums(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the output gradient summed over the positions, ``(n, d_out)``."""
        if isinstance(self.module, nn.Linear):
            return _with_positions(grad).sum(1, dtype=dtype)
        batch = grad if grad.dim() == 4 else grad.unsqueeze(0)
        return batch.sum((2, 3), dtype=dtype)


def _with_positions(x: Tensor) -> Tensor:
    """Returns ``(n, positions, d)`` of ``(n, ..., d)``; a vector is one sample with one position."""
    batch = x if x.dim() > 1 else x.unsqueeze(0)
    return batch.unsqueeze(1).flatten(1, -2)


def patch_sums(x: Tensor, conv: nn.Conv2d, pixels: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Returns the sum of all patches that ``conv`` reads, ``(n, channels * kernel rows * kernel columns)``.

    Equals ``unfold`` summed over the output pixels without building the patches: what a kernel tap visits is
    a strided box of the image, so the image is summed once per kernel row, and what is left per column.

    Args:
        x: shape ``(n, channels, rows, columns)``.
        conv: kernel size, stride, padding (zeros) and dilation are read from it.
        pixels: rows and columns of the convolution's output.
        dtype: of the sums and the result.
    """
    row_taps, column_taps = (_visited(conv, d, x.shape[2 + d], pixels[d]) for d in range(2))
    by_row = torch.stack([x[:, :, rows].sum(2, dtype=dtype) for rows in row_taps], 2)
    return torch.stack([by_row[..., columns].sum(3) for columns in column_taps], 3).flatten(1)


def _visited(conv: nn.Conv2d, dimension: int, size: int, pixels: int) -> list[slice]:
    """Returns for each kernel tap along ``dimension`` the entries inside the image that it visits."""
    stride, dilation = conv.stride[dimension], conv.dilation[dimension]
    visited = []
    for tap in range(conv.kernel_size[dimension]):
        offset = tap * dilation - _before(conv, dimension)
        # Output pixel o reads entry offset + o * stride: the first and the last o that stay inside.
        first, last = max(0, -(offset // stride)), min(pixels - 1, (size - 1 - offset) // stride)
        inside = slice(offset + first * stride, offset + last * stride + 1, stride)
        visited.append(inside if first <= last else slice(0))
    return visited


def _before(conv: nn.Conv2d, dimension: int) -> int:
    """Returns the number of zeros in front; ``"same"`` puts the odd one behind."""
    if isinstance(conv.padding, str):
        total = conv.dilation[dimension] * (conv.kernel_size[dimension] - 1)
        return total // 2 if conv.padding == "same" else 0
    return conv.padding[dimension]


def find_layers(model: nn.Module, skip: Sequence[str] = ()) -> tuple[list[Layer], dict[str, str]]:
    """Returns the covered layers in module order, and for every other module with parameters why it is not.

    Args:
        model: the model, not wrapped.
        skip: regular expressions; a module whose name matches one anywhere is not covered.

    Raises:
        ValueError: an expression matches no module, or no layer is left to cover.
    """
    modules = dict(model.named_modules())
    _check_expressions(skip, modules)
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    layers, skipped = [], {}
    for name, module in modules.items():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        reason = _reason_to_skip(name, module, skip, owners)
        if reason is None and isinstance(module, CoveredModule):
            bias = module.bias
            layers.append(Layer(name, module, bias is not None and bias.requires_grad))
        else:
            skipped[name] = reason or "not supported"
    if not layers:
        raise ValueError(f"no layer to precondition; skipped: {skipped}")
    return layers, skipped


def _check_expressions(skip: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    for expression in skip:
        if not any(re.search(expression, name) for name in names):
            raise ValueError(
                f"skip={expression!r} matches no module; modules: {', '.join(filter(None, names))}"
            )


def _reason_to_skip(
    name: str, module: nn.Module, skip: Sequence[str], owners: dict[int, list[str]]
) -> str | None:
    """Returns why ``module`` is left to the base optimizer; None if it is covered."""
    # A subclass may compute something else in its forward (or never be called, as inside attention).
    if type(module) is not nn.Linear and type(module) is not nn.Conv2d:
        return f"{type(module).__name__} is not supported"
    matching = [expression for expression in skip if re.search(expression, name)]
    own = dict(module.named_parameters(recurse=False))
    others = [owner for parameter in own.values() for owner in owners[id(parameter)] if owner != name]
    groups, mode = getattr(module, "groups", 1), getattr(module, "padding_mode", "zeros")
    reasons = {
        f"matches skip={matching[:1]}": bool(matching),
        "its weight is computed from other parameters": "weight" not in own,
        "frozen weight": not module.weight.requires_grad,
        f"shares a parameter with {others[:1]}": bool(others),
        f"groups={groups} is not supported": groups != 1,
        f"padding_mode={mode!r} is not supported": mode != "zeros",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
