"""The LGG brain MRI data set: slices of a patient, and masks of the tumor (Buda et al., 2019).

Layout: ``kaggle_3m/<patient>/<patient>_<slice>.tif``, three channels (pre-contrast, FLAIR, post-contrast),
and ``<patient>_<slice>_mask.tif`` beside it. All volumes are prepared once and stay in memory, on every rank.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from hpcsngd.config import experiment as schema
from hpcsngd.config.catalogue import DATASETS as CATALOGUE
from hpcsngd.train.data import augment, volumes
from hpcsngd.train.data.draws import Draws
from hpcsngd.train.data.samples import Batch, Samples, Splits
from hpcsngd.train.data.volumes import Array
from hpcsngd.train.faults import MissingDataError, SettingError

_SIZE, _VALIDATION_PATIENTS = 256, 10
_NAME = re.compile(r"(?P<stem>.+_(?P<slice>\d+))(?P<mask>_mask)?\.tif", re.IGNORECASE)
# The first and the last slice are left out, and a volume of nothing cannot be prepared.
_FEWEST_SLICES = 3
_THREADS = 4


@dataclass(frozen=True)
class Patient:
    """One patient: prepared slices ``(n, 3, size, size)`` float32 and masks ``(n, 1, size, size)`` uint8."""

    name: str
    images: Tensor
    masks: Tensor


def lgg_mri(root: Path | None, config: schema.Data) -> Splits:
    """Returns the slices of 110 patients, those of 10 of them to evaluate.

    Which patients these are follows from ``split_seed`` as in the published code: Python's
    ``random.sample`` of the sorted names.

    Args:
        root: the data root, which holds ``kaggle_3m``.
        config: the experiment's ``data``; ``size`` is 256 by default.

    Raises:
        MissingDataError: not found, or slices without a mask; the message names them.
        SettingError: not more patients than are to be evaluated.
    """
    candidates = [root / name for name in CATALOGUE["lgg-mri"].folders] if root else []
    folder = next((each for each in candidates if each.is_dir()), None)
    if folder is None:
        raise MissingDataError(f"no lgg-mri below the data root {root}: {CATALOGUE['lgg-mri'].get}")
    names = sorted(each.name for each in folder.iterdir() if each.is_dir())
    held_out = split(names, config.validation_patients or _VALIDATION_PATIENTS, config.split_seed)
    size = config.size or _SIZE
    with ThreadPoolExecutor(_THREADS) as pool:  # scipy's and Pillow's work runs outside of Python's lock
        read = pool.map(lambda name: read_patient(folder / name, size), names)
        patients = {patient.name: patient for patient in read}
    return Splits(
        Slices([patients[name] for name in names if name not in held_out]),
        Slices([patients[name] for name in held_out]),
        1,
        "validation",
    )


def split(names: Sequence[str], count: int, seed: int) -> list[str]:
    """Returns the patients to evaluate.

    Raises:
        SettingError: not more patients than that.
    """
    if len(names) <= count:
        raise SettingError(
            f"lgg-mri has {len(names)} patients, of which data.validation_patients takes {count} to evaluate"
        )
    # the published split, with the generator that the published code used; nothing secret hangs on it
    return random.Random(seed).sample(list(names), count)  # noqa: S311


def read_patient(folder: Path, size: int) -> Patient:
    """Returns a patient's slices and masks, prepared.

    Raises:
        MissingDataError: slices without a mask, masks without a slice, too few slices, unreadable files.
    """
    files: dict[str, dict[int, Path]] = {"image": {}, "mask": {}}
    for file in folder.iterdir():
        if match := _NAME.fullmatch(file.name):
            files["mask" if match["mask"] else "image"][int(match["slice"])] = file
    images, masks = files["image"], files["mask"]
    for some, others, what in ((images, masks, "mask"), (masks, images, "image")):
        if missing := sorted(set(some) - set(others)):
            raise MissingDataError(f"{folder} lacks the {what} of slice {', '.join(map(str, missing))}")
    if len(images) < _FEWEST_SLICES:
        raise MissingDataError(
            f"{folder} has {len(images)} slices (*_<slice>.tif), at least {_FEWEST_SLICES}"
        )
    order = sorted(images)[1:-1]
    volume = np.stack([_read(images[number], "RGB") for number in order])
    mask = np.stack([_read(masks[number], "L") for number in order])
    try:
        prepared, marked = volumes.prepare(volume, mask, size)
    except ValueError as error:
        raise MissingDataError(f"{folder}: {error}") from error
    return Patient(folder.name, torch.from_numpy(prepared).movedim(-1, 1), torch.from_numpy(marked)[:, None])


class Slices(Samples):
    """The slices of some patients, patient by patient.

    Args:
        patients: whose slices.
    """

    def __init__(self, patients: Sequence[Patient]) -> None:
        super().__init__()
        self._images = torch.cat([patient.images for patient in patients]).contiguous()
        self._masks = torch.cat([patient.masks for patient in patients])
        self._names = [patient.name for patient in patients]
        self._patient = torch.repeat_interleave(
            torch.arange(len(patients)), torch.tensor([len(patient.masks) for patient in patients])
        )
        self.channels, self.size = self._images.shape[1], self._images.shape[-1]

    def __len__(self) -> int:
        return len(self._patient)

    @property
    def labels(self) -> Tensor:
        """Returns whether a slice shows any tumor, ``(samples,)``, int64."""
        return self._masks.flatten(1).any(dim=1).to(torch.int64)

    @property
    def groups(self) -> dict[str, int]:
        """Returns each patient's number of slices."""
        counts = self._patient.bincount(minlength=len(self._names)).tolist()
        return {name: count for name, count in zip(self._names, counts, strict=True) if count}

    def subset(self, chosen: Tensor) -> Self:
        """Returns the slices with these indices, patient by patient."""
        chosen = chosen.sort().values
        return self._changed(
            _images=self._images[chosen], _masks=self._masks[chosen], _patient=self._patient[chosen]
        )

    def take(self, indices: list[int], draws: Draws | None) -> Batch:
        """Returns slices and masks, float32 ``(n, 1, size, size)`` of 0 and 1; both are changed alike."""
        images, masks = self._images[indices], self._masks[indices].float()
        if draws is not None:
            images = augment.move(images, self._augment, draws)
            masks = augment.move(masks, self._augment, draws, mode="nearest")
        return images, masks


def _read(file: Path, mode: str) -> Array:
    from PIL import Image

    try:
        with Image.open(file) as opened:
            return np.asarray(opened.convert(mode))
    except (OSError, ValueError, SyntaxError) as error:
        raise MissingDataError(f"cannot read {file}: {error}") from error
