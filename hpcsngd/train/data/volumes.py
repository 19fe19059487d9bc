"""The published preparation of MRI volumes for U-Net (Buda et al., 2019, as HyLo's code repeats it).

In this order: zero what is below 10 % of the maximum, crop to what is left, pad to a square, resize, clip to
the 10th and 99th percentile, standardize each channel.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[Any]"

_DARK = 0.1
_PERCENTILES = (10, 99)


def prepare(volume: Array, mask: Array, size: int) -> tuple[Array, Array]:
    """Returns a prepared volume, float32 ``(n, size, size, channels)``, and mask, uint8 of 0 and 1.

    Args:
        volume: ``(slices, height, width, channels)``, any real type.
        mask: ``(slices, height, width)``; what is not zero is marked.
        size: height and width of the result.

    Raises:
        ValueError: shapes differ, or the volume is black.
    """
    if volume.shape[:3] != mask.shape:
        raise ValueError(f"slices are {volume.shape[:3]}, masks {mask.shape}")
    cropped, marked = crop(volume, (mask > 0).astype(np.uint8))
    volume, mask = resize(pad(cropped), size, order=2), resize(pad(marked), size, order=0)
    return standardize(volume).astype(np.float32), mask


def crop(volume: Array, mask: Array) -> tuple[Array, Array]:
    """Returns both cut to the smallest box around what is at least 10 % as bright as the brightest."""
    bright = np.where(volume < volume.max() * _DARK, 0, volume)
    if not bright.any():
        raise ValueError("the volume is black")
    box = tuple(slice(int(places.min()), int(places.max()) + 1) for places in np.nonzero(bright.any(axis=-1)))
    return bright[box], mask[box]


def pad(volume: Array) -> Array:
    """Returns square slices, with zeros on both sides of the shorter one."""
    height, width = volume.shape[1:3]
    widths = [(0, 0)] * volume.ndim
    axis, missing = (1, width - height) if height < width else (2, height - width)
    widths[axis] = (missing // 2, missing - missing // 2)
    return np.pad(volume, widths)


def resize(volume: Array, size: int, *, order: int) -> Array:
    """Returns slices of another size, by splines of an order: 0 keeps values, 2 is the published one.

    Pixels are areas and outside is zero, as scikit-image's ``resize(mode="constant")`` has it, without its
    anti-aliasing filter. Order 2 gives float32.
    """
    from scipy import ndimage

    factors = (size / volume.shape[1], size / volume.shape[2])
    planes = np.moveaxis(volume.reshape(*volume.shape[:3], -1), -1, 1)
    result = np.empty((*planes.shape[:2], size, size), dtype=volume.dtype if order == 0 else np.float32)
    # Each plane by itself: splines go through their points, so the other two axes would change nothing, but
    # scipy pads every axis that it is given.
    for place in np.ndindex(*planes.shape[:2]):
        plane = planes[place] if order == 0 else planes[place].astype(np.float32)
        ndimage.zoom(plane, factors, result[place], order=order, mode="grid-constant", grid_mode=True)
    return np.moveaxis(result, 1, -1).reshape(len(volume), size, size, *volume.shape[3:])


def standardize(volume: Array) -> Array:
    """Returns a volume clipped to percentiles, each channel with mean 0 and deviation 1."""
    low, high = np.percentile(volume, _PERCENTILES)
    clipped = np.clip(volume.astype(np.float64), low, high)
    mean, deviation = clipped.mean(axis=(0, 1, 2)), clipped.std(axis=(0, 1, 2))
    # a channel that is missing, as some are in this data set, may be of one value
    result: Array = (clipped - mean) / np.where(deviation > 0, deviation, 1.0)
    return result
