"""Running averages of K-FAC's factors.

The weight ``decay`` is on what is already there: ``X <- decay X + (1 - decay) new``. Without correction X
starts as the first statistic. With it X starts at zero, as does the sum of the weights given so far, by
which X is divided where it is used: every statistic then has the weight that the decay says, the first one
too (Kingma and Ba, ICLR 2015, section 3, for a decay that may change). Damping is never added to X.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The running A and, where there is one, G of a layer.

    Attributes:
        sums: weighted sums of what came so far.
        weight: of all of it together: 1 without correction.
    """

    sums: tuple[Tensor, ...]
    weight: float

    @classmethod
    def first(cls, new: Sequence[Tensor], decay: float, dtype: torch.dtype, *, is_corrected: bool) -> Factors:
        """Returns the factors after the first statistic, kept in ``dtype``."""
        weight = 1 - decay if is_corrected else 1.0
        return cls(tuple((weight * tensor).to(dtype) for tensor in new), weight)

    def updated(self, new: Sequence[Tensor], decay: float) -> Factors:
        """Returns the factors after one more statistic (in at least float32)."""
        sums = tuple(
            (decay * old.to(tensor.dtype) + (1 - decay) * tensor).to(old.dtype)
            for old, tensor in zip(self.sums, new, strict=True)
        )
        # Where the weight is 1 it stays 1, without rounding.
        return Factors(sums, self.weight + (1 - decay) * (1 - self.weight))

    def averages(self, dtype: torch.dtype) -> list[Tensor]:
        """Returns A and G in ``dtype``."""
        return [total.to(dtype) / self.weight for total in self.sums]

    @property
    def size_bytes(self) -> int:
        """Returns the bytes of the sums."""
        return sum(total.nbytes for total in self.sums)

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums and their weight."""
        return {"sums": list(self.sums), "weight": self.weight}

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Any],
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> Factors:
        """Returns the factors saved in ``state``.

        Args:
            state: of `state_dict`.
            shapes: that A and G must have.
            dtype: to keep them in; None: as they were saved.
            device: to keep them on.

        Raises:
            ValueError: the shapes are others.
        """
        found = [tuple(tensor.shape) for tensor in state["sums"]]
        if found != list(shapes):
            raise ValueError(f"factors have shapes {found}, the layer wants {list(shapes)}")
        return cls(tuple(total.to(device, dtype or total.dtype) for total in state["sums"]), state["weight"])
