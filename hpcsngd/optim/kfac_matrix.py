"""Linear layers and convolutions as K-FAC covers them; `hpcsngd.optim.kfac_layers` has the contract."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcsngd.optim.kfac_layers import Call, CoveredLayer, Sharing, Statistic, check_aligned, second_moment
from hpcsngd.optim.layers import Layer
from hpcsngd.optim.moments import gram


def input_moment(layer: Layer, x: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``sum_ns x_ns x_ns^T``, ``(groups, d_in, d_in)``, bias included.

    Convolutions without their patches where that is faster (`hpcsngd.optim.moments`).

    Args:
        layer: that was called.
        x: the call's input.
        output: the call's output (only its shape is read).
        dtype: of the result, and of what is computed.
    """
    moment = layer.input_moment(x, output, dtype)
    if not layer.has_bias:
        return moment
    sums, positions = layer.input_sums(x, output, dtype)
    edge = sums.sum(0)
    corner = edge.new_full((len(edge), 1, 1), len(sums) * positions)
    upper = torch.cat([moment, edge.unsqueeze(2)], 2)
    return torch.cat([upper, torch.cat([edge.unsqueeze(1), corner], 2)], 1)


class ExpandedCall(Call):
    """Keeps second moments over all positions."""

    def __init__(self, layer: Layer, x: Tensor, output: Tensor, dtype: torch.dtype) -> None:
        self._layer, self._dtype = layer, dtype
        vectors = layer.output_vectors(output)
        self.samples, self.gradients = len(vectors), 0
        self.inputs = len(vectors) * vectors.shape[3]
        self.a = input_moment(layer, x, output, dtype)
        self.g: Tensor | None = None

    def add_gradient(self, grad: Tensor) -> None:
        """See `Call.add_gradient`."""
        moment = gram(self._layer.output_vectors(grad).to(self._dtype))
        self.g = moment if self.g is None else self.g + moment
        self.gradients += 1


class SummedCall(Call):
    """Keeps sums over the positions, for every gradient its own."""

    def __init__(self, layer: Layer, x: Tensor, output: Tensor, dtype: torch.dtype) -> None:
        self._layer, self._dtype = layer, dtype
        self.input_sums, self.positions = layer.input_sums(x, output, dtype)
        self.samples, self.gradients = len(self.input_sums), 0
        self.output_sums: list[Tensor] = []

    def add_gradient(self, grad: Tensor) -> None:
        """See `Call.add_gradient`."""
        self.output_sums.append(self._layer.output_sums(grad, self._dtype))
        self.gradients += 1


class MatrixLayer(CoveredLayer):
    """A Linear or a convolution of any kind.

    Args:
        layer: which one.
        sharing: how positions are dealt with.
    """

    def __init__(self, layer: Layer, sharing: Sharing) -> None:
        self.name, self.module, self._layer, self._sharing = layer.name, layer.module, layer, sharing
        d_in, d_out = layer.row_sizes
        self.shape = (layer.groups, d_out // layer.groups, d_in)

    @property
    def parameters(self) -> list[Tensor]:
        """See `CoveredLayer.parameters`."""
        return self._layer.parameters

    def to_blocks(self, parameters: Sequence[Tensor]) -> Tensor:
        """See `CoveredLayer.to_blocks`."""
        return self._layer.to_matrix(parameters).reshape(self.shape)

    def from_blocks(self, blocks: Tensor) -> list[Tensor]:
        """See `CoveredLayer.from_blocks`."""
        return self._layer.from_matrix(blocks.flatten(0, 1))

    def open_call(self, x: Tensor, output: Tensor, dtype: torch.dtype) -> Call:
        """See `CoveredLayer.open_call`."""
        kind = ExpandedCall if self._sharing == "expand" else SummedCall
        return kind(self._layer, x, output, dtype)

    def statistic(self, calls: Sequence[Call]) -> Statistic:
        """See `CoveredLayer.statistic`."""
        check_aligned(calls)
        expanded = [call for call in calls if isinstance(call, ExpandedCall)]
        if expanded:
            g = torch.stack([call.g for call in expanded if call.g is not None]).sum(0)
            a = torch.stack([call.a for call in expanded]).sum(0)
            return Statistic(a, g, sum(call.inputs for call in expanded), calls[0].samples)
        return self._reduced([call for call in calls if isinstance(call, SummedCall)])

    def _reduced(self, calls: Sequence[SummedCall]) -> Statistic:
        x = torch.stack([call.input_sums for call in calls]).sum(0) / sum(call.positions for call in calls)
        if self._layer.has_bias:
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
        # Calls in one forward pass get their gradients by the same columns, in the same order.
        columns = zip(*(call.output_sums for call in calls), strict=True)
        g = torch.stack([second_moment(torch.stack(parts).sum(0)) for parts in columns]).sum(0)
        return Statistic(second_moment(x), g, len(x), len(x))
