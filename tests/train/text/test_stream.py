from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsngd.config import experiment as schema
from hpcsngd.train import data, tinydata
from hpcsngd.train.faults import MissingDataError, SettingError
from hpcsngd.train.losses import IGNORED
from hpcsngd.train.text.stream import Stream
from hpcsngd.train.text.vocabulary import CACHE


def write(folder: Path, **texts: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, text in texts.items():
        (folder / f"ptb.{part}.txt").write_text(text, encoding="utf-8")


def load(root: Path, name: str = "ptb", **stream: Any) -> data.Splits:
    return data.load(schema.Data.model_validate({"name": name, "stream": stream or None}), str(root))


@pytest.fixture
def ptb(tmp_path: Path) -> Path:
    write(
        tmp_path / "ptb",
        train=" the cat <unk> the mat \n the end \n",
        valid=" the mat \n",
        test=" a cat \n\n",
    )
    return tmp_path


def test_lines_become_tokens_with_an_end_each(ptb: Path) -> None:
    splits = load(ptb)
    # the: 3, <eos>: 2, and <unk>, cat, end, mat by the alphabet
    assert splits.num_classes == 6
    (inputs, targets), words = splits.train[[0]], ["the", "<eos>", "<unk>", "cat", "end", "mat"]
    text = [words[number] for number in [*inputs[0].tolist(), int(targets[0, -1])]]
    assert text == ["the", "cat", "<unk>", "the", "mat", "<eos>", "the", "end", "<eos>"]
    assert splits.evaluated == "validation"
    # a word that training has not becomes <unk>; the empty line is a line
    inputs, targets = splits.extra["test"][[0]]
    assert [words[number] for number in [*inputs[0].tolist(), int(targets[0, -1])]] == [
        "<unk>",
        "cat",
        "<eos>",
        "<eos>",
    ]
    assert list((ptb / "ptb" / CACHE).glob("vocabulary-*.txt"))


@pytest.mark.parametrize("streams", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [1, 4, 100])
def test_each_token_is_predicted_once_from_the_one_before(streams: int, length: int) -> None:
    tokens = torch.arange(30, dtype=torch.int32)
    text = Stream(tokens, 30, length).laid_out(streams)
    seen = []
    for start in range(0, len(text), streams):
        inputs, targets = text[list(range(start, start + streams))]
        assert inputs.shape == targets.shape
        real = targets != IGNORED
        assert torch.equal(targets[real], inputs[real] + 1)
        seen += targets[real].tolist()
    assert sorted(seen) == list(range(1, 30))
    assert len(text.targets) == len(text)
    assert sum(text.targets) == 29


def test_a_stream_goes_on_in_the_next_sample() -> None:
    text = Stream(torch.arange(41, dtype=torch.int32), 41, 5).laid_out(2)
    parts = [text[[0 + 2 * moment, 1 + 2 * moment]][0] for moment in range(4)]
    assert torch.cat(parts, dim=1).tolist() == [list(range(20)), list(range(20, 40))]
    assert text.targets == [5] * 8


def test_limits_take_the_beginning(ptb: Path) -> None:
    limited = data.load(schema.Data(name="ptb", train_limit=3, test_limit=1), str(ptb))
    assert sum(limited.train.targets or []) == 3
    assert torch.equal(limited.train[[0]][0], load(ptb).train[[0]][0][:, :3])
    assert [sum(part.targets or []) for part in (limited.test, limited.extra["test"])] == [1, 1]


def test_too_many_streams_are_refused(ptb: Path) -> None:
    with pytest.raises(SettingError, match="a text of 9 tokens cannot be 9 streams"):
        load(ptb).train.laid_out(9)
    assert len(load(ptb).train.laid_out(8)) == 8


def test_samples_follow_each_other(ptb: Path) -> None:
    train = load(ptb).train
    with pytest.raises(TypeError, match="none can be left out"):
        train.subset(torch.tensor([0]))
    with pytest.raises(TypeError, match="have no classes"):
        _ = train.labels


@pytest.mark.parametrize("name", ["ptb", "wikitext2", "wikitext103"])
def test_a_partial_folder_says_what_is_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=rf"no {name} below the data root .*\.train\."):
        load(tmp_path, name)
    tinydata.write(name, tmp_path)
    assert load(tmp_path, name).num_classes == 12
    folder = next(tmp_path.iterdir())
    for file in [*folder.glob("*.valid.*"), *folder.glob("*.test.*")]:
        file.unlink()
    with pytest.raises(MissingDataError, match=r"lacks \w+\.valid\.\w+, \w+\.test\.\w+$"):
        load(tmp_path, name)
    # the files may lie in the root itself
    tinydata.write(name, tmp_path)
    assert load(folder, name).num_classes == 12


def test_damage_is_named(ptb: Path) -> None:
    valid = ptb / "ptb" / "ptb.valid.txt"
    valid.write_bytes(b"fine \n caf\xe9 \n")
    with pytest.raises(MissingDataError, match=r"ptb\.valid\.txt, line 2: not UTF-8"):
        load(ptb)
    valid.write_text(" \n")
    with pytest.raises(MissingDataError, match=r"ptb\.valid\.txt is empty"):
        load(ptb)
    write(ptb / "ptb", train="a b \n", valid="a z \n")
    with pytest.raises(MissingDataError, match="the training text has no word 'z', and no <unk>"):
        load(ptb)
