"""Sums over what each tap of a kernel meets, every entry of the image read once.

The taps of a kernel meet boxes that are alike but for their borders. Along the first image dimension, entries
that the same taps meet form *segments*: most of the image is in one or two of them, borders make the others.
Each segment is summed by itself, and one matrix product over segments and all further dimensions says which
sums and entries each tap has: nothing is subtracted, so a bright border costs no digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

#: First entry, past the last entry, and step along one dimension.
Span: TypeAlias = "tuple[int, int, int]"
#: Below this many entries per segment, entries go into the matrix product by themselves: a sum of a few
#: numbers each costs more than it saves (measured on images of 8, 16 and 32 pixels).
_LEAST_ENTRIES = 3


def box_sums(x: Tensor, boxes: Sequence[Sequence[slice]], dtype: torch.dtype) -> Tensor:
    """Returns the sum of ``x`` over every box, ``(n, channels * taps)``, first dimension slowest.

    Args:
        x: shape ``(n, channels, ...)``.
        boxes: by dimension after the channels, one slice per tap; what lies between them does not matter.
        dtype: of the sums and the result.

    Returns:
        New memory, also where a box holds a single entry.
    """
    n, channels, *size = x.shape
    spans = tuple(
        tuple(s.indices(length) for s in slices) for slices, length in zip(boxes, size, strict=True)
    )
    plan = _plan(spans, tuple(size), dtype, x.device)
    if plan.segments:
        parts = [_summed(x[:, :, first:last:step], dtype) for first, last, step in plan.segments]
        x = torch.stack(parts, 2)
    taps, entries = plan.indicator.shape
    sums = x.to(dtype).reshape(n * channels, entries) @ plan.indicator.T
    return sums.reshape(n, channels * taps)


@dataclass(frozen=True)
class _Plan:
    """How to sum the boxes of images of one size.

    Attributes:
        segments: of the first dimension, each to be summed; none: its entries stay as they are.
        indicator: 1 where a tap has a segment's (or entry's) sum at an entry of the further dimensions, 0
            elsewhere; shape ``(taps, segments * entries)``.
    """

    segments: tuple[Span, ...]
    indicator: Tensor


@lru_cache(maxsize=1024)
def _plan(
    spans: tuple[tuple[Span, ...], ...], size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> _Plan:
    met = [_entries_met(of_dim, length) for of_dim, length in zip(spans, size, strict=True)]
    segments = _segments(spans[0], size[0])
    if not segments or _LEAST_ENTRIES * len(segments) > size[0]:
        segments = ()
    else:
        met[0] = met[0][:, [first for first, _, _ in segments]]
    indicator = reduce(torch.kron, met).to(dtype=dtype, device=device)
    return _Plan(segments, indicator)


def _segments(spans: Sequence[Span], size: int) -> tuple[Span, ...]:
    """Returns disjoint spans whose entries are met by the same of ``spans``; all have the same step."""
    step = max(step for _, _, step in spans)  # a tap that meets nothing has none of its own
    found = []
    for offset in range(step):
        inside = [(first, _end(span)) for span in spans if (first := span[0]) % step == offset]
        cuts = sorted({cut for first, end in inside if first < end for cut in (first, end)})
        for first, last in pairwise(cuts):
            if any(a <= first < b for a, b in inside):
                found.append((first, min(last, size), step))
    return tuple(found)


def _end(span: Span) -> int:
    """Returns the entry after the last one, one step behind it."""
    first, last, step = span
    return first + len(range(first, last, step)) * step


def _entries_met(spans: Sequence[Span], size: int) -> Tensor:
    """Returns 1 where a span has an entry, 0 elsewhere, shape ``(spans, size)``."""
    met = torch.zeros(len(spans), size)
    for row, (first, last, step) in zip(met, spans, strict=True):
        row[first:last:step] = 1
    return met


def _summed(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the sum over the first image dimension, which may have one entry."""
    return part[:, :, 0].to(dtype) if part.shape[2] == 1 else part.sum(2, dtype=dtype)
