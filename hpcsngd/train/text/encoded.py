"""Texts as an encoder takes them: token ids, which of them are there, and which sentence they are of.

A batch's input is one tensor ``(n, 3, length)``, int64, whose rows are ids, mask and types; all samples are
padded to the same length, as in the published runs, so that every batch of a size takes the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from hpcsngd.train.data.draws import Draws
from hpcsngd.train.data.samples import Batch, Samples

#: Texts that are handed to a tokenizer at once: its answers are lists of Python's numbers, far larger.
CHUNK = 4096


@dataclass(frozen=True)
class Tokens:
    """Sequences of tokens, one behind the other.

    Attributes:
        ids: ``(tokens,)``, int32.
        types: which sentence each is of, ``(tokens,)``, uint8.
        starts: where each sequence begins, and the end, ``(sequences + 1,)``, int64.
    """

    ids: Tensor
    types: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def joined(cls, parts: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Tokens:
        """Returns sequences from pairs of ids and types."""
        ids, types, lengths = [], [], []
        for some_ids, some_types in parts:
            ids.append(torch.tensor(some_ids, dtype=torch.int32))
            types.append(torch.tensor(some_types, dtype=torch.uint8))
            lengths.append(len(some_ids))
        starts = torch.tensor([0, *lengths]).cumsum(0)
        return cls(torch.cat(ids), torch.cat(types), starts)

    def padded(self, indices: Sequence[int], length: int, padding: int) -> Tensor:
        """Returns some sequences as ``(n, 3, length)``, int64: ids, mask, types."""
        result = torch.zeros(len(indices), 3, length, dtype=torch.int64)
        result[:, 0] = padding
        for row, index in zip(result, indices, strict=True):
            start, end = self.starts[index : index + 2].tolist()
            row[0, : end - start], row[2, : end - start] = self.ids[start:end], self.types[start:end]
            row[1, : end - start] = 1
        return result


def tokenized(tokenizer: Any, sentences: Sequence[Sequence[str]], max_length: int) -> Tokens:
    """Returns one sequence for each example; the longer of two sentences is cut first.

    Args:
        tokenizer: of transformers, a fast one.
        sentences: one or two lists of as many texts.
        max_length: largest number of tokens.
    """

    def parts() -> Iterator[tuple[list[int], list[int]]]:
        for first in range(0, len(sentences[0]), CHUNK):
            some = [list(texts[first : first + CHUNK]) for texts in sentences]
            found = tokenizer(*some, truncation=True, max_length=max_length, return_token_type_ids=True)
            yield from zip(found["input_ids"], found["token_type_ids"], strict=True)

    return Tokens.joined(parts())


class Encoded(Samples):
    """Examples as tokens, with a target each.

    Attributes:
        encoder: folder of the encoder whose tokenizer made the tokens.

    Args:
        encoder: see above.
        tokens: of the examples.
        targets: ``(n,)`` classes, int64; or numbers, float32.
        length: that all are padded to.
        padding: id of the token for that.
    """

    def __init__(self, encoder: Path, tokens: Tokens, targets: Tensor, *, length: int, padding: int) -> None:
        super().__init__()
        self.encoder, self._tokens, self._targets = encoder, tokens, targets
        self._length, self._padding = length, padding
        self._chosen = torch.arange(len(tokens))

    def __len__(self) -> int:
        return len(self._chosen)

    def take(self, indices: list[int], draws: Draws | None) -> Batch:
        """Returns tokens ``(n, 3, length)`` and targets; nothing about them is drawn."""
        places: list[int] = self._chosen[indices].tolist()
        return self._tokens.padded(places, self._length, self._padding), self._targets[places]

    def example(self, count: int) -> tuple[Tensor, ...]:
        """Returns the first samples' tokens."""
        return self.take([index % len(self) for index in range(count)], None)[:-1]

    def subset(self, chosen: Tensor) -> Self:
        """Returns the samples with these indices, in their order."""
        return self._changed(_chosen=self._chosen[chosen])

    @property
    def labels(self) -> Tensor:
        """Returns the targets, ``(samples,)``."""
        return self._targets[self._chosen]
