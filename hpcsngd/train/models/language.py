"""Language models: LSTM, GRU, and a causal Transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from hpcsngd.train.carried import Carrying
from hpcsngd.train.models.attention import Block, causal, positions
from hpcsngd.train.text.stream import Stream

Cell = Literal["fused", "linear"]
Kind = Literal["lstm", "gru"]


class RecurrentLM(nn.Module):
    """Embedding, recurrent layers, output layer; dropout between all of them.

    Dropout is on the connections between layers alone (Zaremba et al., 2014, section 3). Each call goes on in
    the states that the last one left (`hpcsngd.train.carried`).

    Args:
        kind: of the layers.
        words: size of the vocabulary.
        width: of the embedding.
        hidden: of each layer.
        layers: how many.
        dropout: share that is dropped.
        tied: the output layer's weight is the embedding's (Press and Wolf, EACL 2017); wants width = hidden.
        cell: ``"fused"``: torch's, fast; ``"linear"``: the same arithmetic as Linear layers, which
            preconditioners cover.
        init: weights are drawn evenly from -init to init; None: as torch does.

    Raises:
        ValueError: tied layers of different widths.
    """

    def __init__(
        self,
        kind: Kind,
        words: int,
        *,
        width: int = 200,
        hidden: int = 200,
        layers: int = 2,
        dropout: float = 0.2,
        tied: bool = False,
        cell: Cell = "fused",
        init: float | None = None,
    ) -> None:
        super().__init__()
        if tied and width != hidden:
            raise ValueError(f"tied layers want one width, not {width} and hidden {hidden}")
        self.embedding = nn.Embedding(words, width)
        self.dropout = nn.Dropout(dropout)
        make: Callable[[Kind, int, int], Carrying] = {"fused": Fused, "linear": Unrolled}[cell]
        self.recurrent = nn.ModuleList(
            make(kind, hidden if depth else width, hidden) for depth in range(layers)
        )
        self.decoder = nn.Linear(hidden, words)
        if init is not None:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -init, init)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits of the next token, ``(n, length, words)``, of ``(n, length)``, int64."""
        x = self.dropout(self.embedding(tokens))
        for layer in self.recurrent:
            x = self.dropout(layer(x))
        logits: Tensor = self.decoder(x)
        return logits


class Fused(Carrying):
    """A layer of torch.nn.LSTM or GRU.

    Args:
        kind: which.
        width: of the input.
        hidden: of the output.
    """

    def __init__(self, kind: Kind, width: int, hidden: int) -> None:
        super().__init__()
        self.layer = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](width, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output at each position, ``(n, length, hidden)``."""
        states = tuple(self.carried)
        start = None if not states else states if isinstance(self.layer, nn.LSTM) else states[0]
        x, end = self.layer(x, start)
        self.carried = [each.detach() for each in (end if isinstance(end, tuple) else (end,))]
        return x


class Unrolled(Carrying):
    """The same layer as Linear layers: one for all inputs at once, one that is called at each position.

    Args:
        kind: which.
        width: of the input.
        hidden: of the output.
    """

    def __init__(self, kind: Kind, width: int, hidden: int) -> None:
        super().__init__()
        self._kind, self._hidden = kind, hidden
        gates = {"lstm": 4, "gru": 3}[kind]
        self.from_input = nn.Linear(width, gates * hidden)
        self.from_state = nn.Linear(hidden, gates * hidden)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output at each position, ``(n, length, hidden)``."""
        inputs = self.from_input(x)
        states = self.carried or [inputs.new_zeros(len(x), self._hidden)] * (2 if self._kind == "lstm" else 1)
        step = _lstm if self._kind == "lstm" else _gru
        outputs = []
        for position in range(x.shape[1]):
            states = step(inputs[:, position], self.from_state(states[0]), states)
            outputs.append(states[0])
        self.carried = [state.detach() for state in states]
        return torch.stack(outputs, 1)


def _lstm(from_input: Tensor, from_state: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Returns output and cell; the gates are input, forget, cell, output, as torch orders them."""
    enter, keep, new, leave = (from_input + from_state).chunk(4, 1)
    cell = keep.sigmoid() * states[1] + enter.sigmoid() * new.tanh()
    return [leave.sigmoid() * cell.tanh(), cell]


def _gru(from_input: Tensor, from_state: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Returns the output; the gates are reset, update, new, as torch orders them."""
    inputs, before = from_input.chunk(3, 1), from_state.chunk(3, 1)
    reset, update = ((inputs[place] + before[place]).sigmoid() for place in (0, 1))
    new = (inputs[2] + reset * before[2]).tanh()
    return [(1 - update) * new + update * states[0]]


class TransformerLM(nn.Module):
    """Embedding, causal Transformer layers, output layer.

    Args:
        words: size of the vocabulary.
        width: of the model; even.
        inner: of the feed-forward parts.
        heads: of the attentions.
        layers: how many.
        dropout: everywhere.
        tied: the output layer's weight is the embedding's.
    """

    def __init__(
        self,
        words: int,
        *,
        width: int = 256,
        inner: int = 256,
        heads: int = 2,
        layers: int = 2,
        dropout: float = 0.2,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self._width = width
        self.embedding = nn.Embedding(words, width)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(Block(width, inner, heads, dropout) for _ in range(layers))
        self.decoder = nn.Linear(width, words)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits of the next token, ``(n, length, words)``, of ``(n, length)``, int64."""
        x = self.embedding(tokens) * math.sqrt(self._width)
        x = self.dropout(x + positions(tokens.shape[1], self._width, x))
        visible = causal(tokens.shape[1], tokens.device)
        for block in self.encoder:
            x = block(x, visible)
        logits: Tensor = self.decoder(x)
        return logits


def recurrent_lm(kind: Kind, samples: Stream, num_classes: int, **arguments: object) -> nn.Module:
    """Returns a `RecurrentLM` for the vocabulary of a text.

    Args:
        kind: of the layers.
        samples: the training set.
        num_classes: size of the vocabulary.
        arguments: of the class.
    """
    return RecurrentLM(kind, num_classes, **arguments)  # type: ignore[arg-type]  # checked there


def transformer_lm(samples: Stream, num_classes: int, **arguments: object) -> nn.Module:
    """Returns a `TransformerLM` for the vocabulary of a text; the same arguments without ``kind``."""
    return TransformerLM(num_classes, **arguments)  # type: ignore[arg-type]  # checked there
