"""Finds the folder of a data set that is made of files with fixed names, or says exactly what is missing."""

from __future__ import annotations

from pathlib import Path

from hpcsngd.config.catalogue import DATASETS as CATALOGUE
from hpcsngd.train.faults import MissingDataError


def find(name: str, root: Path | None) -> Path:
    """Returns the folder with all files of a data set: one of its folders below the root, or the root.

    Args:
        name: of the data set, as in ``data.name``.
        root: the data root.

    Raises:
        MissingDataError: no such folder, or files are missing; the message names them.
    """
    known = CATALOGUE[name]
    places = [*(root / folder for folder in known.folders), root] if root else []
    started = [place for place in places if any((place / file).exists() for file in known.files)]
    if not started:
        raise MissingDataError(f"no {name} below the data root {root}: {known.get}")
    lacking = {place: known.absent(lambda file, place=place: (place / file).is_file()) for place in started}  # type: ignore[misc]
    folder, absent = min(lacking.items(), key=lambda item: len(item[1]))
    if absent:
        raise MissingDataError(f"{folder} lacks {', '.join(absent)}")
    return folder
