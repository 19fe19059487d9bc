"""Embeddings and norm layers as K-FAC covers them; `hpcsngd.optim.kfac_layers` has the contract."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcsngd.optim.kfac_layers import Call, CoveredLayer, Statistic, check_aligned, second_moment

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
Norm = BatchNorm | nn.LayerNorm | nn.GroupNorm


class WordCall(Call):
    """Keeps how often each word occurs, and the second moment of the gradients."""

    def __init__(self, module: nn.Embedding, x: Tensor, dtype: torch.dtype) -> None:
        self._used = None if module.padding_idx is None else (x != module.padding_idx)
        words = x.flatten() if self._used is None else x[self._used]
        self.samples, self.gradients = len(x) if x.dim() else 1, 0
        self.counts = torch.bincount(words, minlength=module.num_embeddings).to(dtype)
        self.inputs = len(words)
        self.g = torch.zeros(
            1, module.embedding_dim, module.embedding_dim, dtype=dtype, device=module.weight.device
        )

    def add_gradient(self, grad: Tensor) -> None:
        """See `Call.add_gradient`."""
        vectors = (grad.flatten(0, -2) if self._used is None else grad[self._used]).to(self.g.dtype)
        self.g = self.g + vectors.T @ vectors
        self.gradients += 1


class EmbeddingLayer(CoveredLayer):
    """An Embedding, whose A is the diagonal of the words' shares.

    Args:
        name: of the module inside the model.
        module: the embedding.
    """

    is_diagonal = True

    def __init__(self, name: str, module: nn.Embedding) -> None:
        self.name, self.module, self._embedding = name, module, module
        self.shape = (1, module.embedding_dim, module.num_embeddings)

    @property
    def parameters(self) -> list[Tensor]:
        """See `CoveredLayer.parameters`."""
        return [self._embedding.weight]

    def to_blocks(self, parameters: Sequence[Tensor]) -> Tensor:
        """See `CoveredLayer.to_blocks`."""
        return parameters[0].T.unsqueeze(0)

    def from_blocks(self, blocks: Tensor) -> list[Tensor]:
        """See `CoveredLayer.from_blocks`."""
        return [blocks[0].T]

    def open_call(self, x: Tensor, output: Tensor, dtype: torch.dtype) -> Call:
        """See `CoveredLayer.open_call`."""
        return WordCall(self._embedding, x, dtype)

    def statistic(self, calls: Sequence[Call]) -> Statistic:
        """See `CoveredLayer.statistic`."""
        check_aligned(calls)
        words = [call for call in calls if isinstance(call, WordCall)]
        counts = torch.stack([call.counts for call in words]).sum(0, keepdim=True)
        g = torch.stack([call.g for call in words]).sum(0)
        # Words that are padding alone leave nothing to divide by, and nothing to divide.
        return Statistic(counts, g, max(1, sum(call.inputs for call in words)), words[0].samples)


class UnitCall(Call):
    """Keeps the normalized input, then each sample's gradient of every unit's scale and shift."""

    def __init__(self, layer: NormLayer, x: Tensor, dtype: torch.dtype) -> None:
        self._layer = layer
        self._normalized = layer.normalized(x.to(dtype))
        self.samples, self.gradients = len(x), 0
        self.own: list[Tensor] = []

    def add_gradient(self, grad: Tensor) -> None:
        """See `Call.add_gradient`."""
        grad = grad.to(self._normalized.dtype)
        scale = self._layer.over_positions(grad * self._normalized)
        parts = [scale, self._layer.over_positions(grad)] if self._layer.has_bias else [scale]
        self.own.append(torch.stack(parts, 2))
        self.gradients += 1


class NormLayer(CoveredLayer):
    """A norm layer with a scale for every unit.

    Args:
        name: of the module inside the model.
        module: the layer.
        has_bias: whether there is a trained shift.
    """

    has_output_factor = False

    def __init__(self, name: str, module: Norm, has_bias: bool) -> None:
        self.name, self.module, self._norm, self.has_bias = name, module, module, has_bias
        self.shape = (module.weight.numel(), 1, 1 + int(has_bias))

    @property
    def parameters(self) -> list[Tensor]:
        """See `CoveredLayer.parameters`."""
        return [self._norm.weight, self._norm.bias] if self.has_bias else [self._norm.weight]

    def to_blocks(self, parameters: Sequence[Tensor]) -> Tensor:
        """See `CoveredLayer.to_blocks`."""
        return torch.stack([parameter.flatten() for parameter in parameters], 1).unsqueeze(1)

    def from_blocks(self, blocks: Tensor) -> list[Tensor]:
        """See `CoveredLayer.from_blocks`."""
        return [column.reshape(self._norm.weight.shape) for column in blocks[:, 0].unbind(1)]

    def normalized(self, x: Tensor) -> Tensor:
        """Returns the input as the layer normalizes it, before scale and shift."""
        norm = self._norm
        if isinstance(norm, nn.LayerNorm):
            return functional.layer_norm(x, norm.normalized_shape, eps=norm.eps)
        if isinstance(norm, nn.GroupNorm):
            return functional.group_norm(x, norm.num_groups, eps=norm.eps)
        if norm.training or norm.running_mean is None or norm.running_var is None:
            return functional.batch_norm(x, None, None, training=True, eps=norm.eps)
        mean, variance = norm.running_mean.to(x), norm.running_var.to(x)
        return functional.batch_norm(x, mean, variance, eps=norm.eps)

    def over_positions(self, x: Tensor) -> Tensor:
        """Returns the sums over the positions, ``(n, units)``, of a tensor shaped like the input."""
        if isinstance(self._norm, nn.LayerNorm):
            return x.reshape(len(x), -1, self.shape[0]).sum(1)
        return x.flatten(2).sum(2) if x.dim() > 2 else x

    def open_call(self, x: Tensor, output: Tensor, dtype: torch.dtype) -> Call:
        """See `CoveredLayer.open_call`."""
        return UnitCall(self, x, dtype)

    def statistic(self, calls: Sequence[Call]) -> Statistic:
        """See `CoveredLayer.statistic`."""
        check_aligned(calls)
        columns = zip(*(call.own for call in calls if isinstance(call, UnitCall)), strict=True)
        moments = [second_moment(torch.stack(parts).sum(0)) for parts in columns]
        return Statistic(torch.stack(moments).sum(0), None, calls[0].samples, calls[0].samples)
