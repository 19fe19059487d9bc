"""Writes tiny data sets in their true formats: for smoke runs and for tests of the readers.

Each has 48 samples to train and 16 to evaluate, of noise that is brighter for higher classes. Names, keys,
types and layouts are those of the real archives; the same call always writes the same bytes. Needs no torch,
except for stored features and encoders.
"""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from hpcsngd.train.text import tiny as tinytext

TRAIN, TEST = 48, 16

#: Volumes of lgg-mri: so many patients of so many slices, of which the first and the last are not used; two
#: patients are 16 samples, so an experiment must set ``data.validation_patients: 2``.
PATIENTS, SLICES = 8, 10

#: Tokens of a long text that are predicted: two steps of 16 samples of 8 tokens.
TOKENS = 256

_CLASSES = 10
_FEATURES = 32

Array: TypeAlias = "npt.NDArray[Any]"


def write(name: str, root: Path) -> None:
    """Writes a data set below a data root.

    Args:
        name: of the data set, as in ``data.name``; one that needs no files writes none.
        root: the data root.

    Raises:
        KeyError: no such data set.
    """
    WRITERS[name](root)


def images(
    count: int, shape: Sequence[int], *, classes: int = _CLASSES, seed: int = 0
) -> tuple[Array, Array]:
    """Returns uint8 images ``(count, *shape)`` and labels from 0, every class in turn."""
    labels = np.arange(count) % classes
    noise = np.random.default_rng(seed).integers(0, 120, (count, *shape))
    brightness = (120 * labels // classes).reshape(-1, *[1] * len(shape))
    return (noise + brightness).astype(np.uint8), labels.astype(np.int64)


def _nothing(root: Path) -> None:
    """Writes nothing: the data set comes with a package."""


def _write_idx(folder: str, root: Path) -> None:
    place = root / folder / "raw"
    place.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate((("train", TRAIN), ("t10k", TEST))):
        pixels, labels = images(count, (28, 28), seed=seed)
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels.astype(np.uint8))):
            head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
            content = gzip.compress(head + values.tobytes(), mtime=0)
            (place / f"{split}-{kind}-ubyte.gz").write_bytes(content)


def _write_cifar10(root: Path) -> None:
    train = [*zip(*(np.array_split(part, 5) for part in images(TRAIN, (3072,))), strict=True)]
    names = [f"data_batch_{number}" for number in range(1, 6)]
    for name, (pixels, labels) in zip(
        [*names, "test_batch"], [*train, images(TEST, (3072,), seed=1)], strict=True
    ):
        content = {
            b"batch_label": name.encode(),
            b"labels": labels.tolist(),
            b"data": pixels,
            b"filenames": [f"image_{number}.png".encode() for number in range(len(labels))],
        }
        _write_pickle(root / "cifar-10-batches-py" / name, content, python=2)


def _write_cifar100(root: Path) -> None:
    for seed, (name, count) in enumerate((("train", TRAIN), ("test", TEST))):
        pixels, labels = images(count, (3072,), seed=seed)
        content = {
            b"filenames": [f"image_{number}.png".encode() for number in range(count)],
            b"batch_label": name.encode(),
            b"fine_labels": labels.tolist(),
            b"coarse_labels": (labels // 5).tolist(),
            b"data": pixels,
        }
        _write_pickle(root / "cifar-100-python" / name, content, python=2)


def _write_imagenet(root: Path) -> None:
    from PIL import Image

    classes = 4
    for seed, (part, count) in enumerate((("train", TRAIN), ("val", TEST))):
        pixels, labels = images(count, (48, 60, 3), classes=classes, seed=seed)
        for number, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
            folder = root / "imagenet" / part / f"n0144076{label}"
            folder.mkdir(parents=True, exist_ok=True)
            # no two of one size, some upright
            cut = picture[: 40 + number % 9, : 36 + number % 25]
            Image.fromarray(cut).save(folder / f"n0144076{label}_{number}.JPEG", quality=90)


def _write_small_imagenet(size: int, root: Path) -> None:
    folder = root / f"imagenet{size}"
    pixels, labels = images(TRAIN, (3 * size * size,))
    mean = pixels.mean(axis=0)
    parts = zip(np.array_split(pixels, 10), np.array_split(labels, 10), strict=True)
    for number, (some, theirs) in enumerate(parts, start=1):
        content = {"data": some, "labels": (theirs + 1).tolist(), "mean": mean}
        _write_pickle(folder / f"train_data_batch_{number}", content, python=3)
    pixels, labels = images(TEST, (3 * size * size,), seed=1)
    _write_pickle(folder / "val_data", {"data": pixels, "labels": (labels + 1).tolist()}, python=3)


def _write_pickle(file: Path, content: dict[Any, Any], python: Literal[2, 3]) -> None:
    """Writes a pickle as that Python did, with numpy's functions by their names of then."""
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    (_Python2Pickler if python == 2 else pickle.Pickler)(stream, protocol=2).dump(content)
    text = stream.getvalue()
    file.write_bytes(text.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


class _Python2Pickler(pickle._Pickler):  # noqa: SLF001 - the C one cannot be taught to write bytes this way
    """Writes bytes as Python 2 wrote its strings, which is how the published files hold keys and arrays."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # noqa: SLF001

    def save_bytes(self, value: bytes) -> None:
        """Writes the operation BINSTRING: length and bytes."""
        self.write(b"T" + len(value).to_bytes(4, "little") + value)  # type: ignore[attr-defined]

    dispatch[bytes] = save_bytes


def _write_mri(root: Path) -> None:
    for number in range(PATIENTS):
        name = f"TCGA_CS_{4941 + number}_19960909"
        volume, mask = _brain(number)
        for index in range(SLICES):
            file = root / "kaggle_3m" / name / f"{name}_{index + 1}.tif"
            _write_tif(file, volume[index])
            _write_tif(file.with_name(f"{name}_{index + 1}_mask.tif"), mask[index])


def _brain(number: int) -> tuple[Array, Array]:
    """Returns slices ``(n, 40, 48, 3)`` and masks ``(n, 40, 48)`` of 0 and 255: an ellipse with a spot."""
    z, y, x = np.ogrid[:SLICES, :40, :48]
    inside = (y - 20) ** 2 / 15**2 + (x - 24) ** 2 / 18**2 <= 1
    spot = ((y - 14 - number) ** 2 + (x - 18 - number) ** 2 <= 25) & (abs(z - 5) <= 3)
    noise = np.random.default_rng(number).integers(0, 40, (SLICES, 40, 48, 3))
    volume = np.where(inside[..., None], 60 + noise, 0) + 120 * spot[..., None]
    return volume.astype(np.uint8), (255 * spot).astype(np.uint8)


def _write_tif(file: Path, pixels: Array) -> None:
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def _write_features(root: Path) -> None:
    import torch

    folder = root / "features"
    folder.mkdir(parents=True, exist_ok=True)
    middles = np.random.default_rng(0).normal(size=(_CLASSES, _FEATURES))
    for seed, (part, count) in enumerate((("train", TRAIN), ("val", TEST)), start=1):
        labels = np.arange(count) % _CLASSES
        values = middles[labels] + np.random.default_rng(seed).normal(size=(count, _FEATURES))
        torch.save(torch.from_numpy(values).float(), folder / f"features_{part}.pt")
        torch.save(torch.from_numpy(labels), folder / f"targets_{part}.pt")


def _write_multi30k(root: Path) -> None:
    """Writes sentences that translate word by word; the rarer words are in the training set alone."""
    words = {"ein": "a", "Mann": "man", "Hund": "dog", "läuft": "runs", "schläft": "sleeps", "dort": "there"}
    folder = root / "multi30k"
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate((("train", TRAIN), ("val", TEST), ("test_2016_flickr", TEST))):
        draws = np.random.default_rng(seed)
        lines = [draws.choice(list(words), draws.integers(2, 7)).tolist() for _ in range(count)]
        for language, text in (("de", lines), ("en", [[words[word] for word in line] for line in lines])):
            content = "".join(f"{' '.join(line)}.\n" for line in text)
            (folder / f"{part}.{language}").write_text(content, encoding="utf-8")


def _write_tokens(folder: str, name: str, extension: str, root: Path) -> None:
    """Writes texts in which words follow each other by a rule; TOKENS + 1 to train, a quarter to evaluate."""
    place = root / folder
    place.mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate((("train", TOKENS), ("valid", TOKENS // 4), ("test", TOKENS // 4))):
        draws, word, lines = np.random.default_rng(seed), 0, [""]
        # each line is 7 words and the end that a reader adds
        while sum(len(line.split()) + 1 for line in lines) < count + 1:
            line = []
            for _ in range(min(7, count - sum(len(each.split()) + 1 for each in lines))):
                word = (2 * word + int(draws.integers(0, 3))) % 11
                line.append("<unk>" if word == 10 else f"w{word}")
            lines.append(" ".join(line))
        content = "".join(f" {line} \n" for line in lines)
        (place / f"{name}.{part}.{extension}").write_text(content, encoding="utf-8")


WRITERS: dict[str, Callable[[Path], None]] = {
    "digits": _nothing,
    "mnist": partial(_write_idx, "MNIST"),
    "fashion-mnist": partial(_write_idx, "FashionMNIST"),
    "cifar10": _write_cifar10,
    "cifar100": _write_cifar100,
    "imagenet": _write_imagenet,
    "imagenet32": partial(_write_small_imagenet, 32),
    "imagenet64": partial(_write_small_imagenet, 64),
    "lgg-mri": _write_mri,
    "features": _write_features,
    "multi30k": _write_multi30k,
    "ptb": partial(_write_tokens, "ptb", "ptb", "txt"),
    "wikitext2": partial(_write_tokens, "wikitext-2", "wiki", "tokens"),
    "wikitext103": partial(_write_tokens, "wikitext-103", "wiki", "tokens"),
    **{name: partial(tinytext.glue, name, counts=(TRAIN, TEST)) for name in tinytext.GLUE},
    "squad": partial(tinytext.squad, "v1.1", counts=(TRAIN, TEST)),
    "squadv2": partial(tinytext.squad, "v2.0", counts=(TRAIN, TEST)),
}
