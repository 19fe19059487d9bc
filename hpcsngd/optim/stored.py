"""How gradients reach the window: in full, as their largest entries, or as factors, with error feedback."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hpcsngd.optim.flat import Span
from hpcsngd.optim.history import DenseHistory, History, LowRankHistory, SparseHistory
from hpcsngd.optim.lowrank import LowRankFeedback, matrix_shape
from hpcsngd.optim.topk import MAX_BLOCK, BlockTopK, ErrorFeedback, Scope

#: How gradients are stored.
Storage = Literal["dense", "sparse", "lowrank"]

#: Values and positions of the entries of a sparse history: 8, 6 and 4 bytes each.
EntryFormat = Literal["fp32+int32", "fp32+int16", "bf16+int16"]


class Store(ABC):
    """A history and the compression in front of it."""

    history: History

    @abstractmethod
    def add(self, slot: int, gradient: Tensor, scale: float) -> None:
        """Compresses a gradient, times ``scale``, and stores what is sent in a slot."""

    @property
    def error(self) -> Tensor | None:
        """Returns what was not sent yet, shape ``(d,)``; None where everything is."""
        return None

    def memory(self) -> dict[str, int]:
        """Returns the bytes held, by kind."""
        error = 0 if self.error is None else self.error.nbytes
        return {"window": self.history.memory_bytes(), "error": error}

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that the next step depends on."""
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of `state_dict`."""
        self.history.load_state_dict(state["history"])


class DenseStore(Store):
    """Stores gradients as they are."""

    def __init__(self, capacity: int, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.history: DenseHistory = DenseHistory(capacity, size, dtype=dtype, device=device)

    def add(self, slot: int, gradient: Tensor, scale: float) -> None:
        """Stores a gradient, times ``scale``."""
        self.history.write(slot, gradient * scale)


class SparseStore(Store):
    """Stores the largest entries; the others wait in the error."""

    def __init__(
        self,
        capacity: int,
        spans: Sequence[Span],
        *,
        density: float,
        entries: EntryFormat,
        scope: Scope,
        block_size: int,
        feedback: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        is_short = entries.endswith("int16")
        # float64 training (tests, small studies) keeps its precision where the format says full precision
        value_dtype = torch.bfloat16 if entries.startswith("bf16") else dtype
        size = spans[-1].stop
        rule = BlockTopK(
            size,
            density,
            scope=scope,
            layers=[span.stop - span.start for span in spans],
            block_size=block_size,
            is_short=is_short,
        )
        self.history: SparseHistory = SparseHistory(
            capacity, size, rule.offsets(device), value_dtype=value_dtype, is_short=is_short, dtype=dtype
        )
        self._sender = ErrorFeedback(
            rule, value_dtype=value_dtype, dtype=dtype, device=device, is_on=feedback
        )

    @property
    def error(self) -> Tensor:
        """Returns what was not sent yet."""
        return self._sender.error

    def add(self, slot: int, gradient: Tensor, scale: float) -> None:
        """Stores the largest entries of error plus gradient."""
        self.history.write(slot, *self._sender.send(gradient, scale))

    def state_dict(self) -> dict[str, Any]:
        """Returns history and error."""
        return super().state_dict() | {"sender": self._sender.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of `state_dict`."""
        super().load_state_dict(state)
        self._sender.load_state_dict(state["sender"])


class LowRankStore(Store):
    """Stores factors of each tensor; what they lack waits in the error."""

    def __init__(
        self,
        capacity: int,
        spans: Sequence[Span],
        *,
        low_rank: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shapes = [matrix_shape(span.shape, low_rank) for span in spans]
        self.history: LowRankHistory = LowRankHistory(capacity, shapes, dtype=dtype, device=device)
        self._sender = LowRankFeedback(shapes, dtype=dtype, device=device, seed=seed)

    @property
    def error(self) -> Tensor:
        """Returns what was not sent yet."""
        return self._sender.error

    def add(self, slot: int, gradient: Tensor, scale: float) -> None:
        """Stores factors of error plus gradient."""
        self.history.write(slot, self._sender.send(gradient * scale))

    def state_dict(self) -> dict[str, Any]:
        """Returns history, error and warm start."""
        return super().state_dict() | {"sender": self._sender.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of `state_dict`."""
        super().load_state_dict(state)
        self._sender.load_state_dict(state["sender"])


def make_store(
    storage: Storage,
    capacity: int,
    spans: Sequence[Span],
    *,
    dtype: torch.dtype,
    device: torch.device,
    density: float = 0.01,
    entries: EntryFormat = "fp32+int32",
    scope: Scope = "block",
    block_size: int = MAX_BLOCK,
    feedback: bool = True,
    low_rank: int = 1,
    seed: int = 0,
) -> Store:
    """Returns an empty store.

    Args:
        storage: which one.
        capacity: m, the number of gradients.
        spans: the parameters in the vector.
        dtype: that gradients are stored and products computed in.
        device: where.
        density: share of the entries that sparse storage keeps.
        entries: of sparse storage.
        scope: where entries compete for being kept.
        block_size: of scope ``"block"``.
        feedback: whether what sparse storage does not keep is added to the next gradient.
        low_rank: of low-rank storage.
        seed: of low-rank storage's first subspace.

    Raises:
        ValueError: an unknown storage or format, or what `BlockTopK` refuses.
    """
    if storage == "dense":
        return DenseStore(capacity, spans[-1].stop, dtype=dtype, device=device)
    if storage == "lowrank":
        if low_rank < 1:
            raise ValueError(f"low_rank={low_rank}: must be at least 1")
        return LowRankStore(capacity, spans, low_rank=low_rank, seed=seed, dtype=dtype, device=device)
    if storage != "sparse":
        raise ValueError(f"storage={storage!r}: allowed are dense, sparse, lowrank")
    if entries not in ("fp32+int32", "fp32+int16", "bf16+int16"):
        raise ValueError(f"entries={entries!r}: allowed are fp32+int32, fp32+int16, bf16+int16")
    return SparseStore(
        capacity,
        spans,
        density=density,
        entries=entries,
        scope=scope,
        block_size=block_size,
        feedback=feedback,
        dtype=dtype,
        device=device,
    )
