"""Sentence pairs for translation: Multi-30k's files of parallel lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Self

from hpcsngd.config import experiment as schema
from hpcsngd.config.catalogue import DATASETS as CATALOGUE
from hpcsngd.train.data.draws import Draws
from hpcsngd.train.data.folders import find
from hpcsngd.train.data.samples import Batch, Samples, Splits
from hpcsngd.train.faults import MissingDataError
from hpcsngd.train.losses import IGNORED
from hpcsngd.train.sampler import even_parts
from hpcsngd.train.text import vocabulary
from hpcsngd.train.text.files import present, read_lines
from hpcsngd.train.text.vocabulary import END, PADDING, SPECIALS, START, UNKNOWN, Vocabulary


@dataclass(frozen=True)
class Sentences:
    """Sentence pairs.

    Attributes:
        sources: words of each sentence that is read, ended by `END`; int64.
        targets: words of its translation, without anything around them; int64.
        references: the translations as they stand in the file.
    """

    sources: list[Tensor]
    targets: list[Tensor]
    references: list[str]


class Pairs(Samples):
    """Sentence pairs, padded to the longest of each batch.

    Indexing gives sources ``(n, s)``, what is known of the translation when a word is written ``(n, t)`` (it
    begins with `START`), and those words ``(n, t)``, `END` last, `IGNORED` where it is padded; all int64.

    Args:
        sentences: the pairs.
        languages: vocabularies of source and target; the same object where they share one.
        lowercase: whether the words are lower-case, whatever the references are.
        buckets: parts of like length; the pairs are then in the order of their length.
    """

    def __init__(
        self,
        sentences: Sentences,
        languages: tuple[Vocabulary, Vocabulary],
        *,
        lowercase: bool,
        buckets: int = 1,
    ) -> None:
        super().__init__()
        self._sentences, self._buckets = sentences, buckets
        self.languages, self.lowercase = languages, lowercase
        self._order = list(range(len(sentences.sources)))
        self._sort()

    def __len__(self) -> int:
        return len(self._order)

    @property
    def references(self) -> list[str]:
        """Returns the translations as they stand in the file."""
        return [self._sentences.references[place] for place in self._order]

    @property
    def blocks(self) -> list[int]:
        """Returns the sizes of the buckets."""
        return even_parts(len(self), min(self._buckets, len(self)))

    @property
    def targets(self) -> list[int]:
        """Returns the words of each translation, its end included."""
        return [len(self._sentences.targets[place]) + 1 for place in self._order]

    def subset(self, chosen: Tensor) -> Self:
        """Returns the pairs with these indices; with buckets by length, otherwise in their order."""
        result = self._changed(_order=[self._order[index] for index in chosen.tolist()])
        result._sort()  # noqa: SLF001 - an object of our own class
        return result

    def example(self, count: int) -> tuple[Tensor, ...]:
        """Returns the inputs of the first pairs, again and again if there are fewer."""
        return self.take([index % len(self) for index in range(count)], None)[:-1]

    def take(self, indices: list[int], draws: Draws | None) -> Batch:
        """Returns sources, words known, and words to write."""
        places = [self._order[index] for index in indices]
        targets = [self._sentences.targets[place] for place in places]
        known = [torch.cat([torch.tensor([START]), each]) for each in targets]
        wanted = [torch.cat([each, torch.tensor([END])]) for each in targets]
        return (
            _padded([self._sentences.sources[place] for place in places], PADDING),
            _padded(known, PADDING),
            _padded(wanted, IGNORED),
        )

    def _sort(self) -> None:
        if self._buckets > 1:
            by_length = {
                place: (len(self._sentences.targets[place]), len(self._sentences.sources[place]))
                for place in self._order
            }
            self._order = sorted(self._order, key=by_length.__getitem__)


def multi30k(root: Path | None, config: schema.Data) -> Splits:
    """Returns Multi-30k: 29,000 pairs to train, 1,014 to evaluate, and the 1,000 of 2016's test.

    Format: ``train.de``, ``train.en``, ``val.de``, ``val.en``, ``test.de``, ``test.en`` (or
    ``test_2016_flickr.de``, ...), one sentence a line, the same line in both (Elliott et al., 2016). Words
    are cut at blanks and punctuation. Vocabularies are those of the training sentences.

    Args:
        root: the data root.
        config: the experiment's ``data``.

    Raises:
        MissingDataError: files are missing, damaged or of different lengths; the message names them.
    """
    folder, settings = find("multi30k", root), config.translation or schema.Translation()
    # de, en of each part
    names = CATALOGUE["multi30k"].files
    parts = [[present(folder, name) for name in names[place : place + 2]] for place in (0, 2, 4)]
    if settings.source == "en":
        parts = [part[::-1] for part in parts]
    lines = [_parallel(*part) for part in parts]
    languages = _vocabularies(folder, parts[0], lines[0], settings)
    train, valid, test = (_numbered(part, languages, settings) for part in lines)
    lowercase = settings.lowercase
    kept = _without_long(train, settings.max_words)
    if not kept.sources:
        raise MissingDataError(f"{parts[0][0]}: no pair of at most {settings.max_words} words")
    held = [Pairs(part, languages, lowercase=lowercase) for part in (valid, test)]
    return Splits(
        Pairs(kept, languages, lowercase=lowercase, buckets=settings.buckets),
        held[0],
        len(languages[1]),
        "validation",
        {"test": held[1]},
    )


def _parallel(source: Path, target: Path) -> tuple[list[str], list[str]]:
    lines = (read_lines(source), read_lines(target))
    if len(lines[0]) != len(lines[1]):
        raise MissingDataError(f"{source} has {len(lines[0])} lines, {target} {len(lines[1])}")
    for file, text in zip((source, target), lines, strict=True):
        blank = next((number for number, line in enumerate(text, start=1) if not line.strip()), None)
        if blank:
            raise MissingDataError(f"{file}, line {blank}: no sentence")
    return lines


def _vocabularies(
    folder: Path, files: Sequence[Path], lines: tuple[list[str], list[str]], settings: schema.Translation
) -> tuple[Vocabulary, Vocabulary]:
    """Returns the vocabularies of source and target, made of the training sentences."""
    how = f"words min_count={settings.min_count} lowercase={settings.lowercase}"

    def made_of(chosen: slice) -> Vocabulary:
        def build() -> list[str]:
            text = (line for part in lines[chosen] for line in part)
            words = (word for line in text for word in vocabulary.split(line, lowercase=settings.lowercase))
            return [*SPECIALS, *vocabulary.by_frequency(words, settings.min_count)]

        return Vocabulary(vocabulary.cached(folder, files[chosen], how, build), UNKNOWN)

    if settings.shared:
        both = made_of(slice(0, 2))
        return both, both
    return made_of(slice(0, 1)), made_of(slice(1, 2))


def _numbered(
    lines: tuple[list[str], list[str]],
    languages: tuple[Vocabulary, Vocabulary],
    settings: schema.Translation,
) -> Sentences:
    sources, targets = (
        [torch.tensor(language.encode(vocabulary.split(line, lowercase=settings.lowercase))) for line in text]
        for text, language in zip(lines, languages, strict=True)
    )
    return Sentences([torch.cat([each, torch.tensor([END])]) for each in sources], targets, lines[1])


def _without_long(pairs: Sentences, longest: int) -> Sentences:
    kept = [
        place
        for place, (source, target) in enumerate(zip(pairs.sources, pairs.targets, strict=True))
        if max(len(source) - 1, len(target)) <= longest
    ]
    return Sentences(
        [pairs.sources[place] for place in kept],
        [pairs.targets[place] for place in kept],
        [pairs.references[place] for place in kept],
    )


def _padded(sentences: Sequence[Tensor], value: int) -> Tensor:
    return pad_sequence(list(sentences), batch_first=True, padding_value=value)
