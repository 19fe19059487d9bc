"""Limits on a preconditioned gradient."""

from __future__ import annotations

from torch import Tensor


class Clip:
    """Limits the preconditioned gradient.

    Args:
        norm: largest norm of the whole vector; None for no limit.
        value: largest absolute value of an entry; None for no limit. Applied first.

    Raises:
        ValueError: a limit that is not positive.
    """

    def __init__(self, norm: float | None, value: float | None) -> None:
        for name, limit in (("clip_norm", norm), ("clip_value", value)):
            if limit is not None and not limit > 0:
                raise ValueError(f"{name}={limit}: must be positive")
        self._norm, self._value = norm, value

    def __call__(self, vector: Tensor) -> Tensor:
        """Returns the vector within the limits; its direction is kept by ``norm`` and not by ``value``."""
        if self._value is not None:
            vector = vector.clamp(-self._value, self._value)
        if self._norm is not None:
            vector = vector * (self._norm / vector.norm().clamp_min(self._norm))
        return vector
