"""Running averages of K-FAC's factors.

The weight ``decay`` is on what is already there: ``X <- decay X + (1 - decay) new``. Without correction X
starts as the first statistic. With it X starts at zero, as does the sum of the weights given so far, by
which X is divided where it is used: every statistic then has the weight that the decay says, the first one
too (Kingma and Ba, ICLR 2015, section 3, for a decay that may change). Damping is never added to X. Of a
symmetric X only the triangle is kept (`hpcsngd.optim.packing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcsngd.optim.packing import unpack


@dataclass(frozen=True)
class Factor:
    """The running average of one factor.

    Attributes:
        total: weighted sum of what came so far, as `hpcsngd.optim.packing.pack` leaves it.
        weight: of all of it together: 1 without correction.
    """

    total: Tensor
    weight: float

    @classmethod
    def first(cls, new: Tensor, decay: float, dtype: torch.dtype, *, is_corrected: bool) -> Factor:
        """Returns the factor after the first statistic, packed as well, kept in ``dtype``."""
        weight = 1 - decay if is_corrected else 1.0
        return cls((weight * new).to(dtype), weight)

    def updated(self, new: Tensor, decay: float) -> Factor:
        """Returns the factor after one more statistic (in at least float32)."""
        total = (decay * self.total.to(new.dtype) + (1 - decay) * new).to(self.total.dtype)
        # Where the weight is 1 it stays 1, without rounding.
        return Factor(total, self.weight + (1 - decay) * (1 - self.weight))

    def average(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns the factor itself, of this shape."""
        return unpack(self.total.to(dtype), shape) / self.weight
