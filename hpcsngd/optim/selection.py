"""Which samples a compressed method keeps: decided on the joined scores, alike on every rank."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def rows_to_keep(count: int, ratio: float) -> int:
    """Returns ``max(1, round(ratio * count))``, and 0 of 0."""
    return min(count, max(1, round(ratio * count)))


def draw_rows(scores: Tensor, keep: int, *, seed: int, step: int, layer: str) -> Tensor:
    """Draws ``keep`` different samples with probability in proportion to their scores.

    Khatri-Rao importance sampling (HyLo, Mu et al., SC 2022): score_i = ||a_i||^2 ||g_i||^2. The draw depends
    on the joined scores, ``seed``, ``step`` and ``layer`` only: ranks agree without talking, and one process
    with the joined batch draws the same samples as many ranks.

    Args:
        scores: not negative, shape ``(n,)``, of the joined batch. Samples of score zero come last.
        keep: how many to draw, at most ``n``.
        seed: of the run.
        step: at which the draw happens.
        layer: name of the layer.

    Returns:
        Ascending indices, int64 on the CPU, shape ``(keep,)``.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{layer}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    # The order in which exponential clocks with these rates ring is successive sampling without replacement.
    clocks = torch.empty(len(scores), dtype=torch.float64).exponential_(generator=generator)
    rings = clocks / scores.to("cpu", torch.float64)
    return rings.argsort(stable=True)[:keep].sort().values
