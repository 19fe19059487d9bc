"""One layer's curvature in sample space: what a refresh computes and every step applies.

Every method ends in a *sketch*: some rows, and how they stand for the whole batch,

    F = 1/N U^T L L^T U,       U: the rows kept, L = I where ``mixing`` is None.

    SNGD              all rows, N = their number
    KIS, published    the rows drawn, N = their number
    KIS, unbiased     the rows drawn, each times the root of its weight, N = samples of the batch
    KID               the rows kept, L from the interpolation (`hpcsngd.optim.kid`), N = samples of the batch

By the push-through identity, ``(F + damping I)^-1 M = (M - 1/N U^T y) / damping`` with
``y = L (L^T K L / N + damping I)^-1 L^T U M``.

The complement. What is orthogonal to every kept row has no curvature here, so it is divided by the damping
alone: with a small damping the least known directions take the longest steps. ``scale`` replaces that
``1 / damping``: with Q the projection on the span of the kept rows,
``V = Q (F + damping I)^-1 M + scale (M - Q M)``, where ``Q M = U^T K^-1 U M``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hpcsngd.optim.linalg import jittered_cholesky_each
from hpcsngd.optim.rows import Rows, rows_from

#: What scales the complement: 1 / damping, 1, or 1 / (damping + mean eigenvalue of what was left out).
Complement = Literal["damped", "plain", "residual"]


@dataclass(frozen=True)
class Sketch:
    """Rows that stand for a batch.

    Attributes:
        rows: of r samples.
        samples: N in the formulas above.
        batch: samples in the batch.
        mixing: ``L``, shape ``(r, r)``; None for the identity.
        left_out: mean eigenvalue of the curvature that the rows do not carry; 0.0 if they carry all.
    """

    rows: Rows
    samples: int
    batch: int
    mixing: Tensor | None = None
    left_out: float = 0.0

    def kernel(self) -> Tensor:
        """Returns ``L^T K L / N``, shape ``(r, r)``: it has the nonzero eigenvalues of F."""
        kernel = kernel_of(self.rows) * (len(self.rows) / self.samples)
        return kernel if self.mixing is None else self.mixing.T @ kernel @ self.mixing


@dataclass(frozen=True)
class SampleCurvature:
    """A sketch with its damping, ready to solve; tensors are never changed in place.

    Attributes:
        rows: of the sketch.
        samples: of the sketch.
        factor: lower Cholesky factor of ``L^T K L / N + (damping + jitter) I``, shape ``(r, r)``.
        damping: in units of F's eigenvalues. It stays the refresh's until the next one, so that the factor
            and the division by it always agree.
        jitter: what rounding made necessary in addition; 0.0 normally.
        mixing: of the sketch.
        scale: of the complement; None for ``1 / damping``.
        span: lower Cholesky factor of ``K/N``, shape ``(r, r)``; None where ``scale`` is.
    """

    rows: Rows
    samples: int
    factor: Tensor
    damping: float
    jitter: float
    mixing: Tensor | None
    scale: float | None
    span: Tensor | None

    @classmethod
    def build(
        cls, sketch: Sketch, kernel: Tensor, damping: float, complement: Complement = "damped"
    ) -> SampleCurvature | None:
        """Returns the curvature of a sketch; None if it cannot be factorized.

        Args:
            sketch: the rows and their meaning.
            kernel: `Sketch.kernel` of it.
            damping: positive.
            complement: what scales the directions that no kept row has.
        """
        return build_all([sketch], [kernel], damping, complement)[0]

    def solve(self, grad: Tensor) -> Tensor:
        """Returns ``(F + damping I)^-1 grad``, its complement scaled, for a matrix ``(d_out, d_in)``."""
        return self.apply(grad, self.project(grad))

    def project(self, grad: Tensor) -> Tensor:
        """Returns ``U grad``, the gradient in sample space, shape ``(r, 1)``."""
        return self.rows.project(grad).unsqueeze(1)

    def apply(self, grad: Tensor, t: Tensor) -> Tensor:
        """Returns `solve` of ``grad``, given its projection ``t``."""
        mixed = t if self.mixing is None else self.mixing.T @ t
        y = torch.cholesky_solve(mixed, self.factor)
        y = y if self.mixing is None else self.mixing @ y
        if self.span is None or self.scale is None:
            return (grad - self.rows.combine(y[:, 0]) / self.samples) / self.damping
        inside = torch.cholesky_solve(t, self.span)
        y = y / self.damping + (self.scale - 1 / self.damping) * inside
        return self.scale * grad - self.rows.combine(y[:, 0]) / self.samples

    @property
    def size_bytes(self) -> tuple[int, int]:
        """Returns the bytes of the rows and of the factors."""
        factors = [tensor for tensor in (self.factor, self.mixing, self.span) if tensor is not None]
        return self.rows.size_bytes, sum(tensor.nbytes for tensor in factors)

    def state_dict(self) -> dict[str, Any]:
        """Returns the curvature as tensors and numbers; what is None is left out."""
        state = {
            "rows": list(self.rows.tensors),
            "samples": self.samples,
            "factor": self.factor,
            "damping": self.damping,
            "jitter": self.jitter,
        }
        extra = {"mixing": self.mixing, "scale": self.scale, "span": self.span}
        return state | {name: value for name, value in extra.items() if value is not None}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], sizes: tuple[int, int], groups: int, like: Tensor
    ) -> SampleCurvature:
        """Returns the curvature saved in ``state``, on the device and in the dtype of ``like``.

        Args:
            state: from `state_dict`.
            sizes: ``(d_in, d_out)`` of the layer.
            groups: of the layer.
            like: an empty tensor.

        Raises:
            ValueError: the shapes are not those of the layer.
        """
        rows, factor = rows_from(state["rows"], sizes, groups), state["factor"]
        if tuple(factor.shape) != (len(rows), len(rows)):
            raise ValueError(f"factor of {len(rows)} rows has shape {tuple(factor.shape)}")
        mixing, span = (state[name].to(like) if name in state else None for name in ("mixing", "span"))
        return cls(
            rows.to(like),
            state["samples"],
            factor.to(like),
            state["damping"],
            state["jitter"],
            mixing,
            state.get("scale"),
            span,
        )


def build_all(
    sketches: Sequence[Sketch],
    kernels: Sequence[Tensor],
    damping: float,
    complement: Complement = "damped",
) -> list[SampleCurvature | None]:
    """Returns `SampleCurvature.build` of every sketch; kernels of equal size are factorized in one batch."""
    factorized = jittered_cholesky_each([_shifted(kernel, damping) for kernel in kernels])
    scales = [_complement_scale(complement, damping, sketch.left_out) for sketch in sketches]
    scaled = [index for index, scale in enumerate(scales) if scale is not None]
    spans = dict(zip(scaled, _span_factors([sketches[index] for index in scaled]), strict=True))
    built: list[SampleCurvature | None] = []
    for index, (sketch, found, scale) in enumerate(zip(sketches, factorized, scales, strict=True)):
        span = spans.get(index)
        if found is None or (scale is not None and span is None):
            built.append(None)
        else:
            values = (sketch.rows, sketch.samples, found[0], damping, found[1], sketch.mixing, scale, span)
            built.append(SampleCurvature(*values))
    return built


def kernel_of(rows: Rows) -> Tensor:
    """Returns ``K/n``, shape ``(n, n)``: it has the nonzero eigenvalues of the F of these rows."""
    return rows.gram() / len(rows)


def _complement_scale(complement: Complement, damping: float, left_out: float) -> float | None:
    if complement == "plain":
        return 1.0
    return 1 / (damping + left_out) if complement == "residual" and left_out > 0 else None


def _span_factors(sketches: Sequence[Sketch]) -> list[Tensor | None]:
    """Returns the factors of ``K/N`` plus its rounding: equal or zero samples make it singular."""
    kernels = []
    for sketch in sketches:
        kernel = kernel_of(sketch.rows) * (len(sketch.rows) / sketch.samples)
        info = torch.finfo(kernel.dtype)
        noise = len(kernel) * info.eps * kernel.diagonal().max().clamp_min(info.tiny / info.eps)
        kernels.append(_shifted(kernel, noise))
    return [None if found is None else found[0] for found in jittered_cholesky_each(kernels)]


def _shifted(matrix: Tensor, shift: float | Tensor) -> Tensor:
    """Returns ``matrix + shift I``."""
    result = matrix.clone()
    result.diagonal().add_(shift)
    return result
