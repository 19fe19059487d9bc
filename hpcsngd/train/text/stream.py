"""Long texts for language models, as streams of tokens side by side."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import Self

from hpcsngd.config import experiment as schema
from hpcsngd.config.catalogue import DATASETS as CATALOGUE
from hpcsngd.train.data.draws import Draws
from hpcsngd.train.data.folders import find
from hpcsngd.train.data.samples import Batch, Samples, Splits
from hpcsngd.train.faults import MissingDataError, SettingError
from hpcsngd.train.losses import IGNORED
from hpcsngd.train.sampler import even_parts
from hpcsngd.train.text.files import read_lines
from hpcsngd.train.text.vocabulary import Vocabulary, by_frequency, cached

END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"


class Stream(Samples):
    """A text of N tokens, of which all but the first are predicted, each exactly once.

    The N - 1 predictions are cut into streams of consecutive ones, whose lengths differ by at most one, and
    each stream into samples of ``length`` predictions, the last one of what is left. A shorter stream's last
    sample is padded: its target is `IGNORED`.

    Indexing gives inputs and targets, both int64 ``(n, length)``: the target of each token is the next one.

    Args:
        tokens: ``(N,)``, int32.
        words: size of the vocabulary.
        length: predictions of a sample.
    """

    def __init__(self, tokens: Tensor, words: int, length: int) -> None:
        super().__init__()
        self.words, self._tokens, self._length = words, tokens, length
        self._sizes = [len(tokens) - 1]

    def __len__(self) -> int:
        return len(self._sizes) * -(-self._sizes[0] // self._length)

    @property
    def streams(self) -> int:
        """Returns how many streams there are."""
        return len(self._sizes)

    def laid_out(self, streams: int) -> Self:
        """Returns the same text, cut into so many streams.

        Raises:
            SettingError: there are fewer predictions than streams.
        """
        if len(self._tokens) <= streams:
            raise SettingError(f"a text of {len(self._tokens)} tokens cannot be {streams} streams")
        return self._changed(_sizes=even_parts(len(self._tokens) - 1, streams))

    def limited(self, count: int | None) -> Self:
        """Returns the first ``count`` predictions of the text, as one stream; all of them for None."""
        tokens = self._tokens if count is None else self._tokens[: count + 1]
        return self._changed(_tokens=tokens, _sizes=[len(tokens) - 1])

    def subset(self, chosen: Tensor) -> Self:
        """Raises TypeError: samples of a text follow each other."""
        raise TypeError("samples of a text follow each other, none can be left out")

    @property
    def targets(self) -> list[int]:
        """Returns how many tokens each sample predicts."""
        return [
            min(self._length, max(0, size - moment))
            for moment in range(0, self._sizes[0], self._length)
            for size in self._sizes
        ]

    def example(self, count: int) -> tuple[Tensor, ...]:
        """Returns samples that are the first word of the vocabulary, again and again."""
        return (torch.zeros(count, self._length, dtype=torch.int64),)

    def take(self, indices: list[int], draws: Draws | None) -> Batch:
        """Returns tokens and those that follow them."""
        sizes = torch.tensor(self._sizes)
        starts = sizes.cumsum(0) - sizes
        places = torch.tensor(indices)
        streams, moments = places % len(sizes), places // len(sizes) * self._length
        width = min(self._length, self._sizes[0] - int(moments.min()))
        offsets = moments[:, None] + torch.arange(width)
        is_real = offsets < sizes[streams][:, None]
        here = (starts[streams][:, None] + offsets).clamp_max(len(self._tokens) - 2)
        targets = torch.where(is_real, self._tokens[here + 1].long(), IGNORED)
        return self._tokens[here].long(), targets


def token_files(root: Path | None, config: schema.Data) -> Splits:
    """Returns a text whose tokens are separated by blanks, each line ended by one of its own.

    Format: three files of lines in UTF-8, ``ptb.train.txt``, ``ptb.valid.txt`` and ``ptb.test.txt`` of the
    Penn Treebank (Mikolov et al., 2010), ``wiki.train.tokens`` and so on of WikiText (Merity et al., ICLR
    2017). An empty line counts as well. The vocabulary is that of the training text, by frequency; other
    tokens become ``<unk>``, which such texts already use.

    Args:
        root: the data root.
        config: the experiment's ``data``.

    Raises:
        MissingDataError: files are missing or damaged; the message names them.
    """
    folder = find(config.name, root)
    paths = [folder / file for file in CATALOGUE[config.name].files]
    words = cached(folder, paths[:1], "tokens by frequency", lambda: by_frequency(_tokens(paths[0])))
    vocabulary = Vocabulary(words, words.index(UNKNOWN) if UNKNOWN in words else None)
    length = (config.stream or schema.Stream()).length
    train, valid, test = (Stream(_encode(path, vocabulary), len(vocabulary), length) for path in paths)
    return Splits(train, valid, len(vocabulary), "validation", {"test": test})


def _tokens(file: Path) -> Iterator[str]:
    for line in read_lines(file):
        yield from line.split()
        yield END_OF_LINE


def _encode(file: Path, vocabulary: Vocabulary) -> Tensor:
    # four bytes a token: as Python's numbers those of WikiText-103 would be gigabytes
    numbers = array("i")
    try:
        for line in read_lines(file):
            numbers.extend(vocabulary.encode((*line.split(), END_OF_LINE)))
    except KeyError as error:
        raise MissingDataError(f"{file}: the training text has no word {error}, and no {UNKNOWN}") from error
    return torch.tensor(numbers, dtype=torch.int32)
