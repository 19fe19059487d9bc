"""The encoder-decoder Transformer of Vaswani et al., NeurIPS 2017, for translation."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from hpcsngd.train.models.attention import NORM_EPS, Block, causal, positions
from hpcsngd.train.text.pairs import Pairs
from hpcsngd.train.text.vocabulary import PADDING

Scaling = Literal["embedding", "projection", "none"]


class Transformer(nn.Module):
    """Encoder and decoder.

    Embeddings go through dropout and a LayerNorm before the first layer, as in the implementation behind
    DP-KFAC's study; the paper has no such norm.

    Args:
        words: sizes of the vocabularies of source and target.
        width: of the model, d_model in the paper; even.
        inner: of the feed-forward parts.
        heads: of the attentions.
        layers: of encoder and decoder each.
        dropout: everywhere.
        share_embeddings: source and target have one embedding; wants one vocabulary.
        share_projection: the output layer's weight is the target embedding.
        scaling: ``"embedding"``: embeddings times sqrt(width), as in the paper; ``"projection"``: logits over
            sqrt(width) instead; or ``"none"``.

    Raises:
        ValueError: an embedding for two vocabularies of different sizes.
    """

    def __init__(
        self,
        words: tuple[int, int],
        *,
        width: int = 512,
        inner: int = 2048,
        heads: int = 8,
        layers: int = 6,
        dropout: float = 0.1,
        share_embeddings: bool = False,
        share_projection: bool = False,
        scaling: Scaling = "embedding",
    ) -> None:
        super().__init__()
        self._width, self._scaling = width, scaling
        sizes = (width, inner, heads, dropout)
        self.source = nn.Embedding(words[0], width, padding_idx=PADDING)
        self.target = nn.Embedding(words[1], width, padding_idx=PADDING)
        self.source_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.target_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(Block(*sizes) for _ in range(layers))
        self.decoder = nn.ModuleList(Block(*sizes, reads_memory=True) for _ in range(layers))
        self.projection = nn.Linear(width, words[1], bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        if share_embeddings:
            if words[0] != words[1]:
                raise ValueError(
                    f"share_embeddings wants one vocabulary, not of {words[0]} and {words[1]} words"
                )
            self.source.weight = self.target.weight
        if share_projection:
            self.projection.weight = self.target.weight

    def forward(self, source: Tensor, known: Tensor) -> Tensor:
        """Returns logits of the next word at every position, ``(n, t, words)``.

        Args:
            source: ``(n, s)``, int64, `PADDING` at the end.
            known: ``(n, t)``, int64: the words before each one; what is after it has no influence.
        """
        return self.decode(known, self.encode(source), source)

    def encode(self, source: Tensor) -> Tensor:
        """Returns what the encoder makes of sources, ``(n, s, width)``."""
        x: Tensor = self.source_norm(self._embed(self.source, source))
        visible = _is_word(source)
        for block in self.encoder:
            x = block(x, visible)
        return x

    def decode(self, known: Tensor, memory: Tensor, source: Tensor) -> Tensor:
        """Returns logits of the next word at every position, ``(n, t, words)``.

        Args:
            known: ``(n, t)``.
            memory: what `encode` made of the sources.
            source: ``(n, s)``; tells where it is padded.
        """
        x = self.target_norm(self._embed(self.target, known))
        visible, memory_visible = causal(known.shape[1], known.device), _is_word(source)
        for block in self.decoder:
            x = block(x, visible, memory, memory_visible)
        logits: Tensor = self.projection(x)
        return logits / math.sqrt(self._width) if self._scaling == "projection" else logits

    def _embed(self, embedding: nn.Module, words: Tensor) -> Tensor:
        x = embedding(words)
        if self._scaling == "embedding":
            x = x * math.sqrt(self._width)
        embedded: Tensor = self.dropout(x + positions(words.shape[1], self._width, x))
        return embedded


def _is_word(source: Tensor) -> Tensor:
    """Returns where there is a word, as `Attention` wants it."""
    return (source != PADDING)[:, None, None, :]


def transformer(samples: Pairs, num_classes: int, **arguments: object) -> nn.Module:
    """Returns a `Transformer` for the vocabularies of sentence pairs; the base size by default.

    Args:
        samples: the training set.
        num_classes: size of the target vocabulary.
        arguments: of the class.
    """
    return Transformer((len(samples.languages[0]), num_classes), **arguments)  # type: ignore[arg-type]  # checked there
