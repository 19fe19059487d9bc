"""Writes brain volumes with tumors in the true format of LGG MRI, made by noise: as many as a study needs.

Larger and harder than the tiny data of `hpcsngd.train.tinydata`: smooth textures, tumors of irregular shape
and low contrast in about a third of the slices, as in the real set (1,373 of 3,929 slices), mostly in FLAIR.
Nothing of them is real; they say how an optimizer fares with this loss and network, not how well it segments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Brightness that a tumor adds to pre-contrast, FLAIR and post-contrast, of 255; textures deviate by 18.
_ADDED = (4, 36, 12)
_TEXTURE = 18


def write(root: Path, *, patients: int, slices: int = 18, size: int = 64, seed: int = 0) -> None:
    """Writes ``kaggle_3m`` below a data root; the same call always writes the same volumes.

    Args:
        root: the data root.
        patients: how many volumes.
        slices: of each; the reader leaves out the first and the last.
        size: height and width in pixels.
        seed: of the volumes.
    """
    from PIL import Image

    for number in range(patients):
        name = f"TCGA_DU_{5000 + number}_19960101"
        folder = root / "kaggle_3m" / name
        folder.mkdir(parents=True, exist_ok=True)
        volume, mask = brain(np.random.default_rng([seed, number]), slices, size)
        for index in range(slices):
            Image.fromarray(volume[index]).save(folder / f"{name}_{index + 1}.tif")
            Image.fromarray(mask[index]).save(folder / f"{name}_{index + 1}_mask.tif")


def brain(generator: np.random.Generator, slices: int, size: int) -> tuple[Array, Array]:
    """Returns slices ``(n, size, size, 3)`` uint8 and masks ``(n, size, size)`` of 0 and 255.

    A tumor is where a smooth field is high within a ball that holds a sixth of the slices to each side.
    """
    z, y, x = np.meshgrid(np.arange(slices), np.arange(size), np.arange(size), indexing="ij")
    heights, widths = generator.uniform(0.4, 0.46, 2) * size
    inside = ((y - size / 2) / heights) ** 2 + ((x - size / 2) / widths) ** 2 <= 1
    center = generator.uniform([0.3 * slices, 0.3 * size, 0.3 * size], [0.7 * slices, 0.7 * size, 0.7 * size])
    radii = np.array([slices / 6, *generator.uniform(0.08, 0.2, 2) * size])
    parts = zip((z, y, x), center, radii, strict=True)
    distance = sum(((axis - middle) / radius) ** 2 for axis, middle, radius in parts)
    tumor = (distance + 0.4 * _smooth(generator, slices, size) < 1) & inside
    channels = [
        70 + 12 * index + _TEXTURE * _smooth(generator, slices, size) + _ADDED[index] * tumor
        for index in range(3)
    ]
    volume = np.stack(channels, axis=-1) + generator.normal(0, 6, (slices, size, size, 3))
    return (np.clip(volume, 20, 255) * inside[..., None]).astype(np.uint8), (255 * tumor).astype(np.uint8)


def _smooth(generator: np.random.Generator, slices: int, size: int) -> Array:
    """Returns a random field of mean 0 and deviation 1 that varies over a twelfth of a slice."""
    from scipy import ndimage

    field = ndimage.gaussian_filter(generator.normal(size=(slices, size, size)), (1, size / 12, size / 12))
    result: Array = (field - field.mean()) / field.std()
    return result
