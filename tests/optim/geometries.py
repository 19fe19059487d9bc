"""Convolution geometries for hypothesis, and all patches that one reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from hpcsngd.optim.positions import Geometry

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def geometries(draw: st.DrawFn, most: int = 9) -> tuple[Geometry, tuple[int, ...]]:
    """Returns a geometry of one to three dimensions and an image that it fits on.

    Args:
        draw: from hypothesis.
        most: entries along the first dimension of the image; further ones have 8 at most.
    """
    dims = draw(st.integers(1, 3))
    kernel, stride, dilation = (
        tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))) for _ in range(3)
    )
    before = tuple(draw(st.lists(st.integers(0, 4), min_size=dims, max_size=dims)))
    sizes = [draw(st.integers(1, most if dim == 0 else 9 - dims)) for dim in range(dims)]
    image = tuple(
        max(size, d * (k - 1) + 1 - 2 * b)
        for size, k, d, b in zip(sizes, kernel, dilation, before, strict=True)
    )
    return Geometry(kernel, stride, dilation, before), image


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unfolded(x: Tensor, geometry: Geometry) -> Tensor:
    """Returns all patches, ``(n, channels, taps, *grid)``, by convolving with one-hot kernels."""
    taps = torch.Size(geometry.kernel).numel()
    one_hot = torch.eye(taps, dtype=x.dtype).reshape(taps, 1, *geometry.kernel)
    found = CONVOLVE[geometry.dims](
        x.flatten(0, 1).unsqueeze(1), one_hot, None, geometry.stride, geometry.before, geometry.dilation
    )
    return found.reshape(*x.shape[:2], *found.shape[1:])
