from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hpcsngd.config import experiment as schema
from hpcsngd.train import data, tinydata, vision
from hpcsngd.train.faults import MissingDataError

MEAN, STD = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tinydata.write("imagenet", tmp_path)
    return tmp_path


def load(root: Path, **fields: Any) -> data.Splits:
    return data.load(
        schema.Data.model_validate({"name": "imagenet", "size": 32, **fields}), str(root), seed=1
    )


def pixels(images: torch.Tensor) -> torch.Tensor:
    return ((images * STD + MEAN) * 255).round().to(torch.uint8)


def test_folders_are_classes_and_torchvision_agrees(root: Path) -> None:
    splits = load(root)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (48, 16, 4)
    assert splits.evaluated == "validation"
    theirs = vision.load().datasets.ImageFolder(str(root / "imagenet" / "val"))
    assert theirs.targets == splits.test.labels.tolist()


@pytest.mark.parametrize("name", ["val", "validation"])
@pytest.mark.parametrize("is_below", [True, False])
def test_both_names_and_places_are_found(root: Path, name: str, is_below: bool) -> None:
    folder = root / "imagenet"
    (folder / "val").rename(folder / name)
    assert len(load(root if is_below else folder).test) == 16


def test_evaluation_sees_the_middle_as_torchvision_does(root: Path) -> None:
    """A smooth picture, where the half pixel by which torchvision rounds the middle makes no difference."""
    shutil.rmtree(root / "imagenet")
    for part in ("train", "val"):
        folder = root / "imagenet" / part / "a"
        folder.mkdir(parents=True)
        y, x = np.mgrid[:300, :400]
        picture = np.stack([x * 255 / 400, y * 255 / 300, (x + y) * 255 / 700], axis=-1).astype(np.uint8)
        Image.fromarray(picture).save(folder / "0.png")
    transforms = vision.load().transforms
    theirs = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()]
    )
    expected = theirs(Image.open(root / "imagenet" / "val" / "a" / "0.png"))
    ours = pixels(load(root, size=224).test[[0]][0])[0]
    assert (ours.int() - expected.int()).abs().max() <= 1


def test_training_images_are_the_middle_unless_a_crop_is_asked_for(root: Path) -> None:
    plain = load(root).train
    assert torch.equal(plain[data.Wanted([5, 9], 3)][0], plain[[5, 9]][0])
    cropped = load(root, augment={"resized_crop": True}).train
    first, second = (cropped[data.Wanted([5, 9], epoch)][0] for epoch in (0, 1))
    assert first.shape == (2, 3, 32, 32)
    for place in range(2):
        assert not torch.equal(first[place], second[place])
    assert torch.equal(cropped[data.Wanted([9], 0)][0][0], first[1])


def test_half_of_the_images_are_mirrored(root: Path) -> None:
    plain, flipped = load(root).train, load(root, augment={"flip": True}).train
    everything = list(range(48))
    before, after = plain[everything][0], flipped[data.Wanted(everything, 0)][0]
    mirrored = [torch.equal(b.flip(-1), a) for b, a in zip(before, after, strict=True)]
    same = [torch.equal(b, a) for b, a in zip(before, after, strict=True)]
    assert all(m or s for m, s in zip(mirrored, same, strict=True))
    # of 48, whose deviation is 3.5
    assert 10 < sum(mirrored) < 38


def test_sizes_may_differ_and_grow(root: Path) -> None:
    ramp = {"start": 32, "end": 96, "first_epoch": 1, "last_epoch": 3}
    splits = load(root, size=64, eval_size=48, resolution=ramp, augment={"resized_crop": True})
    assert (splits.train.size, splits.test.size) == (96, 48)
    sizes = [splits.train[data.Wanted([0], epoch)][0].shape[-1] for epoch in range(5)]
    assert sizes == [32, 32, 64, 96, 96]
    assert splits.test[[0]][0].shape == (1, 3, 48, 48)


def test_grey_pictures_and_transparent_ones_become_colors(root: Path) -> None:
    folder = root / "imagenet" / "train" / "n01440760"
    names = sorted(os.listdir(folder))
    grey = np.arange(2000, dtype=np.uint8).reshape(40, 50)
    Image.fromarray(grey).save(folder / names[0])
    Image.fromarray(np.dstack([grey] * 4)).save(folder / names[1], format="PNG")
    images, _ = load(root).train[[0, 1]]
    assert images.shape == (2, 3, 32, 32)
    assert torch.equal(pixels(images[:1])[0, 0], pixels(images[:1])[0, 2])


def test_limits_and_classes_take_images_with_their_labels(root: Path) -> None:
    splits = load(root, classes=2, train_limit=10)
    assert (len(splits.train), splits.num_classes) == (10, 2)
    whole = load(root).train
    images, labels = splits.train[list(range(10))]
    known = {image.numpy().tobytes(): label for image, label in zip(*whole[list(range(48))], strict=True)}
    assert all(known[image.numpy().tobytes()] == label for image, label in zip(images, labels, strict=True))


class TestMissing:
    def test_no_data(self, tmp_path: Path) -> None:
        with pytest.raises(MissingDataError, match=r"no imagenet below the data root .*train/<class>/"):
            load(tmp_path)

    def test_no_evaluation_images(self, root: Path) -> None:
        shutil.rmtree(root / "imagenet" / "val")
        with pytest.raises(MissingDataError, match="imagenet has train, but neither val nor validation"):
            load(root)

    def test_evaluation_images_without_folders(self, root: Path) -> None:
        """As ILSVRC's archive unpacks."""
        folder = root / "imagenet" / "val"
        for file in list(folder.rglob("*.JPEG")):
            file.rename(folder / file.name)
        for each in list(folder.iterdir()):
            if each.is_dir():
                each.rmdir()
        with pytest.raises(MissingDataError, match="val has no folders: images belong into one folder per"):
            load(root)

    def test_missing_classes(self, root: Path) -> None:
        shutil.rmtree(root / "imagenet" / "val" / "n01440762")
        with pytest.raises(MissingDataError, match=r"val lacks classes that train has: n01440762$"):
            load(root)
        for number in range(7):
            (root / "imagenet" / "val" / f"other{number}").mkdir()
        (root / "imagenet" / "val" / "n01440762").mkdir()
        with pytest.raises(MissingDataError, match=r"train lacks classes that val has: other0.* and 2 more$"):
            load(root)

    def test_empty_classes(self, root: Path) -> None:
        for file in (root / "imagenet" / "train" / "n01440761").iterdir():
            file.rename(file.with_suffix(".txt"))
        with pytest.raises(MissingDataError, match=r"train has classes without an image: n01440761$"):
            load(root)

    def test_a_damaged_image(self, root: Path) -> None:
        file = sorted((root / "imagenet" / "train" / "n01440760").iterdir())[0]
        file.write_bytes(file.read_bytes()[:300])
        with pytest.raises(MissingDataError, match=f"cannot read .*{file.name}"):
            load(root).train[[0]]
