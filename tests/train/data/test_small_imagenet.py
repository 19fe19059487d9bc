from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpcsngd.config import experiment as schema
from hpcsngd.train import data, tinydata
from hpcsngd.train.data import pickles
from hpcsngd.train.data.small_imagenet import PickledImages
from hpcsngd.train.faults import MissingDataError, SettingError
from hpcsngd.train.sampler import ShardedSampler


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tinydata.write("imagenet32", tmp_path)
    return tmp_path


def load(root: Path, **fields: Any) -> data.Splits:
    return data.load(schema.Data.model_validate({"name": "imagenet32", **fields}), str(root))


def content(root: Path, name: str) -> dict[str, Any]:
    read: dict[str, Any] = pickle.loads((root / "imagenet32" / name).read_bytes())
    return read


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the names of the files, as they are read from now on."""
    names: list[str] = []
    read = pickles.read

    def note(file: Path) -> dict[str, Any]:
        names.append(file.name)
        return read(file)

    monkeypatch.setattr(pickles, "read", note)
    return names


def test_images_are_paired_with_labels_from_0_and_lose_the_mean(root: Path) -> None:
    splits = load(root)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (48, 16, 1000)
    assert (splits.train.channels, splits.train.size, splits.evaluated) == (3, 32, "validation")
    # the seventh sample is the second of the second file
    file = content(root, "train_data_batch_2")
    images, labels = splits.train[[6]]
    assert labels.tolist() == [file["labels"][1] - 1] == [6]
    expected = (file["data"][1] / 255 - file["mean"] / 255).reshape(3, 32, 32)
    assert torch.allclose(images[0], torch.from_numpy(expected).float(), atol=1e-6)


def test_the_evaluation_file_loses_the_training_files_mean(root: Path) -> None:
    images, labels = load(root).test[[15, 3]]
    file = content(root, "val_data")
    assert "mean" not in file
    assert labels.tolist() == [file["labels"][15] - 1, file["labels"][3] - 1]
    mean = content(root, "train_data_batch_1")["mean"]
    expected = (file["data"][15] / 255 - mean / 255).reshape(3, 32, 32)
    assert torch.allclose(images[0], torch.from_numpy(expected).float(), atol=1e-6)


def test_a_batch_across_files_keeps_its_order(root: Path) -> None:
    train = load(root).train
    wanted = [40, 2, 6, 1, 41]
    images, labels = train[wanted]
    for place, index in enumerate(wanted):
        alone = train[[index]]
        assert torch.equal(images[place], alone[0][0])
        assert labels[place] == alone[1][0]


def test_an_epoch_opens_each_file_once(root: Path, opened: list[str]) -> None:
    train = load(root).train
    assert train.blocks == [5, 5, 5, 5, 5, 5, 5, 5, 4, 4]
    sampler = ShardedSampler(48, 4, blocks=train.blocks)
    opened.clear()
    seen: list[int] = []
    for epoch in range(2):
        sampler.start_at(epoch)
        for wanted in data.EpochSampler(sampler):
            train[wanted]
            seen += wanted.indices
    assert sorted(seen[:48]) == sorted(seen[48:]) == list(range(48))
    assert seen[:48] != seen[48:]
    # the file that ends the first epoch may begin the second
    first, second = opened[:10], opened[10:]
    assert len(set(first)) == 10
    assert sorted({*second, first[-1]}) == sorted(first)
    assert len(second) in (9, 10)


@pytest.mark.parametrize("by_block", [False, True])
def test_ranks_share_an_epoch_without_repetition_and_pairs_stay_right(root: Path, by_block: bool) -> None:
    """Every image is one number repeated, from which its label follows, on whichever rank it is."""
    number = 0
    for part in range(1, 11):
        file = root / "imagenet32" / f"train_data_batch_{part}"
        old = content(root, file.name)
        count = len(old["labels"])
        marks = np.arange(number, number + count)
        pixels = np.repeat(marks[:, None], 3 * 32 * 32, axis=1).astype(np.uint8)
        new = {"data": pixels, "labels": (marks % 7 + 1).tolist(), "mean": np.zeros(3 * 32 * 32)}
        file.write_bytes(pickle.dumps(new))
        number += count
    seen: list[int] = []
    for rank in range(3):
        train = load(root).train
        sampler = ShardedSampler(48, 2, rank=rank, ranks=3, blocks=train.blocks, by_block=by_block)
        for wanted in data.EpochSampler(sampler):
            images, labels = train[wanted]
            marks = (images[:, 0, 0, 0] * 255).round().long()
            assert torch.equal(labels, marks % 7)
            seen += marks.tolist()
    assert sorted(seen) == list(range(48))


def test_only_one_file_is_in_memory(root: Path) -> None:
    train = load(root).train
    assert isinstance(train, PickledImages)
    train[[0, 47]]
    assert train._resident is not None
    assert len(train._resident.pixels) == 4
    # loader processes do not get it
    assert pickle.loads(pickle.dumps(train))._resident is None


def test_classes_take_images_and_labels_together(root: Path) -> None:
    splits = load(root, classes=3)
    assert splits.num_classes == 3
    assert set(splits.train.labels.tolist()) == {0, 1, 2}
    assert sum(splits.train.blocks) == len(splits.train) == 15
    whole = load(root).train
    chosen = [index for index in range(48) if index % 10 < 3]
    for place in (0, 7, 14):
        assert torch.equal(splits.train[[place]][0], whole[[chosen[place]]][0])
        assert splits.train[[place]][1].tolist() == [chosen[place] % 10]


def test_too_many_or_absent_classes_are_refused(root: Path) -> None:
    with pytest.raises(SettingError, match="there are only 1000"):
        load(root, classes=1001)


def test_limits_keep_the_order_of_the_files(root: Path) -> None:
    train = load(root, train_limit=20).train
    assert sum(train.blocks) == len(train) == 20
    assert train._place_of.tolist() != list(range(20))  # type: ignore[attr-defined]
    assert train._file_of.tolist() == sorted(train._file_of.tolist())  # type: ignore[attr-defined]


def test_missing_files_are_named(root: Path) -> None:
    for name in ("train_data_batch_3", "val_data"):
        (root / "imagenet32" / name).unlink()
    with pytest.raises(MissingDataError, match=r"imagenet32 lacks train_data_batch_3, val_data$"):
        load(root)
    with pytest.raises(MissingDataError, match=r"no imagenet64 below the data root .*Imagenet64_train\.zip"):
        data.load(schema.Data(name="imagenet64"), str(root))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"labels": [0, 1, 2, 3, 4]}, "labels are not all within 1 to 1000"),
        ({"labels": [1, 2]}, "5 images but 2 labels"),
        ({"data": np.zeros((5, 3 * 64 * 64), np.uint8)}, r"data is uint8 of shape \(5, 12288\)"),
    ],
)
def test_damaged_files_are_named(root: Path, change: dict[str, Any], problem: str) -> None:
    file = root / "imagenet32" / "train_data_batch_4"
    file.write_bytes(pickle.dumps({**content(root, file.name), **change}))
    with pytest.raises(MissingDataError, match=f"train_data_batch_4: {problem}"):
        load(root)


def test_a_mean_of_another_size_is_refused(root: Path) -> None:
    file = root / "imagenet32" / "train_data_batch_1"
    file.write_bytes(pickle.dumps({**content(root, file.name), "mean": np.zeros(7)}))
    with pytest.raises(MissingDataError, match="mean has 7 numbers, not 3072"):
        load(root)


def test_64_pixels_are_read_as_well(tmp_path: Path) -> None:
    tinydata.write("imagenet64", tmp_path)
    splits = data.load(schema.Data(name="imagenet64", augment={"flip": True}), str(tmp_path))
    assert splits.train[data.Wanted([0, 30], 1)][0].shape == (2, 3, 64, 64)
