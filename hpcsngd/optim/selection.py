"""Which samples a compressed method keeps: how many, and which. Alike on every rank, without talking."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hpcsngd.optim.linalg import spectrum_summary


@dataclass(frozen=True)
class RankRule:
    """How many of ``n`` samples a compressed method keeps. One of the three is given; ``ratio=1`` keeps all.

    Attributes:
        ratio: ``max(1, round(ratio * n))``, in (0, 1]; grows with the batch and so with the number of ranks.
        low_rank: at most this many, whatever the batch size and the number of ranks.
        share: the smallest number of eigenvalues whose sum reaches this share of all, in (0, 1].

    Raises:
        ValueError: a number out of its range, or more than one rule.
    """

    ratio: float = 1.0
    low_rank: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: must be in (0, 1]")
        if self.low_rank is not None and self.low_rank < 1:
            raise ValueError(f"low_rank={self.low_rank}: must be at least 1")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: must be in (0, 1]")
        given = [f"{name}={value}" for name, value in self._given().items()]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one rule for the number of samples kept")

    @property
    def name(self) -> str:
        """Returns which of the three decides."""
        return next(iter(self._given()), "ratio")

    @property
    def keeps_everything(self) -> bool:
        """Returns whether nothing is ever left out."""
        return not self._given()

    def rows(self, count: int, eigenvalues: Tensor | None = None) -> int:
        """Returns how many of ``count`` samples to keep; 0 of 0.

        Args:
            count: samples there are.
            eigenvalues: of their kernel, or what stands for them; needed, and read, by ``share`` only.
        """
        if self.low_rank is not None:
            return min(count, self.low_rank)
        if self.share is not None:
            if eigenvalues is None:
                raise ValueError(f"share={self.share}: the spectrum is needed to choose the rank")
            return min(count, max(1, spectrum_summary(eigenvalues, self.share)[0]))
        return rows_to_keep(count, self.ratio)

    def _given(self) -> dict[str, float]:
        rules = {"ratio": None if self.ratio == 1 else self.ratio, "low_rank": self.low_rank}
        return {name: value for name, value in {**rules, "share": self.share}.items() if value is not None}


def rows_to_keep(count: int, ratio: float) -> int:
    """Returns ``max(1, round(ratio * count))``, and 0 of 0."""
    return min(count, max(1, round(ratio * count)))


def apportion(budget: int, counts: Sequence[int]) -> list[int]:
    """Splits a budget of samples over ranks in proportion to what they have, by largest remainders.

    Args:
        budget: samples to keep on all ranks together.
        counts: samples of each rank.

    Returns:
        Samples to keep on each rank, never more than it has; their sum is ``min(budget, sum(counts))``.
    """
    total = sum(counts)
    if budget >= total:
        return list(counts)
    shares = [budget * count // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda rank: -(budget * counts[rank] % total))
    for rank in by_remainder[: budget - sum(shares)]:
        shares[rank] += 1
    return shares


class Draw(NamedTuple):
    """Samples drawn: ascending ``rows`` (int64) and ``weight`` (float64), both on the CPU, shape ``(k,)``."""

    rows: Tensor
    weight: Tensor


def draw_rows(scores: Tensor, keep: int, *, seed: int, step: int, layer: str) -> Draw:
    """Draws ``keep`` different samples with probability in proportion to their scores.

    Khatri-Rao importance sampling (HyLo, Mu et al., SC 2022): score_i = ||a_i||^2 ||g_i||^2. The draw depends
    on the joined scores, ``seed``, ``step`` and ``layer`` only: ranks agree without talking, and one process
    with the joined batch draws the same samples as many ranks.

    The weights make every sum over samples unbiased: E[sum_drawn w_i x_i] = sum_all x_i. ``1/(k p_i)``, with
    ``p_i`` the share of the scores, would do so for draws *with* replacement. Without, the probability that i
    is drawn, given the ring tau of the first sample left out, is ``1 - exp(-score_i tau)``, and its inverse
    is the weight (bottom-k estimator, Cohen and Kaplan, PODC 2007). It tends to ``1/(k p_i)`` when k is
    small against n, and is 1 when nothing is left out.

    Args:
        scores: not negative, shape ``(n,)``, of the joined batch. Samples of score zero come last.
        keep: how many to draw, at most ``n``.
        seed: of the run.
        step: at which the draw happens.
        layer: name of the layer.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{layer}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    rates = scores.to("cpu", torch.float64)
    # The order in which exponential clocks with these rates ring is successive sampling without replacement.
    rings = torch.empty_like(rates).exponential_(generator=generator) / rates
    order = rings.argsort(stable=True)
    index = order[:keep].sort().values
    if keep >= len(rates):
        return Draw(index, torch.ones_like(rates))
    # A sample of score zero has a zero row: its weight does not matter (0 * inf is nan here, then 1).
    inverse = -torch.expm1(-rates[index] * rings[order[keep]])
    return Draw(index, torch.where(inverse > 0, 1 / inverse, torch.ones_like(inverse)))
