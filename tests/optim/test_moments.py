"""Second moments of patches, with and without patches, against unfolding; and what they leave in memory."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hpcsngd.optim.kfac_matrix import input_moment
from hpcsngd.optim.layers import Layer
from hpcsngd.optim.moments import Axis, Method, gram, patch_moment, shifts_are_faster
from hpcsngd.optim.positions import Geometry
from tests.optim.test_boxsums import seeds
from tests.optim.test_positions import geometries, random, unfolded

# Sums of at most some thousand products of numbers around 1: float64 leaves 1e-12.
TOLERANCE = 1e-10


def check_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def expected_moment(x: Tensor, geometry: Geometry, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """Returns the moment from all patches, and the size of the grid."""
    patches = unfolded(x, geometry)
    grid = tuple(patches.shape[3:])
    patches = patches.flatten(3).reshape(len(x), groups, -1, prod(grid))
    return torch.einsum("ngdp,ngep->gde", patches, patches), grid


@given(seeds, geometries(), st.integers(1, 2))
@settings(deadline=None, max_examples=100)
def test_moment_is_that_of_all_patches(
    seed: int, case: tuple[Geometry, tuple[int, ...]], groups: int
) -> None:
    geometry, image = case
    x = random(seed, 2, 2 * groups, *image)
    expected, grid = expected_moment(x, geometry, groups)
    methods: list[Method] = ["shifts", "patches", "auto"]
    for method in methods:
        found = patch_moment(x.unflatten(1, (groups, 2)), geometry, grid, method)  # type: ignore[no-untyped-call]
        check_equal(found, expected)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
)
def test_moment_of_a_layer_has_the_bias_as_last_column(
    kind: type[nn.Conv2d], bias: bool, groups: int
) -> None:
    module = kind(4, 4, 3, stride=2, padding=1, groups=groups, bias=bias).double()
    layer = Layer("conv", module, bias)
    x = random(0, 3, 4, *(7,) * (module.weight.dim() - 2))
    output = module(x)
    vectors = layer.input_vectors(x, output)
    if bias:
        vectors = torch.cat([vectors, torch.ones_like(vectors[:, :, :1])], 2)
    expected = torch.einsum("ngdp,ngep->gde", vectors, vectors)
    check_equal(input_moment(layer, x, output, torch.float64), expected)


@pytest.mark.parametrize("padding", ["same", "valid", (2, 0)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_moment_of_padding(padding: str | tuple[int, int], dilation: int) -> None:
    module = nn.Conv2d(2, 3, (5, 3), padding=padding, dilation=dilation, bias=False).double()
    layer = Layer("conv", module, has_bias=False)
    x = random(1, 2, 2, 9, 8)
    vectors = layer.input_vectors(x, module(x))
    expected = torch.einsum("ngdp,ngep->gde", vectors, vectors)
    check_equal(input_moment(layer, x, module(x), torch.float64), expected)


@pytest.mark.parametrize("shape", [(5, 2, 3, 7), (5, 2, 7, 3), (5, 2, 3, 1)])
def test_gram_sums_over_samples_and_positions(shape: tuple[int, ...]) -> None:
    x = random(2, *shape)
    check_equal(gram(x), torch.einsum("ngdp,ngep->gde", x, x))


def test_no_sample_has_no_moment() -> None:
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    found = patch_moment(torch.zeros(0, 1, 2, 5, 5), geometry, (5, 5))
    assert torch.equal(found, torch.zeros(1, 18, 18))


def peak_allocation(x: Tensor, method: Method) -> int:
    """Returns the most bytes that were allocated at a time by a 3x3 convolution's moment."""
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as profiler:
        patch_moment(x, geometry, x.shape[3:], method)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_shifts_keep_no_patches() -> None:
    """A copy of the image with channels last and one with its padding, 2.2 images; patches would take 9."""
    x = torch.randn(16, 1, 16, 32, 32)
    assert 0 < peak_allocation(x, "shifts") < 3 * x.nbytes


def test_patches_are_built_for_some_samples_at_a_time() -> None:
    x = torch.randn(64, 1, 16, 32, 32)
    # 4 MiB of patches, their copy by sample, and the padded part of the image; all of them are 36 MiB.
    assert 2**22 <= peak_allocation(x, "patches") < 12 * 2**20


@pytest.mark.parametrize(
    ("samples", "channels", "side", "kernel", "stride", "faster"),
    [
        (128, 16, 32, 3, 1, True),
        (128, 64, 8, 3, 1, True),
        (32, 3, 112, 7, 2, True),
        (128, 16, 32, 3, 2, False),
        (128, 16, 32, 1, 1, False),
        (16, 16, 8, 3, 1, False),
    ],
)
def test_rule_takes_what_was_measured_to_be_faster(
    samples: int, channels: int, side: int, kernel: int, stride: int, faster: bool
) -> None:
    padding = kernel // 2
    axis = Axis(side, (side + 2 * padding - kernel) // stride + 1, kernel, stride, 1, padding)
    assert shifts_are_faster(samples, 1, channels, (axis, axis)) is faster
