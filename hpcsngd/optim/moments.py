"""Second moments of what a layer reads and of its output gradients: the sums behind K-FAC's factors.

With ``x_is`` the input vector of sample i at position s (`hpcsngd.optim.layers`), the moment of a layer's
inputs is ``sum_is x_is x_is^T``. For a convolution ``x_is`` is a patch, and the textbook way builds them all:
as many copies of the image as the kernel has taps. Here the moment comes from the image itself. For taps t, u

    M[t, u] = sum_o x(o + k_t) x(o + k_u)^T = R(k_u - k_t) - (the same sum over positions outside the grid)

where ``R(delta) = sum_p x(p) x(p + delta)^T`` runs over the whole image, zeros around it: the same for all
pairs of taps with equal difference, and ``R(-delta) = R(delta)^T``. All R are one weight gradient of a
convolution of the image with itself. A 3x3 kernel needs 15 products of channels where patches take 81. What
lies outside the grid is the border of the image: one slab for each axis and position beside the grid, whose
moment is that of a problem with one axis less.

With a stride, taps meet different phases of the image, which count as channels: ``x_f(q) = x(q stride + f)``.
This is exact for every stride, padding, dilation and number of groups, in one, two or three dimensions.
Idea: the spatially homogeneous sums of Grosse & Martens, ICML 2016, section 3, without their assumption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from math import gcd, prod
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from hpcsngd.optim.positions import Geometry, patches

Method = Literal["auto", "shifts", "patches"]

#: Patches are built for as many samples at a time as fit into this, at least one.
PATCH_BYTES = 2**22

#: See `shifts_are_faster`.
PATCH_PRICE, SHIFT_PRICE, LEAST_CHANNELS, PROBLEM_PRICE = 40, 20, 16, 10**7


def gram(x: Tensor) -> Tensor:
    """Returns ``sum x x^T`` over samples and positions, shape ``(groups, d, d)``.

    A product for each sample reads ``x`` as it lies but writes a matrix per sample; one product for all needs
    a copy of ``x``. The first was 1.5 times faster with 16 channels on 32x32 positions, and 3 times slower
    with 512 channels on 7x7: what has fewer numbers to write is taken.

    Args:
        x: shape ``(n, groups, d, positions)``.
    """
    if x.shape[2] <= x.shape[3]:
        return (x @ x.mT).sum(0)
    rows = x.permute(1, 2, 0, 3).flatten(2)
    return rows @ rows.mT


def patch_moment(x: Tensor, geometry: Geometry, grid: Sequence[int], method: Method = "auto") -> Tensor:
    """Returns the second moment of a convolution's patches.

    Args:
        x: the input, shape ``(n, groups, channels, ...)``.
        geometry: of the convolution.
        grid: size of the grid of positions.
        method: ``"shifts"`` as in this module's docstring; ``"patches"`` builds them, for PATCH_BYTES at a
            time; ``"auto"`` what is faster.

    Returns:
        Shape ``(groups, d, d)`` with ``d = channels * taps``, channels slowest.
    """
    if not len(x):
        return _by_patches(x, geometry, grid)
    axes = _axes(geometry, x.shape[3:], grid)
    if method == "shifts" or (method == "auto" and shifts_are_faster(len(x), x.shape[1], x.shape[2], axes)):
        return _in_order(_by_shifts(x, axes), len(axes))
    return _by_patches(x, geometry, grid)


@dataclass(frozen=True)
class Axis:
    """One dimension of a convolution.

    Attributes:
        size: of the image.
        grid: positions.
        kernel: taps.
        stride: between positions.
        dilation: between taps.
        before: zeros in front of the image.
    """

    size: int
    grid: int
    kernel: int
    stride: int
    dilation: int
    before: int

    @property
    def offsets(self) -> list[int]:
        """Returns what each tap reads at position 0, as an index into the image."""
        return [tap * self.dilation - self.before for tap in range(self.kernel)]

    @property
    def shifts(self) -> list[int]:
        """Returns the offsets in entries of a phase of the image."""
        return [offset // self.stride for offset in self.offsets]

    @property
    def step(self) -> int:
        """Returns the largest number that divides all differences of shifts; 1 where there are none."""
        return gcd(*(b - a for a, b in pairwise(self.shifts))) or 1

    @property
    def reach(self) -> int:
        """Returns the largest difference of shifts, in steps."""
        return self.span // self.step

    @property
    def span(self) -> int:
        """Returns the largest difference of shifts."""
        return self.shifts[-1] - self.shifts[0]

    @property
    def everywhere(self) -> range:
        """Returns the positions, on the grid or beside it, between which every tap meets the image."""
        first, last = self.offsets[0], self.offsets[-1]
        return range(-(last // self.stride), (self.size - 1 - first) // self.stride + 1)

    def inside(self, position: int) -> slice:
        """Returns the taps that meet the image at ``position``."""
        offset = position * self.stride - self.before
        first = max(0, -(offset // self.dilation))
        last = min(self.kernel - 1, (self.size - 1 - offset) // self.dilation)
        return slice(first, max(first, last + 1))

    def beside(self) -> list[tuple[int, slice]]:
        """Returns the positions outside the grid where some tap meets the image, and those taps."""
        outside = [o for o in self.everywhere if not 0 <= o < self.grid]
        return [(o, taps) for o in outside if (taps := self.inside(o)).stop > taps.start]


def shifts_are_faster(samples: int, groups: int, channels: int, axes: tuple[Axis, ...]) -> bool:
    """Returns whether shifts take less time than patches.

    The unit of time is a multiplication in a large matrix product. On top of those, building a patch costs
    PATCH_PRICE for each of its numbers, reading the image SHIFT_PRICE; a product of shifts works on at least
    LEAST_CHANNELS; each sub-problem, of which a 3x3 kernel with padding 1 has 9, costs PROBLEM_PRICE to set
    up. Fitted to 33 shapes (float32, 2 x86_64 cores, torch 2.13, oneDNN), of which the rule gets 30 right; at
    the others what it takes is up to 1.3 times slower. By shifts, CPU-ms against patches:

        samples, channels, side      kernel 3, padding 1      128, 16, 32    20 : 82
                                                              128, 64, 8     21 : 76
                                                              32, 256, 7     94 : 225
                                                              16, 16, 8       5 : 1.4 (patches are taken)
        32, 3, 112                   kernel 7, stride 2                      24 : 79
        128, 16, 32                  kernel 3, stride 2                      34 : 24  (patches are taken)

    Args:
        samples: n.
        groups: of channels.
        channels: of a group.
        axes: of the convolution.
    """
    side = channels * prod(axis.kernel for axis in axes)
    patch = side * (side + PATCH_PRICE) * prod(axis.grid for axis in axes)
    read = SHIFT_PRICE * channels * prod(axis.size for axis in axes)
    products, problems = _shift_work(channels, axes)
    # One tap: its patches are the image itself.
    return (
        any(axis.reach for axis in axes)
        and problems * PROBLEM_PRICE + samples * groups * (products + read) < samples * groups * patch
    )


def _shift_work(channels: int, axes: tuple[Axis, ...]) -> tuple[int, int]:
    """Returns the multiplications per sample and group by shifts, and the number of sub-problems."""
    side = channels * prod(axis.stride for axis in axes)
    half = _half_axis(axes)
    pairs = prod(axis.reach + 1 if j == half else 2 * axis.reach + 1 for j, axis in enumerate(axes))
    entries = prod(-(-axis.size // axis.stride) for axis in axes)
    below = [_shift_work(channels * (taps.stop - taps.start), slab) for _, _, taps, slab in _slabs(axes)]
    products = pairs * side * max(side, LEAST_CHANNELS) * entries + sum(work for work, _ in below)
    return products, 1 + sum(problems for _, problems in below)


def _axes(geometry: Geometry, size: Sequence[int], grid: Sequence[int]) -> tuple[Axis, ...]:
    numbers = (geometry.kernel, geometry.stride, geometry.dilation, geometry.before)
    return tuple(Axis(*of_axis) for of_axis in zip(size, grid, *numbers, strict=True))


def _in_order(moment: Tensor, dims: int) -> Tensor:
    """Returns ``(groups, d, d)`` of ``(*taps, *taps, groups, channels, channels)``."""
    first, second = range(dims), range(dims, 2 * dims)
    moment = moment.permute(2 * dims, 2 * dims + 1, *first, 2 * dims + 2, *second)
    return moment.flatten(2 + dims).flatten(1, 1 + dims)


def _by_patches(x: Tensor, geometry: Geometry, grid: Sequence[int]) -> Tensor:
    groups, channels = x.shape[1:3]
    side = channels * prod(geometry.kernel)
    moment = x.new_zeros(groups, side, side)
    if not (prod(grid) and len(x)):
        return moment
    at_once = max(1, PATCH_BYTES // (groups * side * prod(grid) * x.element_size()))
    for part in torch.split(x, at_once):
        found = patches(part.flatten(1, 2), geometry, grid)
        moment += gram(found.reshape(len(part), groups, side, -1))
    return moment


def _by_shifts(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Returns the moment over the grid, ``(*taps, *taps, groups, channels, channels)``."""
    if not axes:
        return gram(x.unsqueeze(3))
    dims = len(axes)
    moment = _moment_everywhere(x, axes)
    for index, position, taps, others in _slabs(axes):
        found = _by_shifts(_slab(x, axes[index], index, position, taps), others)
        sides = (x.shape[2], taps.stop - taps.start)
        found = found.reshape(*found.shape[:-2], *sides, *sides)
        part = moment.movedim((index, dims + index), (-3, -1))[..., taps, :, taps]
        part -= found
    return moment


@lru_cache(256)
def _slabs(axes: tuple[Axis, ...]) -> list[tuple[int, int, slice, tuple[Axis, ...]]]:
    """Returns what to take from the moment over all positions: axis, position on it, taps, and other axes.

    ``grid x ... x grid = all - sum_j (grid, axes before j) x (beside it, axis j) x (all, axes after j)``.
    """
    return [
        (index, position, taps, (*axes[:index], *(_unbounded(other) for other in axes[index + 1 :])))
        for index, axis in enumerate(axes)
        for position, taps in axis.beside()
    ]


def _slab(x: Tensor, axis: Axis, index: int, position: int, taps: slice) -> Tensor:
    """Returns what taps read at one position of an axis, ``(n, groups, channels * taps, other axes)``."""
    offset = position * axis.stride - axis.before
    entries = range(offset + taps.start * axis.dilation, offset + taps.stop * axis.dilation, axis.dilation)
    return x.movedim(3 + index, 3)[:, :, :, entries[0] : entries[-1] + 1 : axis.dilation].flatten(2, 3)


def _unbounded(axis: Axis) -> Axis:
    """Returns the axis with a grid of all positions between which any tap meets the image."""
    positions = axis.everywhere
    return replace(axis, grid=len(positions), before=axis.before - positions.start * axis.stride)


def _moment_everywhere(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Returns the moment over all positions, ``(*taps, *taps, groups, channels, channels)``."""
    groups, channels = x.shape[1:3]
    products = _shifted_products(_phases(x, axes), groups, axes)
    # (groups, channels, phases, channels, phases, shifts) -> one index for (phases, phases, shifts).
    phases = prod(axis.stride for axis in axes)
    products = products.reshape(groups, channels, phases, channels, phases, -1)
    products = products.permute(2, 4, 5, 0, 1, 3).reshape(-1, groups, channels, channels)
    taps = [axis.kernel for axis in axes]
    return products[_pairs_of_taps(axes).to(x.device)].reshape(*taps, *taps, *products.shape[1:])


@lru_cache(256)
def _pairs_of_taps(axes: tuple[Axis, ...]) -> Tensor:
    """Returns each pair's index into all (phases, phases, shifts), taps by taps, flattened."""
    dims = len(axes)
    sizes = [*(axis.stride for axis in axes)] * 2 + [2 * axis.reach + 1 for axis in axes]
    total = torch.zeros((1,) * 2 * dims, dtype=torch.int64)
    for j, axis in enumerate(axes):
        phases = torch.tensor([offset % axis.stride for offset in axis.offsets])
        shifts = torch.tensor(axis.shifts) // axis.step
        first, second, difference = (prod(sizes[k + 1 :]) for k in (j, dims + j, 2 * dims + j))
        pairs = phases[:, None] * first + phases * second
        pairs = pairs + (shifts - shifts[:, None] + axis.reach) * difference
        shape = [axis.kernel if k in (j, dims + j) else 1 for k in range(2 * dims)]
        total = total + pairs.reshape(shape)
    return total.flatten()


def _phases(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Returns the phases of the image as channels, ``(n, groups * channels * phases, ...)``."""
    if all(axis.stride == 1 for axis in axes):
        return x.flatten(1, 2)
    x = pad(x, [width for axis in reversed(axes) for width in (0, -axis.size % axis.stride)])
    for dim, axis in enumerate(axes):
        # (n, groups, channels, *phases so far, *entries so far, entries of this axis, ...)
        now = 3 + 2 * dim
        x = x.reshape(*x.shape[:now], -1, axis.stride, *x.shape[now + 1 :]).movedim(now + 1, 3 + dim)
    return x.flatten(1, 2 + len(axes))


def _shifted_products(x: Tensor, groups: int, axes: tuple[Axis, ...]) -> Tensor:
    """Returns ``R`` for all shifts, ``(groups, channels, channels, *shifts)``; only half are computed.

    Args:
        x: shape ``(n, groups * channels, ...)``.
        groups: of channels.
        axes: as many as dimensions of the image.
    """
    half = _half_axis(axes)
    behind = [width for j in reversed(range(len(axes))) for width in (0, axes[j].span if j == half else 0)]
    products = (_by_products if len(axes) == 1 else _by_convolution)(x, groups, axes, behind)
    mirrored = products.narrow(3 + half, 1, axes[half].reach)
    mirrored = mirrored.transpose(1, 2).flip(*range(3, products.dim()))
    return torch.cat([mirrored, products], 3 + half)


def _by_convolution(x: Tensor, groups: int, axes: tuple[Axis, ...], behind: Sequence[int]) -> Tensor:
    """Returns half of ``R`` as the weight gradient of a convolution from the image to itself.

    Channels come last: with few of them that is up to 3 times faster (16 on 32x32: 12 against 37 CPU-ms).
    """
    half, channels = _half_axis(axes), x.shape[1] // groups
    x = x.contiguous(memory_format=torch.channels_last if len(axes) == 2 else torch.channels_last_3d)
    kernel = [axis.reach + 1 if j == half else 2 * axis.reach + 1 for j, axis in enumerate(axes)]
    weight = x.new_empty(x.shape[1], channels, *kernel)  # only its shape is read
    around = [0 if j == half else axis.span for j, axis in enumerate(axes)]
    steps, ones, zeros = [axis.step for axis in axes], [1] * len(axes), [0] * len(axes)
    wanted = [False, True, False]
    products: Tensor
    _, products, _ = torch.ops.aten.convolution_backward(
        x, pad(x, behind), weight, None, ones, around, steps, False, zeros, groups, wanted
    )
    return products.reshape(groups, channels, channels, *kernel)


def _by_products(x: Tensor, groups: int, axes: tuple[Axis, ...], behind: Sequence[int]) -> Tensor:
    """Returns half of ``R`` on one axis: all samples behind one another, kept apart by their padding."""
    (axis,) = axes
    line = pad(x, behind).transpose(0, 1).reshape(groups, x.shape[1] // groups, -1)
    shifts = range(0, axis.span + 1, axis.step)
    length = line.shape[2]
    return torch.stack([line[:, :, : length - shift] @ line[:, :, shift:].mT for shift in shifts], 3)


def _half_axis(axes: tuple[Axis, ...]) -> int:
    """Returns the axis whose negative shifts are left out: the one where that saves most."""
    reaches = [axis.reach for axis in axes]
    return reaches.index(max(reaches)) if reaches else 0
