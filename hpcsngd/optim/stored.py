"""How gradients reach the window: in full, as their largest entries, or as factors, with error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hpcsngd.optim.checks import check_choice
from hpcsngd.optim.flat import Span
from hpcsngd.optim.history import DenseHistory, LowRankHistory, SparseHistory
from hpcsngd.optim.lowrank import LowRankFeedback, matrix_shape
from hpcsngd.optim.store import Piece, Store
from hpcsngd.optim.topk import MAX_BLOCK, BlockTopK, ErrorFeedback, Scope

#: How gradients are stored.
Storage = Literal["dense", "sparse", "lowrank"]

#: Values and positions of the entries of a sparse history: 8, 6 and 4 bytes each.
EntryFormat = Literal["fp32+int32", "fp32+int16", "bf16+int16"]


class DenseStore(Store):
    """Stores gradients as they are."""

    def __init__(
        self, capacity: int, start: int, stop: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.history: DenseHistory = DenseHistory(capacity, stop - start, dtype=dtype, device=device)
        self._start = start

    def add(self, slot: int, gradient: Tensor, scale: float) -> None:
        """Stores a gradient, times ``scale``."""
        self.history.write(slot, gradient * scale)

    def pieces(self) -> dict[str, Piece]:
        """Returns the rows, cut by columns."""
        return {name: Piece(tensor, 1, self._start) for name, tensor in self.history.tensors().items()}


class SparseStore(Store):
    """Stores the largest entries; the others wait in the error."""

    def __init__(
        self,
        capacity: int,
        rule: BlockTopK,
        start: int,
        stop: int,
        *,
        entries: EntryFormat,
        feedback: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        is_short = entries.endswith("int16")
        # float64 training (tests, small studies) keeps its precision where the format says full precision
        value_dtype = torch.bfloat16 if entries.startswith("bf16") else dtype
        own, self._kept_before = rule.part(start, stop)
        self._start = start
        self.history: SparseHistory = SparseHistory(
            capacity,
            stop - start,
            own.offsets(device),
            value_dtype=value_dtype,
            is_short=is_short,
            dtype=dtype,
        )
        self._sender = ErrorFeedback(own, value_dtype=value_dtype, dtype=dtype, device=device, is_on=feedback)

    @property
    def error(self) -> Tensor:
        """Returns what was not sent yet."""
        return self._sender.error

    def add(self, slot: int, gradient: Tensor, scale: float) -> None:
        """Stores the largest entries of error plus gradient."""
        self.history.write(slot, *self._sender.send(gradient, scale))

    def pieces(self) -> dict[str, Piece]:
        """Returns entries and error."""
        stored = self.history.tensors().items()
        entries = {name: Piece(tensor, 1, self._kept_before) for name, tensor in stored}
        return entries | {"error": Piece(self.error, 0, self._start)}


class LowRankStore(Store):
    """Stores factors of each tensor; what they lack waits in the error."""

    def __init__(
        self,
        capacity: int,
        spans: Sequence[Span],
        start: int,
        *,
        low_rank: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shapes = [matrix_shape(span.shape, low_rank) for span in spans]
        self._names = [span.name for span in spans]
        self._start = start
        self.history: LowRankHistory = LowRankHistory(capacity, shapes, dtype=dtype, device=device)
        # by place in the vector, so that a tensor starts alike on whatever rank it lies
        seeds = [seed + span.start for span in spans]
        self._sender = LowRankFeedback(shapes, dtype=dtype, device=device, seeds=seeds)

    @property
    def error(self) -> Tensor:
        """Returns what was not sent yet."""
        return self._sender.error

    def add(self, slot: int, gradient: Tensor, scale: float) -> None:
        """Stores factors of error plus gradient."""
        self.history.write(slot, self._sender.send(gradient * scale))

    def pieces(self) -> dict[str, Piece]:
        """Returns factors and warm starts by parameter, and the error."""
        pieces = {"error": Piece(self.error, 0, self._start)}
        stored = self.history.tensors()
        for index, name in enumerate(self._names):
            pieces[f"{name}.left"] = Piece(stored[f"left.{index}"])
            pieces[f"{name}.right"] = Piece(stored[f"right.{index}"])
            pieces[f"{name}.start"] = Piece(self._sender.right[index])
        return pieces


@dataclass(frozen=True)
class StoreRule:
    """What a store is made by.

    Args:
        storage: which one.
        density: share of the entries that sparse storage keeps.
        entries: of sparse storage.
        scope: where entries compete for being kept.
        block_size: of scope ``"block"``.
        feedback: whether what sparse storage does not keep is added to the next gradient.
        low_rank: of low-rank storage.
        seed: of low-rank storage's first subspace.

    Raises:
        ValueError: an unknown choice, or a rank below 1.
    """

    storage: Storage = "dense"
    density: float = 0.01
    entries: EntryFormat = "fp32+int32"
    scope: Scope = "block"
    block_size: int = MAX_BLOCK
    feedback: bool = True
    low_rank: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("storage", self.storage, get_args(Storage))
        check_choice("entries", self.entries, get_args(EntryFormat))
        check_choice("scope", self.scope, get_args(Scope))
        if self.low_rank < 1:
            raise ValueError(f"low_rank={self.low_rank}: must be at least 1")

    def boundaries(self, spans: Sequence[Span]) -> Sequence[int]:
        """Returns where the vector may be cut over the ranks.

        Dense rows anywhere; sparse ones between blocks; factors between tensors.
        """
        if self.storage == "dense":
            return range(spans[-1].stop + 1)
        if self.storage == "sparse":
            return self._top_k(spans).boundaries()
        return [*(span.start for span in spans), spans[-1].stop]

    def build(
        self,
        capacity: int,
        spans: Sequence[Span],
        start: int,
        stop: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Store:
        """Returns an empty store for a part of the vector.

        Args:
            capacity: m, the number of gradients.
            spans: the parameters in the whole vector.
            start: of the part, one of `boundaries`.
            stop: of the part, one of `boundaries`.
            dtype: that gradients are stored and products computed in.
            device: where.

        Raises:
            ValueError: what `BlockTopK` refuses.
        """
        if self.storage == "dense":
            return DenseStore(capacity, start, stop, dtype=dtype, device=device)
        if self.storage == "lowrank":
            own = [span for span in spans if start <= span.start < stop]
            options = {"low_rank": self.low_rank, "seed": self.seed}
            return LowRankStore(capacity, own, start, dtype=dtype, device=device, **options)
        return SparseStore(
            capacity,
            self._top_k(spans),
            start,
            stop,
            entries=self.entries,
            feedback=self.feedback,
            dtype=dtype,
            device=device,
        )

    def _top_k(self, spans: Sequence[Span]) -> BlockTopK:
        return BlockTopK(
            spans[-1].stop,
            self.density,
            scope=self.scope,
            layers=[span.stop - span.start for span in spans],
            block_size=self.block_size,
            is_short=self.entries.endswith("int16"),
        )
