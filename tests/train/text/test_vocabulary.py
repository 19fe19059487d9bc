from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hpcsngd.train.faults import MissingDataError
from hpcsngd.train.text.vocabulary import CACHE, Vocabulary, by_frequency, cached, split


def test_words_come_by_frequency_and_then_by_the_alphabet() -> None:
    assert by_frequency(["b", "a", "c", "b", "a", "d"], min_count=1) == ["a", "b", "c", "d"]
    assert by_frequency(["b", "c", "c", "b", "a", "c"], min_count=2) == ["c", "b"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Zwei junge weiße Männer.", ["zwei", "junge", "weiße", "männer", "."]),
        ("A man's T-shirt, well-worn!", ["a", "man's", "t-shirt", ",", "well-worn", "!"]),
        ('"Stop" -- he said', ['"', "stop", '"', "-", "-", "he", "said"]),
    ],
)
def test_sentences_are_cut_at_blanks_and_punctuation(line: str, words: list[str]) -> None:
    assert split(line, lowercase=True) == words
    assert "".join(split(line, lowercase=False)) == line.replace(" ", "")


def test_words_and_numbers_go_both_ways() -> None:
    vocabulary = Vocabulary(["<unk>", "a", "b"], unknown=0)
    assert vocabulary.encode(["b", "never", "a"]) == [2, 0, 1]
    assert vocabulary.decode([2, 0, 1]) == ["b", "<unk>", "a"]
    with pytest.raises(KeyError, match="never"):
        Vocabulary(["a"], unknown=None).encode(["never"])
    with pytest.raises(ValueError, match="has 'a' twice"):
        Vocabulary(["a", "b", "a"], unknown=None)


class Builder:
    """Makes the words of a file and counts how often."""

    def __init__(self, file: Path) -> None:
        self.file, self.calls = file, 0

    def __call__(self) -> list[str]:
        self.calls += 1
        return by_frequency(self.file.read_text(encoding="utf-8").split())


def test_it_is_built_once_for_a_text_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    file.write_text("b ä b \u2028 c", encoding="utf-8")
    build = Builder(file)
    first = cached(tmp_path, [file], "settings", build)
    assert first == cached(tmp_path, [file], "settings", build) == ["b", "c", "ä"]
    assert build.calls == 1
    assert len(list((tmp_path / CACHE).iterdir())) == 1
    cached(tmp_path, [file], "others", build)
    file.write_text("another text", encoding="utf-8")
    assert cached(tmp_path, [file], "settings", build) == ["another", "text"]
    assert build.calls == 3


def test_a_folder_that_takes_no_file_is_no_obstacle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "train.txt"
    file.write_text("a b")
    (tmp_path / CACHE / "x").mkdir(parents=True)
    build = Builder(file)
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", _refuse)
        assert cached(tmp_path, [file], "", build) == cached(tmp_path, [file], "", build) == ["a", "b"]
    assert build.calls == 2
    assert "the vocabulary is not kept: read-only" in caplog.text


def _refuse(*_: object, **__: object) -> int:
    raise OSError("read-only")


def test_a_text_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"cannot read .*gone\.txt"):
        cached(tmp_path, [tmp_path / "gone.txt"], "", lambda: ["a"])
