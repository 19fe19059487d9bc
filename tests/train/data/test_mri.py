from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hpcsngd.config import experiment as schema
from hpcsngd.train import data, tinydata
from hpcsngd.train.data import mri, volumes
from hpcsngd.train.faults import MissingDataError, SettingError


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mri")
    tinydata.write("lgg-mri", root)
    return root


@pytest.fixture
def root(shared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared, tmp_path / "data"))


def load(root: Path, **fields: Any) -> data.Splits:
    settings = {"name": "lgg-mri", "size": 32, "validation_patients": 2, **fields}
    return data.load(schema.Data.model_validate(settings), str(root), seed=1)


def patients(root: Path) -> list[str]:
    return sorted(folder.name for folder in (root / "kaggle_3m").iterdir())


def test_patients_are_split_as_published(shared: Path) -> None:
    splits = load(shared)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (48, 16, 1)
    assert splits.evaluated == "validation"
    random.seed(42)
    expected = random.sample(patients(shared), 2)
    assert list(splits.test.groups.items()) == [(name, 8) for name in expected]
    assert sorted([*splits.train.groups, *splits.test.groups]) == patients(shared)


def test_the_published_110_patients_give_the_published_10() -> None:
    names = [f"patient{number:03}" for number in range(110)]
    random.seed(42)
    assert mri.split(names, 10, 42) == random.sample(names, 10)
    assert mri.split(names, 10, 43) != mri.split(names, 10, 42)


def test_slices_are_in_the_order_of_their_numbers(root: Path) -> None:
    """The tenth comes after the ninth, not after the first; the first and the last are left out."""
    splits = load(root, split_seed=0)
    name = next(iter(splits.train.groups))
    raw = [
        np.asarray(Image.open(root / "kaggle_3m" / name / f"{name}_{number}_mask.tif")).sum()
        for number in range(1, 11)
    ]
    kept = splits.train[list(range(8))][1].sum(dim=(1, 2, 3))
    assert [bool(count) for count in kept] == [bool(count) for count in raw[1:-1]]
    assert [bool(count) for count in raw].count(False) == 3


def test_slices_and_masks_are_changed_alike(shared: Path) -> None:
    changes = {"scale": 0.05, "rotate": 15, "flip": True}
    splits = load(shared, augment=changes)
    everything = list(range(48))
    (before, masks), (after, moved) = splits.train[everything], splits.train[data.Wanted(everything, 0)]
    assert after.shape == (48, 3, 32, 32)
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    # the tumor is the brightest spot, and stays it: what is marked is as bright as before
    has_tumor = masks.flatten(1).any(dim=1)
    bright = [
        (image.mean(dim=1, keepdim=True) * mask).sum() / mask.sum()
        for image, mask in ((before, masks), (after, moved))
    ]
    assert bright[1] == pytest.approx(float(bright[0]), rel=0.1)
    assert not torch.equal(masks[has_tumor], moved[has_tumor])
    assert torch.equal(splits.train[data.Wanted([7], 0)][1][0], moved[7])
    again = splits.train[data.Wanted(everything, 1)][1]
    assert not torch.equal(again, moved)


def test_limits_keep_patients_together(shared: Path) -> None:
    test = load(shared, test_limit=9).test
    assert sum(test.groups.values()) == len(test) == 9
    assert test._patient.tolist() == sorted(test._patient.tolist())  # type: ignore[attr-defined]


class TestMissing:
    def test_no_data(self, tmp_path: Path) -> None:
        with pytest.raises(MissingDataError, match=r"no lgg-mri below the data root .*kaggle_3m/<patient>"):
            load(tmp_path)

    @pytest.mark.parametrize(("suffix", "what"), [("_mask", "mask"), ("", "image")])
    def test_missing_slices(self, root: Path, suffix: str, what: str) -> None:
        name = patients(root)[3]
        for number in (4, 10):
            (root / "kaggle_3m" / name / f"{name}_{number}{suffix}.tif").unlink()
        with pytest.raises(MissingDataError, match=f"{name} lacks the {what} of slice 4, 10$"):
            load(root)

    def test_too_few_slices(self, root: Path) -> None:
        name = patients(root)[0]
        for number in range(3, 11):
            for suffix in ("", "_mask"):
                (root / "kaggle_3m" / name / f"{name}_{number}{suffix}.tif").unlink()
        with pytest.raises(MissingDataError, match=f"{name} has 2 slices .* at least 3"):
            load(root)

    def test_damaged_slices(self, root: Path) -> None:
        name = patients(root)[0]
        file = root / "kaggle_3m" / name / f"{name}_5.tif"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(MissingDataError, match=f"cannot read .*{file.name}"):
            load(root)

    def test_black_volumes(self, root: Path) -> None:
        name = patients(root)[0]
        for number in range(1, 11):
            Image.new("RGB", (48, 40)).save(root / "kaggle_3m" / name / f"{name}_{number}.tif")
        with pytest.raises(MissingDataError, match=f"{name}: the volume is black"):
            load(root)

    def test_too_few_patients(self, shared: Path) -> None:
        with pytest.raises(SettingError, match=r"8 patients, of which data\.validation_patients takes 10"):
            load(shared, validation_patients=None)


class TestPreparation:
    def volume(self) -> tuple[Any, Any]:
        volume = np.zeros((4, 10, 12, 3), dtype=np.uint8)
        volume[1:3, 2:9, 5:8] = np.arange(42 * 3).reshape(2, 7, 3, 3) + 100
        volume[0, 0, 0] = 5  # below 10 % of the brightest
        mask = np.zeros((4, 10, 12), dtype=np.uint8)
        mask[1, 3:5, 6] = 255
        return volume, mask

    def test_the_box_around_what_is_bright_is_kept(self) -> None:
        volume, mask = self.volume()
        cropped, marked = volumes.crop(volume, mask)
        assert np.array_equal(cropped, volume[1:3, 2:9, 5:8])
        assert np.array_equal(marked, mask[1:3, 2:9, 5:8])

    def test_slices_become_squares(self) -> None:
        cropped = np.ones((2, 7, 4, 3))
        square = volumes.pad(cropped)
        assert square.shape == (2, 7, 7, 3)
        # one column before and two after
        assert square[0, 0, :, 0].tolist() == [0, 1, 1, 1, 1, 0, 0]
        assert volumes.pad(np.ones((2, 4, 7))).sum(axis=2)[0].tolist() == [0, 7, 7, 7, 7, 0, 0]

    def test_masks_keep_their_values_and_slices_are_smooth(self) -> None:
        mask = np.zeros((2, 4, 4), dtype=np.uint8)
        mask[1, 1:3, 2:] = 1
        larger = volumes.resize(mask, 8, order=0)
        assert np.array_equal(larger, mask.repeat(2, axis=1).repeat(2, axis=2))
        ramp = np.tile(np.arange(16.0), (2, 16, 1))[..., None]
        smooth = volumes.resize(ramp, 32, order=2)
        assert smooth.dtype == np.float32
        # a straight line stays one away from the border, at the middles of the new pixels
        assert np.allclose(smooth[0, 16, 10:20, 0], (np.arange(10, 20) + 0.5) / 2 - 0.5, atol=1e-3)

    def test_channels_are_clipped_and_standardized(self) -> None:
        random_numbers = np.random.default_rng(0)
        volume = random_numbers.normal(100, 20, (3, 16, 16, 3))
        volume[0, 0, 0] = 1e6
        result = volumes.standardize(volume)
        assert np.allclose(result.mean(axis=(0, 1, 2)), 0, atol=1e-9)
        assert np.allclose(result.std(axis=(0, 1, 2)), 1)
        assert result.max() < 4

    def test_a_channel_of_one_value_stays_finite(self) -> None:
        volume = np.random.default_rng(0).normal(100, 20, (3, 8, 8, 3))
        volume[..., 1] = 100.0
        result = volumes.standardize(volume)
        assert np.isfinite(result).all()
        assert (result[..., 1] == 0).all()

    def test_the_whole_way(self) -> None:
        volume, mask = self.volume()
        prepared, marked = volumes.prepare(volume, mask, 16)
        assert prepared.shape == (2, 16, 16, 3)
        assert prepared.dtype == np.float32
        assert (marked.shape, marked.dtype, set(np.unique(marked))) == ((2, 16, 16), np.uint8, {0, 1})
        assert not marked[1].any()

    def test_masks_of_another_shape_are_refused(self) -> None:
        volume, mask = self.volume()
        with pytest.raises(ValueError, match=r"slices are \(4, 10, 12\), masks \(4, 9, 12\)"):
            volumes.prepare(volume, mask[:, :9], 16)
