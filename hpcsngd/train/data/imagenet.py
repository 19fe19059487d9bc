"""ImageNet-1k, or any other images in one folder per class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from hpcsngd.config import experiment as schema
from hpcsngd.config.catalogue import DATASETS as CATALOGUE
from hpcsngd.train.data import augment, locks
from hpcsngd.train.data.draws import Draws, Numbers
from hpcsngd.train.data.samples import Batch, Samples, Splits
from hpcsngd.train.faults import MissingDataError

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".ppm", ".webp")
_EVALUATION = ("val", "validation")
_SIZE = 224
# In evaluation the middle 224/256 of the shorter side are seen (Krizhevsky et al., NIPS 2012, section 4.1).
_SEEN = 224 / 256
_SHOWN = 5

_MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


def imagenet(root: Path | None, config: schema.Data) -> Splits:
    """Returns the images below ``train`` and below ``val`` or ``validation``, one class per folder.

    Looked for in ``<root>/imagenet`` and in the root itself. Rank 0 alone lists the folders.

    Args:
        root: the data root.
        config: the experiment's ``data``; ``size`` is 224 by default.

    Raises:
        MissingDataError: a folder is missing or empty, or the two have other classes; the message names them.
    """
    folders = [root / "imagenet", root] if root else []
    folder = next((each for each in folders if (each / "train").is_dir()), None)
    if folder is None:
        raise MissingDataError(f"no imagenet below the data root {root}: {CATALOGUE['imagenet'].get}")
    names, train, (evaluation, test) = locks.on_first_rank(lambda: _list(folder))
    size = config.size or _SIZE
    return Splits(
        ImageFiles(folder / "train", names, train, size, ramp=config.resolution),
        ImageFiles(folder / evaluation, names, test, config.eval_size or size),
        len(names),
        "validation",
    )


class ImageFiles(Samples):
    """Images that are read from their files each time, and brought to one size.

    Args:
        folder: the folder of the classes' folders.
        classes: their names.
        files: for each class the names of its images, encoded.
        size: height and width of the result in pixels.
        ramp: how training images grow; default: they do not.
    """

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str],
        files: Sequence[np.ndarray],
        size: int,
        *,
        ramp: schema.Resolution | None = None,
    ) -> None:
        super().__init__()
        self.channels, self._size, self._ramp = 3, size, ramp
        self.size = size if ramp is None else max(ramp.start, ramp.end)
        self._folder, self._classes = folder, list(classes)
        # arrays, not lists: loader processes share the memory of a million names
        self._files = np.concatenate(files)
        self._labels = torch.repeat_interleave(
            torch.arange(len(files)), torch.tensor([len(some) for some in files])
        )

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Tensor:
        """Returns the labels, ``(samples,)``, int64."""
        return self._labels

    def subset(self, chosen: Tensor) -> Self:
        """Returns the samples with these indices, in their order."""
        return self._changed(_files=self._files[chosen.numpy()], _labels=self._labels[chosen])

    def take(self, indices: list[int], draws: Draws | None) -> Batch:
        """Returns standardized images of one size and labels; of the ramp's size in training."""
        size, flips = self._size, np.zeros(len(indices), dtype=bool)
        boxes: Sequence[Numbers | None] = [None] * len(indices)
        if draws is not None:
            size = size if self._ramp is None else augment.resolution_at(self._ramp, draws.epoch)
            boxes = [*draws.uniform("area")] if self._augment.resized_crop else boxes
            flips = self._augment.flip & (draws.uniform("flip")[:, 0] < 0.5)
        images = torch.stack(
            [
                self._read(index, size, numbers, is_flipped=bool(is_flipped))
                for index, numbers, is_flipped in zip(indices, boxes, flips, strict=True)
            ]
        )
        images = (images.float() / 255 - _MEAN) / _STD
        if draws is not None:
            images = augment.cutout(images, self._augment.cutout, draws)
        return images, self._labels[indices]

    def _read(self, index: int, size: int, numbers: Numbers | None, *, is_flipped: bool) -> Tensor:
        """Returns one image, uint8 ``(3, size, size)``: a random part of it, or the middle."""
        from PIL import Image

        file = self._folder / self._classes[int(self._labels[index])] / os.fsdecode(self._files[index])
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise MissingDataError(f"cannot read {file}: {error}") from error
        if numbers is None:
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=_middle(image))
        else:
            part = image.crop(augment.crop_box(image.width, image.height, numbers))
            image = part.resize((size, size), Image.Resampling.BILINEAR)
        if is_flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).movedim(-1, 0)


def _middle(image: Image) -> tuple[float, float, float, float]:
    """Returns the box of the middle square: the same as resizing the shorter side to 256 and cropping 224."""
    side = _SEEN * min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    return left, top, left + side, top + side


def _list(folder: Path) -> tuple[list[str], list[np.ndarray], tuple[str, list[np.ndarray]]]:
    """Returns the classes, the training files of each, and the evaluation folder's name with its files."""
    evaluation = next((name for name in _EVALUATION if (folder / name).is_dir()), None)
    if evaluation is None:
        raise MissingDataError(f"{folder} has train, but neither {' nor '.join(_EVALUATION)}")
    names = _classes(folder / "train")
    others = _classes(folder / evaluation)
    for here, there, missing in (
        (folder / evaluation, "train", sorted(set(names) - set(others))),
        (folder / "train", evaluation, sorted(set(others) - set(names))),
    ):
        if missing:
            raise MissingDataError(f"{here} lacks classes that {there} has: {_some(missing)}")
    return names, _files(folder / "train", names), (evaluation, _files(folder / evaluation, names))


def _classes(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise MissingDataError(f"{folder} has no folders: images belong into one folder per class")
    return names


def _files(folder: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Returns the sorted file names of each class as bytes."""
    files = [
        sorted(os.fsencode(entry.name) for entry in os.scandir(folder / name) if _is_image(entry.name))
        for name in names
    ]
    empty = [name for name, some in zip(names, files, strict=True) if not some]
    if empty:
        raise MissingDataError(f"{folder} has classes without an image: {_some(empty)}")
    return [np.array(some) for some in files]


def _is_image(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
