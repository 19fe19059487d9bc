"""Parts of Transformers (Vaswani et al., NeurIPS 2017), made of Linear layers that preconditioners cover.

torch's own MultiheadAttention applies its projections inside one function, where no hook sees them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: Of the LayerNorms, as tensor2tensor and the implementation behind DP-KFAC's study have it.
NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head attention, section 3.2.2; its projections have no bias.

    Args:
        width: of inputs and outputs.
        heads: how many; they share the width evenly.
        dropout: of the attention weights.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self._heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, visible: Tensor) -> Tensor:
        """Returns what each position of ``x`` reads from ``memory``, ``(n, t, width)``.

        Args:
            x: ``(n, t, width)``.
            memory: ``(n, s, width)``.
            visible: bool, broadcasts to ``(n, heads, t, s)``; every position sees at least one.
        """
        query, key, value = (
            part(each).unflatten(2, (self._heads, -1)).transpose(1, 2)
            for part, each in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        # written out: torch's fused kernels have no deterministic backward pass on GPUs
        scores = query @ key.mT / math.sqrt(query.shape[3])
        weights = scores.masked_fill(~visible, -math.inf).softmax(3)
        read: Tensor = self.output((self.dropout(weights) @ value).transpose(1, 2).flatten(2))
        return read


class Block(nn.Module):
    """A layer of a Transformer: attention, perhaps attention to an encoder, feed-forward; norms come last.

    Each part's output goes through dropout and is added to its input before the norm (section 5.4).

    Args:
        width: of inputs and outputs.
        inner: of the feed-forward part.
        heads: of the attentions.
        dropout: everywhere.
        reads_memory: whether it is a decoder's.
    """

    def __init__(
        self, width: int, inner: int, heads: int, dropout: float, *, reads_memory: bool = False
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.memory_attention = Attention(width, heads, dropout) if reads_memory else None
        self.memory_norm = nn.LayerNorm(width, eps=NORM_EPS) if reads_memory else None
        self.first = nn.Linear(width, inner)
        self.second = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        visible: Tensor,
        memory: Tensor | None = None,
        memory_visible: Tensor | None = None,
    ) -> Tensor:
        """Returns the layer's output, ``(n, t, width)``; arguments as for `Attention`."""
        x = self.attention_norm(x + self.dropout(self.attention(x, x, visible)))
        if self.memory_attention is not None and self.memory_norm is not None:
            x = self.memory_norm(x + self.dropout(self.memory_attention(x, memory, memory_visible)))
        result: Tensor = self.norm(x + self.dropout(self.second(torch.relu(self.first(x)))))
        return result


def positions(length: int, width: int, like: Tensor) -> Tensor:
    """Returns sines and cosines of each position, ``(length, width)``, section 3.5.

    Args:
        length: how many positions.
        width: of the model; even.
        like: gives device and type.
    """
    places = torch.arange(length, dtype=torch.float32, device=like.device)
    rates = torch.exp(
        torch.arange(0, width, 2, dtype=torch.float32, device=like.device) * (-math.log(1e4) / width)
    )
    angles = places[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1).to(like.dtype)


def causal(length: int, device: torch.device) -> Tensor:
    """Returns which positions each one sees: itself and those before it, bool ``(length, length)``."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()
