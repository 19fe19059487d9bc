from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcsngd.config.experiment import Augment, Resolution
from hpcsngd.train.data import Images, Wanted, augment
from hpcsngd.train.data.draws import USES, Draws


class Fixed(Draws):
    """Draws that are chosen: use -> numbers of one sample."""

    def __init__(self, **numbers: list[float]) -> None:
        self._numbers = numbers

    def uniform(self, use: str) -> Any:
        return np.array([self._numbers[use]])


def picture(size: int = 6, channels: int = 2, count: int = 1) -> Tensor:
    return torch.arange(1, count * channels * size * size + 1).reshape(count, channels, size, size)


class TestDraws:
    def test_they_are_the_same_on_every_machine(self) -> None:
        numbers = Draws(1, 2, [0, 7]).uniform("crop")
        assert numbers.tolist() == [
            [0.21010441189607987, 0.18757830062765357],
            [0.21860938365762295, 0.24935065162059145],
        ]

    def test_a_samples_numbers_do_not_depend_on_its_batch(self) -> None:
        together, alone = Draws(1, 0, [5, 3, 9]), Draws(1, 0, [9])
        for use in USES:
            assert together.uniform(use)[2].tolist() == alone.uniform(use)[0].tolist()

    def test_they_differ_by_seed_epoch_sample_and_use(self) -> None:
        seen = {
            float(number)
            for seed in (0, 1)
            for epoch in (0, 1)
            for use in USES
            for number in Draws(seed, epoch, range(50)).uniform(use).flat
        }
        assert len(seen) == 2 * 2 * 50 * sum(count for _, count in USES.values())

    def test_they_are_even_over_samples_and_over_epochs(self) -> None:
        samples = Draws(0, 0, range(4000)).uniform("flip")[:, 0]
        epochs = np.array([Draws(0, epoch, [3]).uniform("flip")[0, 0] for epoch in range(4000)])
        for numbers in (samples, epochs):
            assert (numbers >= 0).all()
            assert (numbers < 1).all()
            # 400 each, whose deviation is 19; five of them
            assert np.abs(np.histogram(numbers, 10, (0, 1))[0] - 400).max() < 95
            assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.08


class TestCropAndFlip:
    def test_a_crop_moves_the_image_and_fills_up_with_zeros(self) -> None:
        image = picture()
        # of 5 places each, the first row and the last column
        moved = augment.crop_and_flip(image, 2, flip=False, draws=Fixed(crop=[0.0, 0.999]))
        assert torch.equal(moved[:, :, 2:, :4], image[:, :, :4, 2:])
        assert moved[:, :, :2].abs().max() == 0
        assert moved[:, :, :, 4:].abs().max() == 0

    def test_half_of_the_images_are_mirrored(self) -> None:
        image = picture()
        for number, expected in ((0.49, image.flip(3)), (0.5, image)):
            draws = Fixed(crop=[0.5, 0.5], flip=[number])
            assert torch.equal(augment.crop_and_flip(image, 0, flip=True, draws=draws), expected)

    def test_every_place_of_a_crop_is_as_likely(self) -> None:
        images = torch.zeros(9000, 1, 5, 5)
        images[:, :, 2, 2] = 1
        moved = augment.crop_and_flip(images, 1, flip=False, draws=Draws(0, 0, range(9000)))
        counts = moved.sum(dim=(0, 1))[1:4, 1:4]
        assert counts.sum() == 9000
        # 1000 each, whose deviation is 30; five of them
        assert (counts - 1000).abs().max() < 150


class TestResample:
    def test_a_quarter_turn_is_one(self) -> None:
        image = picture().float()
        turned = augment.resample(
            image, Augment(rotate=90), Fixed(scale=[0.5], rotate=[1.0]), mode="bilinear"
        )
        assert torch.allclose(turned, image.rot90(1, (2, 3)), atol=1e-4)

    def test_scaling_enlarges_the_middle(self) -> None:
        mask = torch.zeros(1, 1, 8, 8)
        mask[:, :, 3:5, 3:5] = 1
        # a factor of 1 + 0.999
        changes = Augment(scale=0.999)
        larger = augment.resample(mask, changes, Fixed(scale=[1.0], rotate=[0.5]), mode="nearest")
        assert larger.sum() == 16
        assert larger[:, :, 2:6, 2:6].min() == 1

    def test_bytes_stay_bytes(self) -> None:
        image = torch.full((1, 1, 5, 5), 200, dtype=torch.uint8)
        turned = augment.resample(
            image, Augment(rotate=10), Fixed(scale=[0.5], rotate=[0.9]), mode="bilinear"
        )
        assert turned.dtype == torch.uint8
        assert turned[0, 0, 2, 2] == 200


def test_cutout_hides_a_square_of_its_size_or_what_is_inside_of_it() -> None:
    images = torch.ones(1, 3, 10, 10)
    inside = augment.cutout(images, 4, Fixed(cutout=[0.5, 0.5]))
    assert (1 - inside[0]).sum(dim=(1, 2)).tolist() == [16, 16, 16]
    assert inside[0, 0, 3:7, 3:7].max() == 0
    corner = augment.cutout(images, 4, Fixed(cutout=[0.0, 0.0]))
    assert (1 - corner[0, 0]).sum() == 4
    assert torch.equal(augment.cutout(images, 0, Fixed()), images)


class TestCropBox:
    def boxes(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        numbers = Draws(0, 0, range(500)).uniform("area")
        return [augment.crop_box(width, height, each) for each in numbers]

    def test_boxes_have_the_published_areas_and_ratios(self) -> None:
        areas, ratios = [], []
        for left, top, right, bottom in self.boxes(500, 400):
            assert 0 <= left < right <= 500
            assert 0 <= top < bottom <= 400
            areas.append((right - left) * (bottom - top) / (500 * 400))
            ratios.append((right - left) / (bottom - top))
        # rounding to pixels moves them a little
        assert 0.075 < min(areas) < 0.15
        assert 0.9 < max(areas) <= 1
        assert 0.74 < min(ratios) < 0.8
        assert 1.25 < max(ratios) < 1.35

    def test_an_extreme_image_gives_its_middle(self) -> None:
        assert set(self.boxes(1000, 3)) == {(498, 0, 502, 3)}


@pytest.mark.parametrize(
    ("epoch", "size"), [(0, 160), (65, 160), (70, 160), (71, 192), (75, 192), (76, 192), (87, 192)]
)
def test_resolution_grows_in_steps_of_32(epoch: int, size: int) -> None:
    ramp = Resolution(start=160, end=192, first_epoch=65, last_epoch=76)
    assert augment.resolution_at(ramp, epoch) == size


def test_a_ramp_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match="last_epoch must not be before first_epoch"):
        Resolution(start=160, end=192, first_epoch=5, last_epoch=4)


class TestImages:
    def images(self, **changes: Any) -> Images:
        pixels = (picture(8, 1, count=20) % 251).to(torch.uint8)
        labels = torch.arange(20)
        made = Images(pixels, labels, scale=255.0, mean=0.4, std=0.2)
        return made.augmented(Augment(**changes), seed=5)

    def test_a_plain_list_gives_samples_as_they_are(self) -> None:
        changed, plain = self.images(crop=2, flip=True, cutout=3), self.images()
        assert torch.equal(changed[[3, 1]][0], plain[[3, 1]][0])
        assert torch.equal(plain[Wanted([3, 1], 0)][0], plain[[3, 1]][0])

    def test_changes_follow_from_seed_epoch_and_sample_alone(self) -> None:
        images = self.images(crop=2, flip=True, cutout=3)
        together = images[Wanted(list(range(20)), 4)][0]
        backwards = images[Wanted(list(range(19, -1, -1)), 4)][0]
        assert torch.equal(together, backwards.flip(0))
        assert torch.equal(together, self.images(crop=2, flip=True, cutout=3)[Wanted(list(range(20)), 4)][0])

    def test_epochs_and_seeds_differ(self) -> None:
        images = self.images(crop=2, flip=True)
        everything = list(range(20))
        first, second = (images[Wanted(everything, epoch)][0] for epoch in (0, 1))
        other = images.augmented(Augment(crop=2, flip=True), seed=6)[Wanted(everything, 0)][0]
        for changed in (second, other):
            same = [torch.equal(a, b) for a, b in zip(first, changed, strict=True)]
            # one of 50 changes is the same by chance
            assert sum(same) <= 3

    def test_padding_is_black_and_cutout_is_the_mean(self) -> None:
        black, mean = -0.4 / 0.2, 0.0
        cropped = self.images(crop=8)[Wanted(list(range(20)), 0)][0]
        assert torch.isclose(cropped, torch.tensor(black)).any()
        cut = self.images(cutout=4)[Wanted(list(range(20)), 0)][0]
        assert (cut == mean).flatten(1).any(dim=1).all()

    def test_labels_stay_with_their_images(self) -> None:
        assert self.images(crop=2)[Wanted([7, 2], 0)][1].tolist() == [7, 2]
