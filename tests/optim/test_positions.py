"""Index arithmetic of convolutions: sums of patches and patches against unfold and against autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpcsngd.optim.positions import Geometry, box_sums, patches

seeds = st.integers(0, 2**31)
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Geometry, tuple[int, ...]]:
    """Returns a geometry of one to three dimensions and an image that it fits on."""
    dims = draw(st.integers(1, 3))
    kernel, stride, dilation = (
        tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))) for _ in range(3)
    )
    before = tuple(draw(st.lists(st.integers(0, 4), min_size=dims, max_size=dims)))
    sizes = draw(st.lists(st.integers(1, 9 - dims), min_size=dims, max_size=dims))
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


@given(seeds, geometries())
@settings(deadline=None, max_examples=150)
def test_patches_are_what_the_convolution_reads(seed: int, case: tuple[Geometry, tuple[int, ...]]) -> None:
    geometry, image = case
    x = random(seed, 2, 3, *image)
    expected = unfolded(x, geometry)
    found = patches(x, geometry, expected.shape[3:])
    assert torch.equal(found, expected.flatten(3).flatten(1, 2))


@given(seeds, geometries())
@settings(deadline=None, max_examples=150)
def test_sums_over_image_boxes_are_sums_of_patches(seed: int, case: tuple[Geometry, tuple[int, ...]]) -> None:
    geometry, image = case
    x = random(seed, 2, 3, *image)
    expected = unfolded(x, geometry)
    boxes = geometry.image_boxes(image, expected.shape[3:])
    found = box_sums(x, boxes, torch.float64)
    torch.testing.assert_close(found, expected.flatten(3).sum(3).flatten(1), atol=1e-12, rtol=1e-12)


@given(seeds, geometries())
@settings(deadline=None, max_examples=150)
def test_sums_over_grid_boxes_are_sums_of_a_transposed_convolution(
    seed: int, case: tuple[Geometry, tuple[int, ...]]
) -> None:
    """The derivative of the summed output by a tap of the weight is the sum of what the tap carries there."""
    geometry, grid = case
    x = random(seed, 1, 3, *grid)
    image = tuple(
        (o - 1) * s - 2 * b + d * (k - 1) + 1
        for o, k, s, d, b in zip(
            grid, geometry.kernel, geometry.stride, geometry.dilation, geometry.before, strict=True
        )
    )
    if min(image) < 1:
        return
    weight = random(seed + 1, 3, 1, *geometry.kernel).requires_grad_()
    out = TRANSPOSED[geometry.dims](
        x, weight, None, geometry.stride, geometry.before, dilation=geometry.dilation
    )
    assert out.shape[2:] == image
    (expected,) = torch.autograd.grad(out.sum(), weight)
    found = box_sums(x, geometry.grid_boxes(image, grid), torch.float64)
    torch.testing.assert_close(found, expected.reshape(1, -1), atol=1e-12, rtol=1e-12)


def test_sums_are_taken_in_the_dtype_asked_for() -> None:
    x = torch.full((1, 1, 4096), 1.001, dtype=torch.bfloat16)
    found = box_sums(x, [[slice(0, 4096)]], torch.float32)
    assert found.dtype == torch.float32
    assert float(found) == 4096 * float(x[0, 0, 0])
