"""Plain data that a preconditioner reports about one step. Who writes it to files is not its business.

``step`` counts the calls of ``step()`` including the reported one: the first step is 1. ``layer`` is the name
of the module inside the model (without a wrapper's prefix).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PhaseTime:
    """Seconds this rank spent in one phase; phases are disjoint.

    HyLo at refreshes: ``capture`` (hooks, within forward and backward), ``gather`` (exchange of rows),
    ``factorise`` (kernels, and which samples are kept), ``invert`` (Cholesky factors of kernels). At every
    step: ``project`` (gradients into sample space), ``precondition`` (solve, back to gradients, size),
    ``broadcast`` (from owners to all ranks), ``observe`` (measurements). The optimizer's own ``update`` is
    timed by who calls it.

    K-FAC: ``capture`` (factors, inside the hooks), ``reduce`` (their exchange), ``invert``, ``broadcast`` (of
    inverses), ``precondition``.
    """

    step: int
    phase: str
    seconds: float


@dataclass(frozen=True)
class Communication:
    """Collectives that this rank issued in one phase and the bytes it handed to them (payload)."""

    step: int
    phase: str
    op: str
    calls: int
    size_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes that the preconditioner holds on this rank after the step, by kind.

    ``rows`` and ``factors`` of all curvatures solved here; ``comparison``: curvatures that only
    ``grad_error`` needs; ``captured``: this rank's rows at the refresh, 0 in other steps (gone after it).
    """

    step: int
    kind: str
    size_bytes: int


@dataclass(frozen=True)
class RankAnalysis:
    """Spectrum of one layer's kernel ``K/samples`` at a refresh.

    Attributes:
        samples: rows in the kernel.
        share: share of the sum of singular values that was asked for.
        low_rank: singular values needed to reach it, largest first.
        top_eigenvalue: largest eigenvalue of ``K/samples`` (also of F); compare with ``damping``.
        damping: damping at this refresh.
    """

    step: int
    layer: str
    samples: int
    share: float
    low_rank: int
    top_eigenvalue: float
    damping: float


@dataclass(frozen=True)
class GradNorm:
    """Frobenius norm of one layer's gradient (weight and bias) before preconditioning."""

    step: int
    layer: str
    norm: float


@dataclass(frozen=True)
class GradError:
    """One layer's preconditioned gradient against exact SNGD on the same captured batch.

    Attributes:
        method: the method compared with the exact one.
        relative_error: norm of the difference over the norm of the exact result.
        cosine: cosine of the angle between both (nan where one of them is zero).
    """

    step: int
    layer: str
    method: str
    relative_error: float
    cosine: float


@dataclass(frozen=True)
class Kept:
    """How many samples a compressed method kept of one layer at a refresh.

    Attributes:
        method: kid or kis.
        rule: what decided: ratio, low_rank or share.
        samples: of the batch, all ranks.
        kept: of those; a singular kernel keeps fewer than the rule asks for.
    """

    step: int
    layer: str
    method: str
    rule: str
    samples: int
    kept: int


@dataclass(frozen=True)
class SwitchDecision:
    """One decision of the hybrid method.

    Attributes:
        step: steps done when it was made; it holds from the next refresh on.
        epoch: the epoch that begins.
        method: kid in critical regimes, otherwise kis.
        reason: what decided.
        change: relative change of the gradient norm; nan where that was not looked at.
        norm: gradient norm of the latest check; nan before the first.
        lr: learning rate at the beginning of the epoch.
    """

    step: int
    epoch: int
    method: str
    reason: str
    change: float
    norm: float
    lr: float


@dataclass(frozen=True)
class LayerCheck:
    """One layer against the dense oracle, in float64.

    Attributes:
        entries: weight and bias entries of the layer.
        error: norm of the difference to the dense solution over that solution's norm; nan if skipped.
        strength: ``|damping v - g| / |g|``: 0 where v is nothing but g over damping; nan if skipped.
        skipped: why the layer was not compared; empty if it was.
    """

    layer: str
    entries: int
    error: float
    strength: float
    skipped: str = ""

    def __str__(self) -> str:
        """Returns a line for people."""
        numbers = f"error {self.error:.3g}, second-order strength {self.strength:.3g}"
        return f"{self.layer}: {f'skipped, {self.skipped}' if self.skipped else numbers}"


@dataclass(frozen=True)
class LayerStrength:
    """How much curvature changed one layer's gradient.

    Attributes:
        strength: ``|damping v - g| / |g|`` before any rescaling: 0 where v is nothing but g over damping.
        mean_eigenvalue: of the layer's curvature; compare with ``damping``.
        damping: that v was computed with.
    """

    step: int
    layer: str
    strength: float
    mean_eigenvalue: float
    damping: float


@dataclass(frozen=True)
class Fallback:
    """A layer whose refresh failed: its last good curvature, or the plain gradient, is used instead."""

    step: int
    layer: str
    reason: str


@dataclass(frozen=True)
class StepRecord:
    """Everything a preconditioner has to say about its latest step.

    Attributes:
        step: calls of ``step()`` so far.
        refresh: whether curvature was recomputed in this step.
        damping: in use after this step.
        failures: refreshes of single layers that failed since the start of the run.
        jittered: layers whose factor in use needed jitter.
        phases: filled with ``profile=True``.
        communication: of this step; empty on one rank.
        memory: filled with ``profile=True``.
        rank_analysis: filled when observed, on rank 0, at refreshes.
        grad_norm: filled when observed, on every rank.
        grad_error: filled when observed, on every rank; after a resume from the next refresh on.
        fallbacks: failed layers of this step.
        kept: filled at refreshes of compressed methods.
        method: in use after this step; of the hybrid method, the one it uses now.
        switches: decisions of the hybrid method since the step before.
        strength: filled when observed, on every rank, for layers that have an inverse.
    """

    step: int
    refresh: bool
    damping: float
    failures: int
    jittered: int = 0
    phases: tuple[PhaseTime, ...] = ()
    communication: tuple[Communication, ...] = ()
    memory: tuple[Memory, ...] = ()
    rank_analysis: tuple[RankAnalysis, ...] = ()
    grad_norm: tuple[GradNorm, ...] = ()
    grad_error: tuple[GradError, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    kept: tuple[Kept, ...] = ()
    method: str = ""
    switches: tuple[SwitchDecision, ...] = ()
    strength: tuple[LayerStrength, ...] = ()
