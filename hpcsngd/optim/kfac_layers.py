"""The layers that K-FAC covers, and what one forward call of each contributes to its factors.

Shape contract. The trained parameters of every layer are blocks ``(groups, d_out, d_in)``; each block has its
own factors, A of ``d_in`` and G of ``d_out`` entries a side:

    Linear, Conv, ConvTranspose  one block per group of channels, the bias as last column
    Embedding                    one block (dimension, vocabulary); inputs are one-hot, so A is a diagonal,
                                 the share of each word, and is kept as such
    BatchNorm, LayerNorm,        one block (1, 2) per unit: its scale and shift. No Kronecker product: A is
    GroupNorm                    the 2 x 2 Fisher matrix of the unit itself, and there is no G

Weight sharing. N samples have S positions each (pixels, tokens, calls of one layer in one forward pass), with
inputs ``x_ns`` (a 1 at the bias) and gradients ``g_ns`` of the sample's own loss at the output. The layer's
gradient is ``sum_s g_ns x_ns^T``, and its Fisher block is taken for A (x) G with

    expand    A = 1/(N S) sum_ns x_ns x_ns^T         G = 1/N sum_ns g_ns g_ns^T
    reduce    A = 1/N sum_n xm_n xm_n^T              G = 1/N sum_n gs_n gs_n^T
              xm_n = 1/S sum_s x_ns                  gs_n = sum_s g_ns

Both agree where S = 1. Expand on convolutions is KFC (Grosse and Martens, ICML 2016); names and formulas are
those of Eschenhagen et al., NeurIPS 2023, sections 3.1 and 3.2. An embedding always expands, and leaves out
what it pads with; a norm layer needs neither, its sums over the positions are exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hpcsngd.optim.calls import MisalignedError

Sharing = Literal["expand", "reduce"]


@dataclass(frozen=True)
class Statistic:
    """Sums that add up over calls, micro-batches and ranks.

    Attributes:
        a: of inputs, ``(groups, d_in, d_in)``; an embedding's diagonal, ``(1, d_in)``.
        g: of output gradients, ``(groups, d_out, d_out)``; None for a norm layer, whose gradients are in a.
        inputs: how many terms ``a`` is to be divided by.
        samples: how many terms ``g`` is to be divided by.
    """

    a: Tensor
    g: Tensor | None
    inputs: int
    samples: int

    @property
    def tensors(self) -> list[Tensor]:
        """Returns what the statistic consists of."""
        return [self.a] if self.g is None else [self.a, self.g]

    def with_tensors(self, tensors: Sequence[Tensor], inputs: int, samples: int) -> Statistic:
        """Returns a statistic of the same kind from other sums."""
        return Statistic(tensors[0], None if self.g is None else tensors[1], inputs, samples)

    def __add__(self, other: Statistic) -> Statistic:
        sums = [mine + theirs for mine, theirs in zip(self.tensors, other.tensors, strict=True)]
        return self.with_tensors(sums, self.inputs + other.inputs, self.samples + other.samples)

    def scaled(self, factor: float) -> Statistic:
        """Returns the statistic of output gradients multiplied by ``factor``."""
        *inputs, gradients = self.tensors
        return self.with_tensors([*inputs, gradients * factor**2], self.inputs, self.samples)

    def mean(self) -> list[Tensor]:
        """Returns A and, where there is one, G; wants at least one sample."""
        counts = (self.inputs, self.samples)
        return [total / count for total, count in zip(self.tensors, counts, strict=False)]


class Call(ABC):
    """One forward call of a layer, waiting for gradients at its output.

    Several gradients of one call are columns of a root of the loss's Hessian, or draws: what they contribute
    adds up.

    Attributes:
        samples: entries of the first dimension of the input.
        gradients: how many have come.
    """

    samples: int
    gradients: int

    @abstractmethod
    def add_gradient(self, grad: Tensor) -> None:
        """Adds the gradient of every sample's own loss, times a number common to all, at the output."""


class CoveredLayer(ABC):
    """A layer with factors.

    Attributes:
        name: of the module inside the model.
        module: the layer itself.
        shape: ``(groups, d_out, d_in)`` of its blocks.
        is_diagonal: whether A is kept as its diagonal.
        has_output_factor: whether there is a G.
    """

    name: str
    module: nn.Module
    shape: tuple[int, int, int]
    is_diagonal = False
    has_output_factor = True

    @property
    def weight(self) -> Tensor:
        """Returns the trained weight."""
        return self.parameters[0]

    @property
    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """Returns the parameters that are preconditioned."""

    @abstractmethod
    def to_blocks(self, parameters: Sequence[Tensor]) -> Tensor:
        """Returns tensors shaped like `parameters` (their gradients, say) as blocks of `shape`."""

    @abstractmethod
    def from_blocks(self, blocks: Tensor) -> list[Tensor]:
        """Returns blocks as tensors shaped like `parameters`."""

    @abstractmethod
    def open_call(self, x: Tensor, output: Tensor, dtype: torch.dtype) -> Call:
        """Returns a call that waits for gradients.

        Args:
            x: the call's input.
            output: the call's output (only its shape is read).
            dtype: of what is kept.
        """

    @abstractmethod
    def statistic(self, calls: Sequence[Call]) -> Statistic:
        """Returns what the calls of one micro-batch (at least one) contribute together.

        Raises:
            MisalignedError: the calls do not carry the same samples.
        """

    def factor_shapes(self) -> list[tuple[int, ...]]:
        """Returns the shapes of A and, where there is one, G."""
        groups, d_out, d_in = self.shape
        a = (groups, d_in) if self.is_diagonal else (groups, d_in, d_in)
        return [a, (groups, d_out, d_out)] if self.has_output_factor else [a]

    def no_statistic(self, dtype: torch.dtype) -> Statistic:
        """Returns the statistic of no sample."""
        sums = [torch.zeros(shape, dtype=dtype, device=self.weight.device) for shape in self.factor_shapes()]
        return Statistic(sums[0], sums[1] if self.has_output_factor else None, 0, 0)


def second_moment(vectors: Tensor) -> Tensor:
    """Returns ``sum_i v_i v_i^T``, ``(groups, d, d)``, of ``(n, groups, d)``."""
    by_group = vectors.transpose(0, 1)
    return by_group.mT @ by_group


def check_aligned(calls: Sequence[Call]) -> None:
    """Raises MisalignedError unless the calls carry equally many samples."""
    samples = sorted({call.samples for call in calls})
    if len(samples) > 1:
        raise MisalignedError(f"called with {samples} samples in one forward pass; add it to skip")
