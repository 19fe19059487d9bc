"""Random changes of batches of images; all of them follow from the samples' draws."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hpcsngd.config.experiment import Augment, Resolution
from hpcsngd.train.data.draws import Draws, Numbers

_RESOLUTION_STEP = 32

# RandomResizedCrop: share of the area, ratio of width to height, attempts before the middle is taken
# (Szegedy et al., CVPR 2015, section 6, with torchvision's least area and attempts).
_AREA, _RATIO, _ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10


def move(images: Tensor, changes: Augment, draws: Draws, *, mode: str = "bilinear") -> Tensor:
    """Returns images scaled and turned, then cropped, then mirrored, with zeros from outside.

    Args:
        images: ``(n, channels, size, size)``, any type.
        changes: which changes.
        draws: of these samples.
        mode: how pixels are found after scaling and turning: ``"bilinear"``, or ``"nearest"`` for masks.
    """
    images = resample(images, changes, draws, mode=mode)
    if changes.crop == 0 and not changes.flip:
        return images
    return crop_and_flip(images, changes.crop, flip=changes.flip, draws=draws)


def crop_and_flip(images: Tensor, padding: int, *, flip: bool, draws: Draws) -> Tensor:
    """Returns a crop of each image's own size after padding with zeros, mirrored in half of the cases."""
    count, _, height, width = images.shape
    corners = torch.from_numpy((draws.uniform("crop") * (2 * padding + 1)).astype(np.int64))
    rows = corners[:, :1] + torch.arange(height)
    columns = corners[:, 1:] + torch.arange(width)
    if flip:
        mirrored = torch.from_numpy(draws.uniform("flip") < 0.5)
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    samples = torch.arange(count)[:, None, None]
    # indices around a slice move to the front: (n, height, width, channels)
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def resample(images: Tensor, changes: Augment, draws: Draws, *, mode: str) -> Tensor:
    """Returns images scaled and turned about their middle in one step; as they are if neither is asked for.

    Args:
        images: ``(n, channels, size, size)``.
        changes: whose ``scale`` and ``rotate`` count.
        draws: of these samples.
        mode: ``"bilinear"`` or ``"nearest"``.
    """
    if not changes.scale and not changes.rotate:
        return images
    factor = torch.from_numpy(1 + changes.scale * (2 * draws.uniform("scale") - 1))
    angle = torch.from_numpy(math.radians(changes.rotate) * (2 * draws.uniform("rotate") - 1))
    # the grid maps places in the result to places in the image, so it shrinks where the image grows
    cosine, sine = angle.cos() / factor, angle.sin() / factor
    zero = torch.zeros_like(cosine)
    rows = [torch.cat([cosine, -sine, zero], dim=1), torch.cat([sine, cosine, zero], dim=1)]
    grid = torch.nn.functional.affine_grid(
        torch.stack(rows, dim=1).float(), list(images.shape), align_corners=False
    )
    moved = torch.nn.functional.grid_sample(
        images.float(), grid, mode=mode, padding_mode="zeros", align_corners=False
    )
    return moved if images.is_floating_point() else moved.round().to(images.dtype)


def cutout(images: Tensor, side: int, draws: Draws) -> Tensor:
    """Returns images with a square set to zero, its middle anywhere in the image, parts outside of it lost.

    Source: DeVries and Taylor, arXiv 1708.04552, section 3. Images are standardized, so zero is the mean.
    """
    if side == 0:
        return images
    height, width = images.shape[-2:]
    middles = torch.from_numpy(np.floor(draws.uniform("cutout") * [height, width]).astype(np.int64))
    first = middles - side // 2

    def inside(axis: int, length: int) -> Tensor:
        places, begin = torch.arange(length), first[:, axis : axis + 1]
        return (places >= begin) & (places < begin + side)

    hidden = inside(0, height)[:, :, None] & inside(1, width)[:, None, :]
    return images.masked_fill(hidden[:, None], 0.0)


def crop_box(width: int, height: int, numbers: Numbers) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom of a part of 8 to 100 % of an image in a ratio of 3:4 to 4:3.

    Args:
        width: of the image in pixels.
        height: of the image in pixels.
        numbers: one sample's draws for ``area``.
    """
    place_x, place_y, *attempts = numbers.tolist()
    for attempt in range(_ATTEMPTS):
        share, ratio = attempts[2 * attempt], attempts[2 * attempt + 1]
        area = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * share)
        aspect = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** ratio
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(place_x * (width - w + 1)), int(place_y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resolution_at(ramp: Resolution, epoch: int) -> int:
    """Returns the height and width of training images in an epoch (from 0), a multiple of 32 on the way.

    Source: the FFCV ImageNet recipes' resolution ramp: linear between two epochs, rounded to 32.
    """
    if epoch <= ramp.first_epoch:
        return ramp.start
    if epoch >= ramp.last_epoch:
        return ramp.end
    share = (epoch - ramp.first_epoch) / (ramp.last_epoch - ramp.first_epoch)
    return round((ramp.start + share * (ramp.end - ramp.start)) / _RESOLUTION_STEP) * _RESOLUTION_STEP
