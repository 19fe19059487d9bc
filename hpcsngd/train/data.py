"""The data sets, by the names that experiments use, and the loaders that feed them.

A data set is held in memory and indexed by a list of samples, so that one call makes one micro-batch. None of
them is augmented: loading draws no random number, and loader processes have no state worth saving.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hpcsngd import dist
from hpcsngd.config import experiment as schema
from hpcsngd.config.catalogue import DATASETS as CATALOGUE
from hpcsngd.errors import did_you_mean
from hpcsngd.train import seeds, vision
from hpcsngd.train.faults import MissingDataError, SettingError

Batch: TypeAlias = tuple[Tensor, Tensor]

#: Limits take the first samples of this fixed shuffle, the same for every run.
_SHUFFLE_SEED = 0

# Mean and standard deviation of the training pixels, in units of the full scale.
_DIGITS_SCALE, _DIGITS_MEAN, _DIGITS_STD = 16.0, 0.3052, 0.3758
_FASHION_SCALE, _FASHION_MEAN, _FASHION_STD = 255.0, 0.2862, 0.3529

_IDX_UNSIGNED_BYTES = 8


class Images(Dataset[Batch]):
    """Images in memory; indexing by a list of samples gives ``(n, channels, size, size)`` float32 and labels.

    Args:
        pixels: ``(samples, channels, size, size)``, uint8 to save memory.
        labels: ``(samples,)``, int64.
        scale: largest pixel value; pixels are divided by it.
        mean: subtracted after that.
        std: divided by after that.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, *, scale: float, mean: float, std: float) -> None:
        self._pixels, self._labels = pixels, labels
        self._scale, self._mean, self._std = scale, mean, std

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, indices: list[int]) -> Batch:
        pixels = self._pixels[indices].to(torch.float32)
        return (pixels / self._scale - self._mean) / self._std, self._labels[indices]

    @property
    def channels(self) -> int:
        """Returns the number of channels."""
        return self._pixels.shape[1]

    @property
    def size(self) -> int:
        """Returns height and width in pixels."""
        return self._pixels.shape[-1]

    def limited(self, count: int | None) -> Images:
        """Returns the first ``count`` samples of a fixed shuffle; all of them, in order, for None."""
        if count is None:
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(_SHUFFLE_SEED))[:count]
        return self.subset(chosen)

    def subset(self, chosen: Tensor) -> Images:
        """Returns the samples with these indices, in their order."""
        pixels, labels = self._pixels[chosen], self._labels[chosen]
        return Images(pixels, labels, scale=self._scale, mean=self._mean, std=self._std)

    @property
    def labels(self) -> Tensor:
        """Returns the labels, ``(samples,)``, int64."""
        return self._labels


@dataclass(frozen=True)
class Splits:
    """A data set.

    Attributes:
        train: what is trained on.
        test: what is evaluated.
        num_classes: number of classes.
        evaluated: what ``test`` is: the ``test`` set, or for cross-validation a ``validation`` set.
    """

    train: Images
    test: Images
    num_classes: int
    evaluated: Literal["test", "validation"] = "test"


def digits(root: Path | None, download: bool) -> Splits:
    """Returns scikit-learn's handwritten digits, 1,438 to train and 359 to test.

    The test set is every fifth sample of each class in scikit-learn's order, from the third on. That order
    goes through the writers one after the other, so both sets have all of them. No seed is involved.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pixels = torch.from_numpy(loaded.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(loaded.target).to(torch.int64)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        is_test[(labels == label).nonzero().flatten()[2::5]] = True

    def part(chosen: Tensor) -> Images:
        return Images(pixels[chosen], labels[chosen], scale=_DIGITS_SCALE, mean=_DIGITS_MEAN, std=_DIGITS_STD)

    return Splits(part(~is_test), part(is_test), 10)


def fashion_mnist(root: Path | None, download: bool) -> Splits:
    """Returns Fashion-MNIST, 60,000 to train and 10,000 to test, from its four idx files, plain or gzipped.

    Looked for in ``<root>/FashionMNIST/raw`` (torchvision's place), ``<root>/fashion-mnist``, ``<root>`` and
    where Debian's package puts them.

    Args:
        root: the data root.
        download: whether rank 0 may fetch missing files into torchvision's place.

    Raises:
        MissingDataError: not found; the message says how to get them.
    """
    if download and root is not None:
        _download_fashion(root)
    folder = _fashion_folder(root)
    if folder is None:
        facts = CATALOGUE["fashion-mnist"]
        raise MissingDataError(f"no fashion-mnist below the data root {root}: {facts.get}")

    def part(prefix: str) -> Images:
        pixels = read_idx(_idx_file(folder, f"{prefix}-images-idx3-ubyte")).unsqueeze(1)
        labels = read_idx(_idx_file(folder, f"{prefix}-labels-idx1-ubyte")).to(torch.int64)
        if len(pixels) != len(labels):
            raise MissingDataError(f"{folder}: {len(pixels)} {prefix} images but {len(labels)} labels")
        return Images(pixels, labels, scale=_FASHION_SCALE, mean=_FASHION_MEAN, std=_FASHION_STD)

    return Splits(part("train"), part("t10k"), 10)


DATASETS: dict[str, Callable[[Path | None, bool], Splits]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
}


def load(config: schema.Data, data_root: str | None) -> Splits:
    """Returns an experiment's data set, limited as it says; with folds, evaluates a part of the training set.

    Args:
        config: the experiment's ``data``.
        data_root: the site's folder of data sets; ``config.root`` wins over it.

    Raises:
        MissingDataError: the files are not there or damaged.
        SettingError: an unknown name, or folds that the data cannot be cut into.
    """
    if config.name not in DATASETS:
        hint = did_you_mean(config.name, DATASETS)
        raise SettingError(f"unknown data set {config.name!r}{hint} known: {', '.join(DATASETS)}")
    root = config.root or data_root
    splits = DATASETS[config.name](Path(root).expanduser() if root else None, config.download)
    train, test = splits.train.limited(config.train_limit), splits.test.limited(config.test_limit)
    if config.folds is None:
        return Splits(train, test, splits.num_classes)
    kept, held_out = fold(train.labels, config.folds)
    return Splits(train.subset(kept), train.subset(held_out), splits.num_classes, "validation")


def fold(labels: Tensor, config: schema.Folds) -> tuple[Tensor, Tensor]:
    """Returns the indices of the samples that are kept for training and of those that are held out.

    The folds are scikit-learn's `KFold` and `StratifiedKFold`. They follow from the labels and the settings
    alone, so runs that differ in ``index`` hold out every sample once between them.

    Args:
        labels: of the training set, ``(samples,)``.
        config: number of folds, which one is held out, and how they are drawn.

    Raises:
        SettingError: fewer samples, or fewer of some class, than folds.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    counts = labels.bincount()
    least = int(counts[counts > 0].min()) if config.stratified else len(labels)
    if least < config.count:
        what = "the rarest class has" if config.stratified else "there are"
        raise SettingError(f"{config.count} folds need as many samples, but {what} only {least}")
    make = StratifiedKFold if config.stratified else KFold
    folds = make(config.count, shuffle=config.shuffled, random_state=config.seed if config.shuffled else None)
    kept, held_out = list(folds.split(np.zeros(len(labels)), labels.numpy()))[config.index]
    return torch.from_numpy(kept), torch.from_numpy(held_out)


def loader(images: Images, sampler: Sampler[list[int]], *, workers: int, pin: bool) -> DataLoader[Batch]:
    """Returns a loader of the sampler's batches.

    Args:
        images: the data.
        sampler: yields the samples of each batch.
        workers: loader processes; 0 loads in this one.
        pin: whether batches lie in pinned memory, for copies to a GPU.
    """
    return DataLoader(
        images,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        # a fork would copy a process in which the threads of the communication library hold locks
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=pin,
        # DataLoader draws a seed for its workers in each epoch; not from the stream that training uses
        generator=seeds.generator(0, "loader"),
    )


def read_idx(file: Path) -> Tensor:
    """Returns the uint8 tensor in an idx file, which may be gzipped.

    Format: two zero bytes, the type (8 = unsigned byte), the number of dimensions, the dimensions as
    big-endian 32-bit numbers, the data (Y. LeCun, "The MNIST database").

    Raises:
        MissingDataError: the file is cut off or not of this format.
    """
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as error:
        raise MissingDataError(f"cannot read {file}: {error}") from error
    if len(data) < 4 or data[:3] != bytes([0, 0, _IDX_UNSIGNED_BYTES]):
        raise MissingDataError(
            f"{file} is not an idx file of unsigned bytes: it begins with {data[:4].hex()}"
        )
    start = 4 + 4 * data[3]
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)[start:]
    if len(values) != torch.Size(shape).numel():
        raise MissingDataError(f"{file} is damaged: {len(values)} values where its head announces {shape}")
    return values.reshape(shape)


def _fashion_folder(root: Path | None) -> Path | None:
    """Returns the first folder that holds all four files."""
    folders = [root / "FashionMNIST" / "raw", root / "fashion-mnist", root] if root else []
    folders += [Path(path).parent for path in CATALOGUE["fashion-mnist"].system_paths]
    names = [
        f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ]
    return next(
        (folder for folder in folders if all(_idx_file(folder, name).exists() for name in names)), None
    )


def _idx_file(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.exists() else folder / f"{name}.gz"


def _download_fashion(root: Path) -> None:
    """Lets rank 0 fetch missing files; all ranks learn whether that worked, so none waits for another."""
    problem = ""
    if dist.rank() == 0 and _fashion_folder(root) is None:
        try:
            vision.load().datasets.FashionMNIST(str(root), download=True)
        except (OSError, RuntimeError, ImportError) as error:
            problem = f"cannot download fashion-mnist into {root}: {error}"
    problem = dist.broadcast_object(problem)
    if problem:
        raise MissingDataError(problem)
