"""What is kept of one forward call of a layer, and how calls become rows, for each convolution mode.

Where a sample has several positions (pixels, tokens, calls of one layer in one forward pass), S of them in
all, with inputs ``x_s`` and output gradients ``g_s``, the sample's own gradient is ``sum_s g_s x_s^T``, and

    exact    U = sum_s g_s x_s^T                              the true gradient: F is the layer's true Fisher
    reduce   U = (sum_s g_s)(1/S sum_s x_s)^T                 right in size, and exact for the bias
    paper    U = (1/S sum_s g_s)(1/S sum_s x_s)^T             what HyLo's published code computes: 1/S of
                                                              reduce, so its F is S^2 times too small

All three agree where a sample has one position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from hpcsngd.optim.layers import Layer
from hpcsngd.optim.rows import FactoredRows, GradientRows, Rows

ConvMode = Literal["reduce", "exact", "paper"]


class Call(Protocol):
    """One forward call of a layer, waiting for its gradients."""

    def add_gradient(self, grad: Tensor) -> None:
        """Adds the gradient that one backward pass brought to the call's output."""


class ReducedCall:
    """Keeps sums over the positions.

    Args:
        layer: that was called.
        x: the call's input.
        output: the call's output.
        dtype: of what is kept.
    """

    def __init__(self, layer: Layer, x: Tensor, output: Tensor, dtype: torch.dtype) -> None:
        self._layer, self._dtype = layer, dtype
        self.input_sums, self.positions = layer.input_sums(x, output, dtype)
        self.output_sums: Tensor | None = None

    def add_gradient(self, grad: Tensor) -> None:
        """Adds the sum of ``grad`` over the positions."""
        sums = self._layer.output_sums(grad, self._dtype)
        # A second backward pass through the same forward: gradients add up, inputs are the same.
        self.output_sums = sums if self.output_sums is None else self.output_sums + sums


class ExactCall:
    """Keeps the input until the gradient comes, then the rows; arguments as for `ReducedCall`.

    Autograd holds the input for as long anyway, except under activation checkpointing.
    """

    def __init__(self, layer: Layer, x: Tensor, _output: Tensor, dtype: torch.dtype) -> None:
        self._layer, self._dtype = layer, dtype
        self._x: Tensor | None = x.detach()
        self._version = x._version  # noqa: SLF001 - autograd's own check for writes, which autocast escapes
        self.rows: Rows | None = None

    def add_gradient(self, grad: Tensor) -> None:
        """Makes the rows.

        Raises:
            RuntimeError: it is the second backward pass through this call, or the input was written to.
        """
        x, self._x = self._x, None
        advice = f"layer {self._layer.name}: use conv_mode='reduce', or add it to skip"
        if x is None:
            raise RuntimeError(f"second backward pass through one forward pass; {advice}")
        if x._version != self._version:  # noqa: SLF001
            raise RuntimeError(f"the input changed between forward and backward; {advice}")
        self.rows = self._layer.exact_rows(x, grad, self._dtype)


class MisalignedError(ValueError):
    """Calls of one layer in one forward pass carry different numbers of samples."""


def rows_of_calls(layer: Layer, calls: Sequence[Call], mode: ConvMode) -> Rows:
    """Returns the rows of a layer's calls in one micro-batch (at least one call).

    Raises:
        MisalignedError: the calls do not carry the same samples.
    """
    exact = [call.rows for call in calls if isinstance(call, ExactCall) and call.rows is not None]
    if exact:
        _check_aligned([len(rows) for rows in exact])
        return _sum_of_rows(layer, exact)
    return _reduced_rows(layer, [call for call in calls if isinstance(call, ReducedCall)], mode)


def no_rows(layer: Layer, dtype: torch.dtype) -> Rows:
    """Returns the rows of a layer that nobody used."""
    d_in, d_out = layer.row_sizes
    empty = torch.empty(0, layer.groups, 1, 1, dtype=dtype, device=layer.module.weight.device)
    rows = FactoredRows(empty.expand(-1, -1, -1, d_in), empty.expand(-1, -1, -1, d_out // layer.groups))
    return rows if layer.factors_are_cheaper(1) else rows.with_terms(0)


def _reduced_rows(layer: Layer, calls: Sequence[ReducedCall], mode: ConvMode) -> Rows:
    gradients = [call.output_sums for call in calls if call.output_sums is not None]
    _check_aligned([len(gradient) for gradient in gradients])
    positions = sum(call.positions for call in calls)
    a = torch.stack([call.input_sums for call in calls]).sum(0) / positions
    g = torch.stack(gradients).sum(0) / (positions if mode == "paper" else 1)
    if layer.has_bias:
        a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
    rows = FactoredRows(a.unsqueeze(2), g.unsqueeze(2))
    return rows if layer.factors_are_cheaper(1) else rows.with_terms(0)


def _sum_of_rows(layer: Layer, parts: Sequence[Rows]) -> Rows:
    """Returns rows whose gradients are the sums of the parts' gradients, sample by sample."""
    if len(parts) == 1:
        return parts[0]
    factored = [rows for rows in parts if isinstance(rows, FactoredRows)]
    if len(factored) == len(parts) and layer.factors_are_cheaper(sum(rows.terms for rows in factored)):
        a, g = (torch.cat(tensors, 2) for tensors in zip(*(rows.tensors for rows in factored), strict=True))
        return FactoredRows(a, g)
    return GradientRows(torch.stack([rows.matrices() for rows in parts]).sum(0))


def _check_aligned(samples: Sequence[int]) -> None:
    if len(set(samples)) > 1:
        raise MisalignedError(
            f"called with {sorted(set(samples))} samples in one forward pass; add it to skip"
        )
