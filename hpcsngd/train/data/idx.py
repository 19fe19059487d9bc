"""MNIST and Fashion-MNIST: four idx files each, plain or gzipped."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hpcsngd.config import experiment as schema
from hpcsngd.config.catalogue import DATASETS as CATALOGUE
from hpcsngd.train.data import download
from hpcsngd.train.data.samples import Images, Splits
from hpcsngd.train.faults import MissingDataError

_UNSIGNED_BYTES = 8


@dataclass(frozen=True)
class Facts:
    """One data set: torchvision's class for it, mean and deviation of the training pixels / 255."""

    name: str
    torchvision: str
    mean: float
    std: float


def load_idx(facts: Facts, root: Path | None, config: schema.Data) -> Splits:
    """Returns 60,000 images to train and 10,000 to test.

    Looked for in torchvision's place, in a folder of the data set's name, in the root itself, and where
    Debian's package puts them.

    Args:
        facts: which data set.
        root: the data root.
        config: the experiment's ``data``.

    Raises:
        MissingDataError: not found, or damaged; the message says what is missing and how to get it.
    """
    if config.download and root is not None:
        download.fetch(root, facts.name, facts.torchvision, lambda: _find(facts.name, root) is not None)
    folder = _find(facts.name, root)
    if folder is None:
        raise MissingDataError(_missing(facts.name, root))

    def part(prefix: str) -> Images:
        pixels = read_idx(_file(folder, f"{prefix}-images-idx3-ubyte")).unsqueeze(1)
        labels = read_idx(_file(folder, f"{prefix}-labels-idx1-ubyte")).to(torch.int64)
        if len(pixels) != len(labels):
            raise MissingDataError(f"{folder}: {len(pixels)} {prefix} images but {len(labels)} labels")
        return Images(pixels, labels, scale=255.0, mean=facts.mean, std=facts.std)

    return Splits(part("train"), part("t10k"), 10)


mnist = partial(load_idx, Facts("mnist", "MNIST", 0.1307, 0.3081))
fashion_mnist = partial(load_idx, Facts("fashion-mnist", "FashionMNIST", 0.2862, 0.3529))


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
    if len(data) < 4 or data[:3] != bytes([0, 0, _UNSIGNED_BYTES]):
        raise MissingDataError(
            f"{file} is not an idx file of unsigned bytes: it begins with {data[:4].hex()}"
        )
    start = 4 + 4 * data[3]
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)[start:]
    if len(values) != torch.Size(shape).numel():
        raise MissingDataError(f"{file} is damaged: {len(values)} values where its head announces {shape}")
    return values.reshape(shape)


def _folders(name: str, root: Path | None) -> list[Path]:
    facts = CATALOGUE[name]
    below = [*(root / folder for folder in facts.folders), root] if root else []
    return below + [Path(path).parent for path in facts.system_paths]


def _find(name: str, root: Path | None) -> Path | None:
    """Returns the first folder that holds all four files."""
    return next((folder for folder in _folders(name, root) if not _absent(name, folder)), None)


def _absent(name: str, folder: Path) -> list[str]:
    return CATALOGUE[name].absent(lambda file: (folder / file).exists())


def _missing(name: str, root: Path | None) -> str:
    """Returns which files a folder lacks that has some of them, or else how to get all."""
    all_of_them = len(CATALOGUE[name].files)
    for folder in _folders(name, root):
        if 0 < len(absent := _absent(name, folder)) < all_of_them:
            return f"{folder} lacks {', '.join(absent)} (plain or with .gz)"
    return f"no {name} below the data root {root}: {CATALOGUE[name].get}"


def _file(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.exists() else folder / f"{name}.gz"
