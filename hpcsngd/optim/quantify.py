"""How much a preconditioner does to a gradient: scaling and rotation of ``u`` against ``g``.

Source: EFCP (Modoranu et al., ICML 2024) measures both; here the angle is the true one, and the ratio of
entries keeps out those where ``g`` is zero instead of adding a constant to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Quantiles of larger vectors come from so many entries, evenly spaced over the vector.
SAMPLED_ENTRIES = 1 << 18


@dataclass(frozen=True)
class Quantify:
    """Scaling and rotation of ``u`` against ``g``.

    Attributes:
        norm_g: norm of the gradient.
        norm_u: norm of the preconditioned gradient.
        norm_ratio: ``norm_u / norm_g``.
        q25: lower quartile of ``|u_i / g_i|`` over the entries with ``g_i != 0``; nan if there are none.
        q50: median of it.
        q75: upper quartile of it.
        cosine: of the angle between u and g; nan where one of them is zero.
        angle_deg: that angle, in degrees, 0..180.
        entries: how many entries the quartiles were taken over.
    """

    norm_g: float
    norm_u: float
    norm_ratio: float
    q25: float
    q50: float
    q75: float
    cosine: float
    angle_deg: float
    entries: int


def quantify(gradient: Tensor, result: Tensor) -> Quantify:
    """Returns how a preconditioned gradient differs from the gradient.

    Norms and angle are over all entries in float64; quartiles over at most `SAMPLED_ENTRIES` of them.

    Args:
        gradient: g, shape ``(d,)``.
        result: u, shape ``(d,)``.
    """
    dot, gg, uu = (
        float(torch.dot(a.double(), b.double()))
        for a, b in ((gradient, result), (gradient, gradient), (result, result))
    )
    norm_g, norm_u = math.sqrt(gg), math.sqrt(uu)
    cosine = max(-1.0, min(1.0, dot / (norm_g * norm_u))) if norm_g and norm_u else math.nan
    stride = -(-len(gradient) // SAMPLED_ENTRIES)
    g, u = gradient[::stride], result[::stride]
    ratios = (u[g != 0] / g[g != 0]).abs().double()
    q25 = q50 = q75 = math.nan
    if len(ratios):
        levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=ratios.device)
        q25, q50, q75 = torch.quantile(ratios, levels).tolist()
    angle = math.degrees(math.acos(cosine)) if not math.isnan(cosine) else math.nan
    ratio = norm_u / norm_g if norm_g else math.nan
    return Quantify(norm_g, norm_u, ratio, q25, q50, q75, cosine, angle, len(ratios))
