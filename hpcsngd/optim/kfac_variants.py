"""The four K-FAC variants of the DP-KFAC study by name.

    eigen         factors of all ranks' samples, exact damping by eigenvectors, inverses on every rank
    inverse       the same with Cholesky inverses and factored damping
    eigen_dp      factors of one rank's samples; that rank alone preconditions the layer and sends the result
    inverse_dp    the same with Cholesky inverses

Source: Zhang et al., IEEE Transactions on Cloud Computing 2022 (arXiv 2206.15143).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from hpcsngd.optim.kfac import KFAC

#: Name -> arguments of `KFAC`.
VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "eigen": {"inverse": "eigen", "factors": "all", "grad_worker_fraction": 1.0},
        "inverse": {"inverse": "cholesky", "factors": "all", "grad_worker_fraction": 1.0},
        "eigen_dp": {"inverse": "eigen", "factors": "local", "grad_worker_fraction": 0.0},
        "inverse_dp": {"inverse": "cholesky", "factors": "local", "grad_worker_fraction": 0.0},
    }
)


def get_kfac(name: str) -> Callable[..., KFAC]:
    """Returns `KFAC` with the arguments of the variant called ``name``; others can be added.

    Raises:
        ValueError: there is none of this name; the message lists those there are.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown K-FAC variant {name!r}; known: {', '.join(VARIANTS)}")
    return partial(KFAC, **VARIANTS[name])
