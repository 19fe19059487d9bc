"""Reads the pickles that some data sets come as, without running what else a pickle may hold.

A pickle is a program: it may name any function and call it. Those of CIFAR and of down-sampled ImageNet need
nothing but what numpy arrays are rebuilt by, so only that can be named here.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpcsngd.train.faults import MissingDataError

_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED = {
    *((module, name) for module in _NUMPY for name in ("_reconstruct", "scalar")),
    *((module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


def read(file: Path) -> dict[str, Any]:
    """Returns the dictionary in a pickle of Python 2 or 3, its keys as text.

    Raises:
        MissingDataError: the file is not there, is cut off, holds no dictionary, or names anything but what
            numpy's arrays need.
    """
    try:
        with file.open("rb") as stream:
            content = _Reader(stream, encoding="latin1").load()
    except FileNotFoundError as error:
        raise MissingDataError(f"{file} is missing") from error
    except (OSError, EOFError, ValueError, IndexError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise MissingDataError(f"cannot read {file}: {error or type(error).__name__}") from error
    if not isinstance(content, Mapping):
        raise MissingDataError(f"{file} holds no dictionary but a {type(content).__name__}")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def fields(file: Path, *names: str) -> list[Any]:
    """Returns some entries of the dictionary in a pickle.

    Raises:
        MissingDataError: as `read`, or an entry is missing.
    """
    content = read(file)
    missing = [name for name in names if name not in content]
    if missing:
        raise MissingDataError(f"{file} has no {', '.join(missing)}; it has: {', '.join(content)}")
    return [content[name] for name in names]


def pixels(file: Path, values: Any, size: int) -> np.ndarray:
    """Returns rows of planar colors as ``(n, 3, size, size)``, uint8.

    Raises:
        MissingDataError: the values have another type or shape.
    """
    array = np.asarray(values)
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != 3 * size * size:
        raise MissingDataError(
            f"{file}: data is {array.dtype} of shape {array.shape}, not uint8 of shape (n, {3 * size * size})"
        )
    return array.reshape(-1, 3, size, size)


class _Reader(pickle.Unpickler):
    """Finds nothing but what numpy's arrays need."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns what a pickle names, if that is harmless."""
        if (module, name) == ("_codecs", "encode"):  # bytes, in pickles that Python 3 writes for Python 2
            return _encode
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no data set needs")
        return super().find_class(module, name)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it wants bytes in {encoding}, which no data set needs")
    return text.encode("latin1")
