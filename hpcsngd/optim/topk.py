"""Top-k with error feedback: what is sent of a vector now, and what is kept for later.

    a_t = e_{t-1} + scale g_t,   c_t = the entries of a_t of largest absolute value,   e_t = a_t - c_t

so that the sum of everything sent and the error left over is the sum of the gradients. Sources: Alistarh et
al., "The convergence of sparsified gradient methods", NeurIPS 2018; for its use inside a preconditioner EFCP
(Modoranu et al., "Error feedback can accurately compress preconditioners", ICML 2024).

Entries are chosen within blocks, so that a position inside its block fits an integer of 16 bits and that all
blocks of a size are searched in one call. Cost of a step with d entries: O(d) additions and one selection.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: Where top-k competes: inside blocks of a fixed size, inside each layer, or over everything.
Scope = Literal["block", "layer", "global"]

#: Largest block whose positions fit a signed integer of 16 bits.
MAX_BLOCK = 32_768


@dataclass(frozen=True)
class Run:
    """Blocks that follow each other, alike in length and in how many entries are kept."""

    start: int
    blocks: int
    length: int
    keep: int

    @property
    def stop(self) -> int:
        """Returns where the run ends."""
        return self.start + self.blocks * self.length


class BlockTopK:
    """Chooses the entries of a vector that are largest by absolute value, block by block.

    Ties are broken by torch's order, alike on every rank; among zeros some zeros are chosen, which is
    harmless: an entry of zero adds nothing.

    Args:
        size: length of the vector.
        density: share of each block that is kept, in (0, 1]; rounded up, so at least one entry.
        scope: where entries compete.
        layers: lengths of the layers, in order; needed with scope ``"layer"``.
        block_size: length of a block with scope ``"block"``; longer layers are cut to it if ``is_short``.
        is_short: whether positions inside blocks must fit 16 bits.

    Raises:
        ValueError: a density outside (0, 1], layers that do not add up, or blocks too long for 16 bits.
    """

    def __init__(
        self,
        size: int,
        density: float,
        *,
        scope: Scope = "block",
        layers: Sequence[int] = (),
        block_size: int = MAX_BLOCK,
        is_short: bool = False,
    ) -> None:
        if not 0 < density <= 1:
            raise ValueError(f"density={density}: must be in (0, 1]")
        if block_size < 1 or (is_short and block_size > MAX_BLOCK):
            raise ValueError(f"block_size={block_size}: must be in 1..{MAX_BLOCK} for 16-bit indices")
        if scope == "layer" and sum(layers) != size:
            raise ValueError(f"layers of {sum(layers)} entries do not make up a vector of {size}")
        if scope == "global" and is_short and size > MAX_BLOCK:
            raise ValueError(f"scope 'global' over {size} entries needs 32-bit indices")
        self.size = size
        self.runs = tuple(_runs(_lengths(size, scope, layers, block_size, is_short=is_short), density))

    @property
    def kept(self) -> int:
        """Returns how many entries are chosen."""
        return sum(run.blocks * run.keep for run in self.runs)

    def boundaries(self) -> list[int]:
        """Returns where blocks begin, and the end of the last one."""
        starts = [run.start + index * run.length for run in self.runs for index in range(run.blocks)]
        return [*starts, self.size]

    def part(self, start: int, stop: int) -> tuple[BlockTopK, int]:
        """Returns the rule for a part of the vector, and how many entries are chosen before that part.

        Args:
            start: of the part, one of `boundaries`.
            stop: of the part, one of `boundaries`.
        """
        runs, before = [], 0
        for run in self.runs:
            first = min(max(0, (start - run.start) // run.length), run.blocks)
            last = min(max(0, (stop - run.start) // run.length), run.blocks)
            before += first * run.keep
            if last > first:
                moved = run.start + first * run.length - start
                runs.append(Run(moved, last - first, run.length, run.keep))
        rule = copy.copy(self)
        rule.size, rule.runs = stop - start, tuple(runs)
        return rule, before

    def choose(self, vector: Tensor) -> Tensor:
        """Returns the positions of the chosen entries, int64, ascending, shape ``(kept,)``.

        Ascending, because products over a window then go through memory in order.
        """
        chosen = []
        for run in self.runs:
            blocks = vector[run.start : run.stop].abs().view(run.blocks, run.length)
            inside = blocks.topk(run.keep, dim=1, sorted=False).indices.sort(dim=1).values
            offsets = run.start + run.length * torch.arange(run.blocks, device=vector.device)
            chosen.append((inside + offsets[:, None]).reshape(-1))
        return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64, device=vector.device)

    def offsets(self, device: torch.device) -> Tensor:
        """Returns where the block of each chosen entry begins, int32, shape ``(kept,)``."""
        parts = [
            (run.start + run.length * torch.arange(run.blocks, dtype=torch.int32)).repeat_interleave(run.keep)
            for run in self.runs
        ]
        return torch.cat([torch.zeros(0, dtype=torch.int32), *parts]).to(device)


def _lengths(size: int, scope: Scope, layers: Sequence[int], block_size: int, *, is_short: bool) -> list[int]:
    if scope == "global":
        return [size]
    if scope == "block":
        return _cut(size, block_size)
    longest = block_size if is_short else max(layers)
    return [part for layer in layers for part in _cut(layer, longest)]


def _cut(size: int, length: int) -> list[int]:
    full, rest = divmod(size, length)
    return [length] * full + ([rest] if rest else [])


def _runs(lengths: Sequence[int], density: float) -> list[Run]:
    runs: list[Run] = []
    start = 0
    for length in lengths:
        # the tolerance keeps 0.01 * 100 = 1.0000000000000002 from becoming 2
        keep = min(length, max(1, math.ceil(density * length - 1e-9)))
        last = runs[-1] if runs else None
        if last and (last.length, last.keep) == (length, keep):
            runs[-1] = Run(last.start, last.blocks + 1, length, keep)
        else:
            runs.append(Run(start, 1, length, keep))
        start += length
    return runs


class ErrorFeedback:
    """Top-k of a stream of vectors, with what was not sent added to the next.

    Args:
        rule: chooses the entries.
        value_dtype: what a sent value is rounded to; the rounding error is fed back too.
        dtype: of the error.
        device: of the error.
        is_on: False drops what is not sent (plain top-k), to measure what feedback is worth.
    """

    def __init__(
        self,
        rule: BlockTopK,
        *,
        value_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        is_on: bool = True,
    ) -> None:
        self._rule = rule
        self._value_dtype = value_dtype
        self._is_on = is_on
        self.error = torch.zeros(rule.size, dtype=dtype, device=device)

    def send(self, vector: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Returns the values sent, rounded to ``value_dtype``, and their positions, each ``(kept,)``.

        Args:
            vector: shape ``(size,)``.
            scale: factor of the vector, such as the learning rate where the wrapped update already has it.
        """
        self.error.add_(vector, alpha=scale)
        positions = self._rule.choose(self.error)
        exact = self.error[positions]
        values = exact.to(self._value_dtype)
        if self._is_on:
            self.error[positions] = exact - values.to(exact.dtype)
        else:
            self.error.zero_()
        return values, positions
