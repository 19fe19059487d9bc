"""Plain data that a preconditioner reports about one step. Who writes it to files is not its business.

``step`` counts the calls of ``step()`` including the reported one: the first step is 1. ``layer`` is the name
of the module inside the model (without a wrapper's prefix).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PhaseTime:
    """Seconds this rank spent in one phase (capture, gather, factorise, precondition, observe)."""

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
    """Bytes that the preconditioner holds on this rank after the step, by kind (rows, factors)."""

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
        memory: after this step.
        rank_analysis: filled when observed, on rank 0, at refreshes.
        grad_norm: filled when observed, on every rank.
        grad_error: filled when observed, on every rank; after a resume from the next refresh on.
        fallbacks: failed layers of this step.
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
