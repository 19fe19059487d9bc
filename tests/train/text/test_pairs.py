from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsngd.config import experiment as schema
from hpcsngd.train import data, tinydata
from hpcsngd.train.faults import MissingDataError
from hpcsngd.train.losses import IGNORED
from hpcsngd.train.text.pairs import Pairs
from hpcsngd.train.text.vocabulary import CACHE, END, PADDING, SPECIALS, START, UNKNOWN

GERMAN = ["Ein Hund läuft.", "Ein Mann", "Ein Mann und ein Hund schlafen ."]
ENGLISH = ["A dog runs.", "A man", "A man and a dog sleep ."]


def write(folder: Path, german: list[str] = GERMAN, english: list[str] = ENGLISH) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val", "test"):
        for language, lines in (("de", german), ("en", english)):
            (folder / f"{part}.{language}").write_text(
                "".join(f"{line}\n" for line in lines), encoding="utf-8"
            )
    return folder


def load(root: Path, **translation: Any) -> tuple[Pairs, data.Splits]:
    settings = {"min_count": 1} | translation
    splits = data.load(schema.Data.model_validate({"name": "multi30k", "translation": settings}), str(root))
    assert isinstance(splits.train, Pairs)
    return splits.train, splits


def test_lines_become_pairs_of_padded_sentences(tmp_path: Path) -> None:
    write(tmp_path / "multi30k")
    train, splits = load(tmp_path)
    source, known, wanted = train[[0, 1]]
    german, english = train.languages
    assert german.decode(source[0].tolist()) == ["ein", "hund", "läuft", ".", "</s>"]
    assert german.decode(source[1].tolist()) == ["ein", "mann", "</s>", "<pad>", "<pad>"]
    assert english.decode(known[0].tolist()) == ["<s>", "a", "dog", "runs", "."]
    assert wanted[0].tolist() == [*english.encode(["a", "dog", "runs", "."]), END]
    assert wanted[1].tolist() == [*english.encode(["a", "man"]), END, IGNORED, IGNORED]
    assert known[1].tolist() == [START, *english.encode(["a", "man"]), PADDING, PADDING]
    assert train.references == ENGLISH
    assert train.targets == [5, 3, 8]
    assert splits.num_classes == len(english)
    assert english.words[:4] == SPECIALS
    assert [len(part) for part in (splits.test, splits.extra["test"])] == [3, 3]
    assert [tuple(part.shape) for part in train.example(4)] == [(4, 8), (4, 8)]


def test_the_way_case_and_vocabularies_are_settings(tmp_path: Path) -> None:
    write(tmp_path / "multi30k")
    train, _ = load(tmp_path, source="en", lowercase=False)
    assert train.languages[0].decode(train[[1]][0][0].tolist()) == ["A", "man", "</s>"]
    assert train.references == GERMAN
    shared, _ = load(tmp_path, shared=True)
    assert shared.languages[0] is shared.languages[1]
    assert {"hund", "dog"} < set(shared.languages[0].words)
    rare, _ = load(tmp_path, min_count=2)
    assert "runs" not in rare.languages[1].words
    assert UNKNOWN in rare[[0]][2][0].tolist()
    # de, en, each with case and not, both, and two with min_count
    load(tmp_path, source="en")
    assert len(list((tmp_path / "multi30k" / CACHE).iterdir())) == 7


def test_long_pairs_are_left_out_of_training_alone(tmp_path: Path) -> None:
    write(tmp_path)
    train, splits = load(tmp_path, max_words=4)
    assert train.references == ENGLISH[:2]
    assert len(splits.test) == 3
    with pytest.raises(MissingDataError, match="no pair of at most 1 words"):
        load(tmp_path, max_words=1)


def test_buckets_have_like_lengths(tmp_path: Path) -> None:
    tinydata.write("multi30k", tmp_path)
    train, _ = load(tmp_path, buckets=4)
    assert train.blocks == [12] * 4
    assert train.targets == sorted(train.targets)
    half = train.subset(torch.arange(0, 48, 2).flip(0))
    assert half.targets == sorted(half.targets)
    assert half.blocks == [6] * 4
    plain, _ = load(tmp_path)
    assert plain.blocks == [48]
    assert sorted(plain.references) == sorted(train.references)
    assert plain.subset(torch.tensor([5, 2])).references == [plain.references[5], plain.references[2]]


@pytest.mark.parametrize("name", ["test_2016_flickr", "test2016"])
def test_other_names_of_the_test_set_will_do(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    for language in ("de", "en"):
        (tmp_path / f"test.{language}").rename(tmp_path / f"{name}.{language}")
    assert len(load(tmp_path)[1].extra["test"]) == 3


def test_wrong_and_partial_folders_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        MissingDataError, match=r"no multi30k below the data root .*mmt16_task1_test\.tar\.gz"
    ):
        load(tmp_path)
    write(tmp_path)
    (tmp_path / "val.en").unlink()
    (tmp_path / "test.de").unlink()
    with pytest.raises(MissingDataError, match=r"lacks val\.en, test\.de$"):
        load(tmp_path)


def test_lines_that_are_not_parallel_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "val.en").write_text("one\ntwo\n")
    with pytest.raises(MissingDataError, match=r"val\.de has 3 lines, .*val\.en 2"):
        load(tmp_path)
    write(tmp_path, english=["A dog", "", "A man"])
    with pytest.raises(MissingDataError, match=r"train\.en, line 2: no sentence"):
        load(tmp_path)
