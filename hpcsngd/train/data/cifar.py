"""CIFAR-10 and CIFAR-100: the folders of pickles that the archives for Python unpack to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hpcsngd.config import experiment as schema
from hpcsngd.config.catalogue import DATASETS as CATALOGUE
from hpcsngd.train.data import download, pickles
from hpcsngd.train.data.samples import Images, Splits
from hpcsngd.train.faults import MissingDataError

_SIZE = 32


@dataclass(frozen=True)
class Facts:
    """One data set of this format.

    Attributes:
        name: ours.
        torchvision: the class there.
        test: name of the test file; all others are for training.
        key: where the labels are in them.
        classes: number of classes.
        mean: of the training pixels / 255, for each color.
        std: of them.
    """

    name: str
    torchvision: str
    test: str
    key: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_cifar(facts: Facts, root: Path | None, config: schema.Data) -> Splits:
    """Returns 50,000 images to train and 10,000 to test, 32x32 in three colors.

    Args:
        facts: which data set.
        root: the data root, which holds the folder that the archive unpacks to.
        config: the experiment's ``data``.

    Raises:
        MissingDataError: files are missing or damaged; the message names them.
    """
    if root is None:
        raise MissingDataError(f"no data root for {facts.name}: {CATALOGUE[facts.name].get}")
    known = CATALOGUE[facts.name]
    folder = root / known.folders[0]

    def absent() -> list[str]:
        return known.absent(lambda name: (folder / name).is_file())

    if config.download:
        download.fetch(root, facts.name, facts.torchvision, lambda: not absent())
    if not folder.is_dir():
        raise MissingDataError(f"no {facts.name} below the data root {root}: {known.get}")
    if missing := absent():
        raise MissingDataError(f"{folder} lacks {', '.join(missing)}")
    train = tuple(name for name in known.files if name != facts.test)
    return Splits(_part(facts, folder, train), _part(facts, folder, (facts.test,)), facts.classes)


# Means and deviations as the published code of HyLo has them.
cifar10 = partial(
    load_cifar,
    Facts(
        name="cifar10",
        torchvision="CIFAR10",
        test="test_batch",
        key="labels",
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
)
cifar100 = partial(
    load_cifar,
    Facts(
        name="cifar100",
        torchvision="CIFAR100",
        test="test",
        key="fine_labels",
        classes=100,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
    ),
)


def _part(facts: Facts, folder: Path, names: tuple[str, ...]) -> Images:
    pixels, labels = [], []
    for name in names:
        data, some = pickles.fields(folder / name, "data", facts.key)
        pixels.append(pickles.pixels(folder / name, data, _SIZE))
        if len(some) != len(pixels[-1]):
            raise MissingDataError(f"{folder / name}: {len(pixels[-1])} images but {len(some)} labels")
        labels.append(np.asarray(some, dtype=np.int64))
    together = torch.from_numpy(np.concatenate(labels))
    if len(together) and not 0 <= int(together.min()) <= int(together.max()) < facts.classes:
        raise MissingDataError(f"{folder}: labels are not all within 0 to {facts.classes - 1}")
    return Images(
        torch.from_numpy(np.concatenate(pixels)), together, scale=255.0, mean=facts.mean, std=facts.std
    )
