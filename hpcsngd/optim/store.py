"""What keeps gradients: a history, the compression in front of it, and a state that is cut over the ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpcsngd.optim.history import History


@dataclass(frozen=True)
class Piece:
    """A tensor of a store's state; where it is cut over the ranks, along which dimension and from where.

    Attributes:
        tensor: this rank's part.
        dim: dimension that is cut; None for one that lies on one rank as a whole.
        start: where this rank's part begins.
    """

    tensor: Tensor
    dim: int | None = None
    start: int = 0


class Store(ABC):
    """A history and the compression in front of it, for one part of the vector."""

    history: History

    @abstractmethod
    def add(self, slot: int, gradient: Tensor, scale: float) -> None:
        """Compresses this part of a gradient, times ``scale``, and stores what is sent in a slot."""

    @abstractmethod
    def pieces(self) -> dict[str, Piece]:
        """Returns everything that the next step depends on, by name."""

    @property
    def error(self) -> Tensor | None:
        """Returns what was not sent yet, shape ``(part,)``; None where everything is."""
        return None

    def memory(self) -> dict[str, int]:
        """Returns the bytes held, by kind."""
        error = 0 if self.error is None else self.error.nbytes
        return {"window": self.history.memory_bytes(), "error": error}

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of this rank's part of the state, with the dimension that each is cut along."""
        return {name: (piece.dim, piece.tensor.clone()) for name, piece in self.pieces().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes this rank's part of a state made by `joined`.

        Raises:
            ValueError: it has other tensors, or of other shapes.
        """
        for name, piece in self.pieces().items():
            whole = state.get(name)
            part = None if whole is None else _part(whole, piece)
            if part is None or part.shape != piece.tensor.shape:
                found = None if whole is None else tuple(whole.shape)
                raise ValueError(f"the state has {name} of shape {found}; this window is another one")
            piece.tensor.copy_(part)


def _part(whole: Tensor, piece: Piece) -> Tensor | None:
    if piece.dim is None:
        return whole
    length = piece.tensor.shape[piece.dim]
    if whole.shape[piece.dim] < piece.start + length:
        return None
    return whole.narrow(piece.dim, piece.start, length)


def joined(states: Sequence[Mapping[str, tuple[int | None, Tensor]]]) -> dict[str, Tensor]:
    """Returns the state of the whole window from every rank's `Store.state_dict`, in rank order."""
    parts: dict[str, list[tuple[int | None, Tensor]]] = {}
    for state in states:
        for name, part in state.items():
            parts.setdefault(name, []).append(part)
    return {
        name: found[0][1] if len(found) == 1 else torch.cat([part for _, part in found], found[0][0] or 0)
        for name, found in parts.items()
    }
