"""Stored features: what another network makes of images, for logistic regression."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from hpcsngd.config import experiment as schema
from hpcsngd.config.catalogue import DATASETS as CATALOGUE
from hpcsngd.train.data.samples import Images, Splits
from hpcsngd.train.faults import MissingDataError

_NAMES = {part: (f"features_{part}.pt", f"targets_{part}.pt") for part in ("train", "val")}


def features(root: Path | None, config: schema.Data) -> Splits:
    """Returns stored features as images of one pixel, with as many channels as there are features.

    Format: ``features_train.pt``, ``targets_train.pt``, ``features_val.pt`` and ``targets_val.pt``, tensors
    ``(n, d)`` of floats and ``(n,)`` of classes from 0, as the published code of EFCP reads them; in
    ``<root>/features`` or in the root itself.

    Args:
        root: the data root.
        config: the experiment's ``data``.

    Raises:
        MissingDataError: files are missing or do not fit together; the message names them.
    """
    folders = [root / "features", root] if root else []
    known = CATALOGUE["features"]
    folder = next((each for each in folders if any((each / name).exists() for name in known.files)), None)
    if folder is None:
        raise MissingDataError(f"no features below the data root {root}: {known.get}")
    if absent := known.absent(lambda name: (folder / name).is_file()):
        raise MissingDataError(f"{folder} lacks {', '.join(absent)}")
    train, test = (_read(folder, *names) for names in _NAMES.values())
    if train.channels != test.channels:
        raise MissingDataError(f"{folder}: {train.channels} features to train, {test.channels} to evaluate")
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    return Splits(train, test, classes, "validation")


def _read(folder: Path, features_name: str, targets_name: str) -> Images:
    values, targets = (_tensor(folder / name) for name in (features_name, targets_name))
    if values.ndim != 2 or not values.is_floating_point():
        raise MissingDataError(
            f"{folder / features_name}: {values.dtype} of shape {tuple(values.shape)}, not floats (n, d)"
        )
    if targets.shape != values.shape[:1] or targets.is_floating_point() or len(targets) == 0:
        raise MissingDataError(
            f"{folder / targets_name}: {targets.dtype} of shape {tuple(targets.shape)}, "
            f"not {len(values)} whole numbers"
        )
    if targets.min() < 0:
        raise MissingDataError(f"{folder / targets_name}: classes are counted from 0")
    return Images(values[:, :, None, None], targets.to(torch.int64), scale=1.0, mean=0.0, std=1.0)


def _tensor(file: Path) -> Tensor:
    try:
        tensor = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise MissingDataError(f"cannot read {file}: {error}") from error
    if not isinstance(tensor, Tensor):
        raise MissingDataError(f"{file} holds a {type(tensor).__name__}, not a tensor")
    return tensor
