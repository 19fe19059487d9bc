"""Vocabularies: made of a training set once, kept beside it, the same on every rank."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hpcsngd.train.data.locks import on_first_rank
from hpcsngd.train.faults import MissingDataError

log = logging.getLogger(__name__)

#: Entries of a vocabulary of sentences that are no words, in this order from 0.
PADDING, UNKNOWN, START, END = range(4)
SPECIALS = ("<pad>", "<unk>", "<s>", "</s>")

CACHE = ".hpcsngd"
"""Folder beside the files of a data set."""

# words with the apostrophes and hyphens inside them, and every other character that is no blank
_PIECES = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")


class Vocabulary:
    """Words by their numbers.

    Args:
        words: in order; no word twice.
        unknown: number of every other word; None: there is none.

    Raises:
        ValueError: a word comes twice.
    """

    def __init__(self, words: Sequence[str], unknown: int | None) -> None:
        self.words = tuple(words)
        self._numbers = {word: number for number, word in enumerate(self.words)}
        self._unknown = unknown
        if len(self._numbers) != len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"the vocabulary has {twice!r} twice")

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Iterable[str]) -> list[int]:
        """Returns the words' numbers.

        Raises:
            KeyError: a word that is not known, where nothing stands for those.
        """
        if self._unknown is None:
            return [self._numbers[word] for word in words]
        return [self._numbers.get(word, self._unknown) for word in words]

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """Returns the words of the numbers."""
        return [self.words[number] for number in numbers]


def split(line: str, *, lowercase: bool) -> list[str]:
    """Returns the words and punctuation marks of a sentence."""
    return _PIECES.findall(line.lower() if lowercase else line)


def by_frequency(words: Iterable[str], min_count: int = 1) -> list[str]:
    """Returns the words that occur so often, the most frequent first, equal ones by the alphabet."""
    counts = Counter(words)
    kept = [word for word, count in counts.items() if count >= min_count]
    return sorted(kept, key=lambda word: (-counts[word], word))


def cached(folder: Path, sources: Sequence[Path], settings: str, build: Callable[[], list[str]]) -> list[str]:
    """Returns the words that ``build`` makes of files, from a file beside them if they have been made before.

    Rank 0 reads or builds, the others are told. The file's name follows from the bytes of the sources and
    from the settings, so it never stands for other data; it comes to be whole or not at all. Where the folder
    cannot be written to, every run builds anew.

    Args:
        folder: of the data set; the file is in `CACHE` below it.
        sources: what the words are made of.
        settings: what else they depend on.
        build: returns words without blanks.

    Raises:
        MissingDataError: a source cannot be read.
    """
    return on_first_rank(lambda: _cached(folder, sources, settings, build))


def _cached(
    folder: Path, sources: Sequence[Path], settings: str, build: Callable[[], list[str]]
) -> list[str]:
    file = folder / CACHE / f"vocabulary-{_key(sources, settings)}.txt"
    try:
        return file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        words = build()
    making = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        file.parent.mkdir(exist_ok=True)
        making.write_text("\n".join(words), encoding="utf-8")
        making.replace(file)
    except OSError as error:
        log.warning("the vocabulary is not kept: %s", error)
    return words


def _key(sources: Sequence[Path], settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for source in sources:
        try:
            with source.open("rb") as stream:
                while part := stream.read(2**20):
                    digest.update(part)
        except OSError as error:
            raise MissingDataError(f"cannot read {source}: {error}") from error
        digest.update(b"\0")
    return digest.hexdigest()[:16]
