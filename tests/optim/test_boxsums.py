"""Sums over what each tap meets, against sums of patches and against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsngd.optim.boxsums import box_sums
from hpcsngd.optim.positions import Geometry
from tests.optim.geometries import geometries, random, unfolded

TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
seeds = st.integers(0, 2**31)
#: Small images, summed entry by entry, and ones long enough for segments.
cases = st.one_of(geometries(), geometries(most=40))


@given(seeds, cases)
@settings(deadline=None, max_examples=100)
def test_sums_over_image_boxes_are_sums_of_patches(seed: int, case: tuple[Geometry, tuple[int, ...]]) -> None:
    geometry, image = case
    x = random(seed, 2, 3, *image)
    expected = unfolded(x, geometry)
    boxes = geometry.image_boxes(image, expected.shape[3:])
    found = box_sums(x, boxes, torch.float64)
    torch.testing.assert_close(found, expected.flatten(3).sum(3).flatten(1), atol=1e-12, rtol=1e-12)


@given(seeds, cases)
@settings(deadline=None, max_examples=100)
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


@pytest.mark.parametrize("length", [4, 40])
def test_a_batch_without_samples_has_no_sums(length: int) -> None:
    boxes = [[slice(0, length - 1), slice(0, length), slice(1, length)]] * 2
    assert box_sums(torch.empty(0, 3, length, length), boxes, torch.float32).shape == (0, 27)


def test_a_bright_border_costs_no_digits() -> None:
    """A total less the border would leave the rounding of the border."""
    x = torch.ones(1, 1, 40, 40)
    x[:, :, 0] = 1e9
    found = box_sums(x, [[slice(0, 40), slice(1, 40)], [slice(0, 40)]], torch.float32)
    assert found[0, 1] == 39 * 40
