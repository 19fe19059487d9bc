"""Index arithmetic of convolutions: patches against a convolution with one-hot kernels."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsngd.optim.positions import Geometry, patches
from tests.optim.geometries import geometries, random, unfolded


@given(st.integers(0, 2**31), geometries())
@settings(deadline=None, max_examples=150)
def test_patches_are_what_the_convolution_reads(seed: int, case: tuple[Geometry, tuple[int, ...]]) -> None:
    geometry, image = case
    x = random(seed, 2, 3, *image)
    expected = unfolded(x, geometry)
    found = patches(x, geometry, expected.shape[3:])
    assert torch.equal(found, expected.flatten(3).flatten(1, 2))
