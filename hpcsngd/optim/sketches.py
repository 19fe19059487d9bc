"""What each method makes of a batch on 1..N ranks: from the rows captured here to sketches on every rank.

Numbers that a rank with ``n_p`` of N samples hands over per layer and refresh, in the rows' dtype unless
stated (plus 16 bytes for each layer), with d numbers per sample: ``terms (groups d_in + d_out)`` as factors
or ``d_in d_out`` as matrices (`hpcsngd.optim.rows`); ``d_in + d_out`` for a plain layer in mode reduce:

    SNGD                      n_p d                     every row
    KIS                       n_p (float64) + k_p d     scores, then the k_p drawn rows that are here
    KID, scope "joined"       n_p d                     as SNGD; the result does not depend on the ranks
    KID, scope "local"        r_p d + r_p^2 + 1         each rank decides on its own samples

For a layer with an owner (`hpcsngd.optim.placement`) the owner's rows do not travel.

Scope ``"local"``: rank p interpolates its own samples from ``r_p`` of them, so that G is block diagonal; N,
the kernel of all kept rows and everything after are global. It is the same as ``"joined"`` on one rank, exact
at full rank, and less accurate in between, because samples of different ranks do not stand for each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hpcsngd.optim.calls import MisalignedError
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.curvature import Sketch
from hpcsngd.optim.gather import Block, Joined, Usable, agree, join_all, join_blocks, join_chosen, join_scores
from hpcsngd.optim.kid import Interpolation, interpolate_each, interpolate_rows
from hpcsngd.optim.placement import Placer
from hpcsngd.optim.rows import Rows
from hpcsngd.optim.selection import Draw, RankRule, apportion, draw_rows
from hpcsngd.optim.stopwatch import Stopwatch

#: A method that a refresh can use; the hybrid one is kid or kis at each.
Plain = Literal["sngd", "kid", "kis"]
Scope = Literal["joined", "local"]


@dataclass(frozen=True)
class Batch:
    """What a refresh knows of the joined batch; layers without samples or with a fault are missing.

    Attributes:
        samples: layer -> samples of the joined batch; the same layers on every rank.
        owners: layer -> the only rank that has its sketch (`hpcsngd.optim.placement`).
        sketches: layer -> its sketch, without layers owned elsewhere; None where that failed here.
        everything: layer -> all rows, where they were asked for or needed anyway.
        faults: layer -> what went wrong on some rank.
    """

    samples: dict[str, int]
    owners: dict[str, int]
    sketches: dict[str, Sketch | None]
    everything: dict[str, Rows]
    faults: dict[str, str]


@dataclass(frozen=True)
class Compression:
    """Compresses a batch.

    Attributes:
        rule: how many samples KID and KIS keep.
        residual: whether KID carries its residual.
        unbiased: whether KIS re-weights the samples drawn.
        scope: what KID decides on.
        seed: of KIS's draws.
    """

    rule: RankRule
    residual: bool
    unbiased: bool
    scope: Scope
    seed: int

    def gather(
        self,
        communicator: Communicator,
        local: Mapping[str, Rows | MisalignedError],
        method: Plain,
        *,
        step: int,
        damping: float,
        everything: bool,
        placer: Placer,
        stopwatch: Stopwatch,
    ) -> Batch:
        """Returns the joined batch as ``method`` sees it.

        Args:
            communicator: does and counts the exchange.
            local: this rank's rows by layer.
            method: which one.
            step: of the refresh.
            damping: of the refresh.
            everything: whether to gather the rows that the method does without as well.
            placer: says who gets what.
            stopwatch: counts what is computed, between exchanges, as phase ``factorise``.
        """
        usable = agree(communicator, local)
        faults = usable.faults
        is_local = method == "kid" and self.scope == "local"
        is_drawn = method == "kis" and not self.rule.keeps_everything
        joined = Joined({}, {})
        if everything or not (is_local or is_drawn):
            joined = join_all(communicator, usable, placer)
        rows, owners = joined.rows, joined.owners
        if is_local:
            sketches, failed = self._gather_blocks(communicator, usable, damping, stopwatch)
            faults = {**faults, **failed}
        elif everything or not is_drawn:
            with stopwatch.phase("factorise"):
                sketches = self.sketches(method, rows, step, damping)
        else:
            sketches, owners = self._gather_drawn(communicator, usable, step, placer)
        samples = {name: count for name, count in usable.samples().items() if name not in faults}
        return Batch(samples, owners, sketches, rows, faults)

    def sketch(self, method: Plain, layer: str, rows: Rows, step: int, damping: float) -> Sketch | None:
        """Returns what ``method`` makes of all rows of one layer; None for a kernel that is not finite."""
        return self.sketches(method, {layer: rows}, step, damping)[layer]

    def sketches(
        self, method: Plain, rows: Mapping[str, Rows], step: int, damping: float
    ) -> dict[str, Sketch | None]:
        """Returns `sketch` of every layer; KID looks for the pivots of layers with equal sizes together."""
        if method == "kid":
            return self._interpolated_sketches(rows, damping)
        if method == "sngd":
            return {name: Sketch(all_, len(all_), len(all_)) for name, all_ in rows.items()}
        found: dict[str, Sketch | None] = {}
        for name, all_ in rows.items():
            scores = all_.scores()
            draw = self._draw(name, scores, step)
            found[name] = self._drawn_sketch(all_.take(draw.rows), draw, scores)
        return found

    def _interpolated_sketches(self, rows: Mapping[str, Rows], damping: float) -> dict[str, Sketch | None]:
        counts = {name: len(all_) for name, all_ in rows.items()}
        sketches: dict[str, Sketch | None] = {}
        for name, found in self._interpolate(rows, {}, counts, damping).items():
            sketches[name] = None
            if found is not None:
                kept, count = rows[name].take(found.kept), counts[name]
                left_out = _mean_left_out(found.left_out, kept, count)
                sketches[name] = Sketch(kept, count, count, found.mixing, left_out)
        return sketches

    def _interpolate(
        self, rows: Mapping[str, Rows], keep: Mapping[str, int], samples: Mapping[str, int], damping: float
    ) -> dict[str, Interpolation | None]:
        """Returns the interpolation of every layer's rows.

        Args:
            rows: by layer.
            keep: how many to keep, where the rule does not say.
            samples: N by layer.
            damping: of the refresh.
        """
        of_all = [samples[name] for name in rows]
        if self.rule.share is not None:
            kernels = [all_.double().gram() for all_ in rows.values()]
            ranks = [_spectral_rank(self.rule, kernel) for kernel in kernels]
            found = interpolate_each(kernels, ranks, samples=of_all, damping=damping, residual=self.residual)
        else:
            ranks = [keep.get(name, self.rule.rows(len(all_))) for name, all_ in rows.items()]
            found = interpolate_rows(
                list(rows.values()), ranks, samples=of_all, damping=damping, residual=self.residual
            )
        return {name: each and each.to(rows[name].tensors[0]) for name, each in zip(rows, found, strict=True)}

    def _draw(self, layer: str, scores: Tensor, step: int) -> Draw:
        # KIS sees no kernel. Its diagonal stands for the spectrum: it has the same sum, and by majorization
        # never needs fewer samples for a share of it than the eigenvalues do.
        keep = self.rule.rows(len(scores), scores)
        return draw_rows(scores, keep, seed=self.seed, step=step, layer=layer)

    def _drawn_sketch(self, kept: Rows, draw: Draw, scores: Tensor) -> Sketch:
        left_out = scores.sum() - scores[draw.rows.to(scores.device)].sum()
        mean = _mean_left_out(left_out.clamp_min(0), kept, len(scores))
        if not self.unbiased:
            return Sketch(kept, len(kept), len(scores), None, mean)
        weighted = kept.scaled(draw.weight.sqrt().to(kept.tensors[0]))
        return Sketch(weighted, len(scores), len(scores), None, mean)

    def _gather_drawn(
        self, communicator: Communicator, usable: Usable, step: int, placer: Placer
    ) -> tuple[dict[str, Sketch | None], dict[str, int]]:
        scores = join_scores(communicator, usable)
        draws = {name: self._draw(name, score, step) for name, score in scores.items()}
        chosen = {name: draw.rows for name, draw in draws.items()}
        kept = join_chosen(communicator, usable, chosen, placer)
        return {
            name: self._drawn_sketch(rows, draws[name], scores[name]) for name, rows in kept.rows.items()
        }, kept.owners

    def _gather_blocks(
        self, communicator: Communicator, usable: Usable, damping: float, stopwatch: Stopwatch
    ) -> tuple[dict[str, Sketch | None], dict[str, str]]:
        samples = usable.samples()
        with stopwatch.phase("factorise"):
            local = self._blocks(usable, communicator.rank, damping)
        joined, failed = join_blocks(communicator, local)
        return {
            name: Sketch(
                block.rows,
                samples[name],
                samples[name],
                block.mixing,
                _mean_left_out(block.left_out.sum(), block.rows, samples[name]),
            )
            for name, block in joined.items()
        }, failed

    def _blocks(self, usable: Usable, rank: int, damping: float) -> dict[str, Block | None]:
        """Returns what this rank keeps of its own rows; None for a kernel that is not finite."""
        keep = {}
        if self.rule.low_rank is not None:
            for layer, name in enumerate(usable.rows):
                counts = [of_rank[layer] for of_rank in usable.counts]
                keep[name] = apportion(self.rule.low_rank, counts)[rank]
        local: dict[str, Block | None] = {}
        for name, found in self._interpolate(usable.rows, keep, usable.samples(), damping).items():
            local[name] = None
            if found is not None:
                kept = usable.rows[name].take(found.kept)
                local[name] = Block(kept, found.mixing, found.left_out.reshape(1))
        return local


def _spectral_rank(rule: RankRule, kernel: Tensor) -> int:
    """Returns how many pivots a share of the spectrum asks for; none of a kernel that is not finite."""
    if not bool(kernel.isfinite().all()):
        return 0
    return rule.rows(len(kernel), torch.linalg.eigvalsh(kernel))


def _mean_left_out(trace: Tensor, kept: Rows, samples: int) -> float:
    """Returns the mean eigenvalue of what the kept rows lack, given the trace of it times ``samples``."""
    directions = min(samples, kept.entries) - len(kept)
    return float(trace) / samples / directions if directions > 0 else 0.0
