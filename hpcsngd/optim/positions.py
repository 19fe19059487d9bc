"""What a convolution reads at each of its positions, in any number of dimensions, as index arithmetic.

A convolution moves a *grid* of positions over an *image*. Along each dimension, kernel tap ``t`` of grid
position ``o`` meets the image entry

    o * stride + t * dilation - before,                       before = zeros in front of the image

and nothing where that lies outside. A convolution reads the image (its input) and writes the grid (its
output); a transposed convolution reads the grid and writes the image. Both therefore share all formulas.

Patches are never built where their sum is enough: what one tap meets is a strided box
(`hpcsngd.optim.boxsums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Geometry:
    """Kernel size, stride, dilation and zeros in front of the image; one entry per image dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]

    @property
    def dims(self) -> int:
        """Returns the number of image dimensions."""
        return len(self.kernel)

    def image_boxes(self, image: Sequence[int], grid: Sequence[int]) -> list[list[slice]]:
        """Returns, by dimension and tap, the entries of the image that the tap meets, each exactly once."""
        return [
            [
                slice(first * stride + offset, last * stride + offset + 1, stride)
                if first <= last
                else slice(0)
                for first, last, offset in self._meetings(dim, image[dim], grid[dim])
            ]
            for dim, stride in enumerate(self.stride)
        ]

    def grid_boxes(self, image: Sequence[int], grid: Sequence[int]) -> list[list[slice]]:
        """Returns, by dimension and tap, the positions of the grid where the tap meets the image."""
        return [
            [
                slice(first, last + 1) if first <= last else slice(0)
                for first, last, _ in self._meetings(dim, image[dim], grid[dim])
            ]
            for dim in range(self.dims)
        ]

    def _meetings(self, dim: int, image: int, grid: int) -> list[tuple[int, int, int]]:
        """Returns for each tap the first and last grid position that meets the image, and its offset."""
        stride = self.stride[dim]
        offsets = [tap * self.dilation[dim] - self.before[dim] for tap in range(self.kernel[dim])]
        return [
            (max(0, -(offset // stride)), min(grid - 1, (image - 1 - offset) // stride), offset)
            for offset in offsets
        ]


def patches(image: Tensor, geometry: Geometry, grid: Sequence[int]) -> Tensor:
    """Returns what every tap meets at every position, ``(n, channels * taps, positions)``, zeros outside.

    Args:
        image: shape ``(n, channels, ...)``.
        geometry: of the convolution.
        grid: size of the grid of positions.
    """
    padded = _padded(image, geometry, grid).contiguous()
    sample, channel, *entry = padded.stride()
    taps = [stride * dilation for stride, dilation in zip(entry, geometry.dilation, strict=True)]
    steps = [stride * step for stride, step in zip(entry, geometry.stride, strict=True)]
    size = (*padded.shape[:2], *geometry.kernel, *grid)
    view = padded.as_strided(size, (sample, channel, *taps, *steps))
    return view.flatten(1, 1 + geometry.dims).flatten(2)


def carried(grid: Tensor, geometry: Geometry, image: Sequence[int]) -> Tensor:
    """Returns what every tap of a transposed convolution brings to every entry of the image.

    Args:
        grid: its input, shape ``(n, channels, ...)``.
        geometry: of the convolution.
        image: size of its output.

    Returns:
        ``(n, channels * taps, entries)``: the grid's value where a tap brings one, 0 elsewhere.
    """
    result = grid.new_zeros(*grid.shape[:2], *geometry.kernel, *image)
    targets = geometry.image_boxes(image, grid.shape[2:])
    sources = geometry.grid_boxes(image, grid.shape[2:])
    by_tap = result.flatten(2, 1 + geometry.dims)
    for tap, where in enumerate(product(*map(range, geometry.kernel))):
        to, of = ([boxes[dim][t] for dim, t in enumerate(where)] for boxes in (targets, sources))
        everywhere = [slice(None), slice(None)]
        by_tap[:, :, tap][tuple(everywhere + to)] = grid[tuple(everywhere + of)]
    return result.flatten(1, 1 + geometry.dims).flatten(2)


def _padded(image: Tensor, geometry: Geometry, grid: Sequence[int]) -> Tensor:
    """Returns the image with zeros around it, up to the last entry that any position meets."""
    widths: list[int] = []
    for dim in reversed(range(geometry.dims)):
        reach = (grid[dim] - 1) * geometry.stride[dim] + (geometry.kernel[dim] - 1) * geometry.dilation[dim]
        before = geometry.before[dim]
        # Negative where a stride leaves entries at the end that nothing meets: pad() crops them.
        widths += [before, reach + 1 - before - image.shape[2 + dim]]
    return pad(image, widths)
