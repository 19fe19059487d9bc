"""Down-sampled ImageNet (Chrabaszcz et al., arXiv 1707.08819): ten pickles, of which one is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Self

from hpcsngd.config import experiment as schema
from hpcsngd.config.catalogue import DATASETS as CATALOGUE
from hpcsngd.train.data import augment, locks, pickles
from hpcsngd.train.data.draws import Draws
from hpcsngd.train.data.samples import Batch, Samples, Splits
from hpcsngd.train.faults import MissingDataError

_CLASSES = 1000
_TEST = "val_data"


def load_small_imagenet(size: int, root: Path | None, config: schema.Data) -> Splits:
    """Returns ImageNet in ``size x size`` pixels: 1,281,167 images to train, 50,000 to evaluate.

    Pixels are divided by 255 and lessened by the mean image that the training files hold.

    Args:
        size: 32 or 64.
        root: the data root, which holds the folder ``imagenet<size>``, or the files themselves.
        config: the experiment's ``data``.

    Raises:
        MissingDataError: files are missing or damaged; the message names them.
    """
    name = f"imagenet{size}"
    folders = [root / name, root] if root else []
    known = CATALOGUE[name]
    folder = next((each for each in folders if any((each / file).exists() for file in known.files)), None)
    if folder is None:
        raise MissingDataError(f"no {name} below the data root {root}: {known.get}")
    if absent := known.absent(lambda file: (folder / file).is_file()):
        raise MissingDataError(f"{folder} lacks {', '.join(absent)}")
    train_files = [file for file in known.files if file != _TEST]
    # every rank needs all labels, but only one has to read all files for them
    train, test = locks.on_first_rank(
        lambda: (_labels(folder, train_files, size), _labels(folder, (_TEST,), size))
    )
    first = folder / train_files[0]
    (mean,) = pickles.fields(first, "mean")  # the evaluation file has none of its own
    return Splits(
        PickledImages([folder / file for file in train_files], train, size),
        PickledImages([folder / _TEST], test, size, mean=_mean_image(first, mean, size)),
        _CLASSES,
        "validation",
    )


imagenet32 = partial(load_small_imagenet, 32)
imagenet64 = partial(load_small_imagenet, 64)


@dataclass
class _Resident:
    """The one file in memory: which one, its pixels ``(n, 3, size, size)`` uint8 and mean image / 255."""

    number: int
    pixels: Tensor
    mean: Tensor


class PickledImages(Samples):
    """Images in several files, of which the one that was asked for last is in memory.

    Args:
        files: the pickles.
        labels: for each file the labels of its images, from 0.
        size: height and width in pixels.
        mean: mean image / 255, ``(3, size, size)``; default: each file's own.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[npt.NDArray[np.int64]],
        size: int,
        mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.size = 3, size
        self._files, self._mean = list(files), mean
        self._labels = torch.from_numpy(np.concatenate(labels))
        counts = torch.tensor([len(some) for some in labels])
        # for each sample its file and its place in it
        self._file_of = torch.repeat_interleave(torch.arange(len(counts)), counts)
        self._place_of = torch.cat([torch.arange(int(count)) for count in counts])
        self._resident: _Resident | None = None

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Tensor:
        """Returns the labels, ``(samples,)``, int64, from 0."""
        return self._labels

    @property
    def blocks(self) -> list[int]:
        """Returns the number of samples in each file."""
        counts: list[int] = self._file_of.bincount(minlength=len(self._files)).tolist()
        return [count for count in counts if count]

    def take(self, indices: list[int], draws: Draws | None) -> Batch:
        """Returns images less their mean and labels; loads each file that some of them lie in, once."""
        wanted = torch.tensor(indices)
        files, pixels, means = self._file_of[wanted], [], []
        # the resident file first, so that a batch across two files loads one
        first = -1 if self._resident is None else self._resident.number
        numbers: list[int] = sorted(set(files.tolist()), key=lambda number: (number != first, number))
        order = torch.cat([(files == number).nonzero().flatten() for number in numbers])
        for number in numbers:
            resident = self._load(number)
            pixels.append(resident.pixels[self._place_of[wanted[files == number]]])
            means.append(resident.mean.expand(len(pixels[-1]), -1, -1, -1))
        back = order.argsort()
        images, mean = torch.cat(pixels)[back].float() / 255, torch.cat(means)[back]
        images = images - mean
        if draws is not None:
            images = augment.cutout(augment.move(images, self._augment, draws), self._augment.cutout, draws)
        return images, self._labels[wanted]

    def subset(self, chosen: Tensor) -> Self:
        """Returns the samples with these indices, in the order of the files."""
        chosen = chosen.sort().values
        return self._changed(
            _labels=self._labels[chosen], _file_of=self._file_of[chosen], _place_of=self._place_of[chosen]
        )

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a loader process needs: not the file in memory."""
        return {**self.__dict__, "_resident": None}

    def _load(self, number: int) -> _Resident:
        if self._resident is None or self._resident.number != number:
            self._resident = None  # before the next one: only one fits in memory
            file = self._files[number]
            data, *mean = pickles.fields(file, "data", *(["mean"] if self._mean is None else []))
            pixels = torch.from_numpy(pickles.pixels(file, data, self.size))
            image = _mean_image(file, mean[0], self.size) if self._mean is None else self._mean
            self._resident = _Resident(number, pixels, image)
        return self._resident


def _labels(folder: Path, names: Sequence[str], size: int) -> list[npt.NDArray[np.int64]]:
    """Returns each file's labels, from 0; in the files they are from 1."""
    labels = []
    for name in names:
        data, some = pickles.fields(folder / name, "data", "labels")
        count = len(pickles.pixels(folder / name, data, size))
        if len(some) != count:
            raise MissingDataError(f"{folder / name}: {count} images but {len(some)} labels")
        labels.append(np.asarray(some, dtype=np.int64) - 1)
        if count and not 0 <= labels[-1].min() <= labels[-1].max() < _CLASSES:
            raise MissingDataError(f"{folder / name}: labels are not all within 1 to {_CLASSES}")
    return labels


def _mean_image(file: Path, mean: Any, size: int) -> Tensor:
    """Returns a file's ``mean`` / 255 as an image."""
    values = torch.as_tensor(np.asarray(mean), dtype=torch.float32)
    if values.numel() != 3 * size * size:
        raise MissingDataError(f"{file}: mean has {values.numel()} numbers, not {3 * size * size}")
    return values.reshape(3, size, size) / 255
