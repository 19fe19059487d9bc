"""Products over the window in every storage against the dense rows, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hpcsngd.optim import history
from hpcsngd.optim.history import DenseHistory, History, LowRankHistory, SparseHistory
from hpcsngd.optim.topk import BlockTopK

SIZE, SLOTS, COUNT = 60, 9, 7


def rows(device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(SIZE, generator=generator, dtype=torch.float64).to(device) for _ in range(COUNT)]


def dense(device: torch.device) -> History:
    found = DenseHistory(SLOTS, SIZE, dtype=torch.float64, device=device)
    for slot, row in enumerate(rows(device)):
        found.write(slot, row)
    return found


def sparse(device: torch.device, *, is_short: bool, value_dtype: torch.dtype = torch.float64) -> History:
    rule = BlockTopK(SIZE, 0.3, block_size=16)
    found = SparseHistory(
        SLOTS,
        SIZE,
        rule.offsets(device),
        value_dtype=value_dtype,
        is_short=is_short,
        dtype=torch.float64,
    )
    for slot, row in enumerate(rows(device)):
        positions = rule.choose(row)
        found.write(slot, row[positions].to(value_dtype), positions)
    return found


def low_rank(device: torch.device) -> History:
    found = LowRankHistory(SLOTS, [(6, 8, 2), (12, 1, 1)], dtype=torch.float64, device=device)
    for slot, row in enumerate(rows(device)):
        first = (row[:12].view(6, 2), row[12:28].view(8, 2))
        found.write(slot, [first, (row[28:40].view(12, 1), torch.ones_like(row[:1]).view(1, 1))])
    return found


HISTORIES: dict[str, Callable[[torch.device], History]] = {
    "dense": dense,
    "sparse": lambda device: sparse(device, is_short=False),
    "sparse int16": lambda device: sparse(device, is_short=True),
    "sparse 4 B": lambda device: sparse(device, is_short=True, value_dtype=torch.bfloat16),
    "lowrank": low_rank,
}


def check(name: str, device: torch.device) -> None:
    made = HISTORIES[name](device)
    matrix = torch.stack([made.row(slot) for slot in range(COUNT)])
    assert all(float(row.norm()) > 0 for row in matrix)
    vector = torch.linspace(-1, 1, matrix.shape[1], dtype=torch.float64, device=device)
    weights = torch.linspace(2, -1, COUNT, dtype=torch.float64, device=device)
    assert torch.allclose(made.products(vector, COUNT), matrix @ vector, rtol=1e-12)
    assert torch.allclose(made.combine(weights), weights @ matrix, rtol=1e-12, atol=1e-14)
    for slot in (0, COUNT - 1):
        assert torch.allclose(made.inner(slot, COUNT), matrix @ matrix[slot], rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 40, 1 << 18])
@pytest.mark.parametrize("name", HISTORIES)
def test_products_and_combinations_are_those_of_the_rows(
    monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    monkeypatch.setattr(history, "CPU_CHUNK", chunk)
    monkeypatch.setattr(history, "MOST_ENTRIES", chunk)
    check(name, torch.device("cpu"))


@pytest.mark.parametrize("chunk", [1, 40, 1 << 18])
@pytest.mark.parametrize("name", [name for name in HISTORIES if name.startswith("sparse")])
def test_so_they_are_by_torch_alone(monkeypatch: pytest.MonkeyPatch, name: str, chunk: int) -> None:
    """What a GPU does."""
    monkeypatch.setattr(history, "CPU_CHUNK", chunk)
    made = HISTORIES[name]

    def by_torch(device: torch.device) -> History:
        found = made(device)
        assert isinstance(found, SparseHistory)
        assert found.by_matrix
        found.by_matrix = False
        return found

    monkeypatch.setitem(HISTORIES, name, by_torch)
    check(name, torch.device("cpu"))


def test_so_they_are_without_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on ppc64le and aarch64."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    check("sparse", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_so_they_are_on_a_gpu() -> None:
    for name in HISTORIES:
        check(name, torch.device("cuda"))


def test_kept_entries_are_the_rows_own() -> None:
    """Absolute positions of 32 bits and relative ones of 16 stand for the same rows."""
    long, short = (HISTORIES[name](torch.device("cpu")) for name in ("sparse", "sparse int16"))
    for slot, row in enumerate(rows(torch.device("cpu"))):
        kept = long.row(slot)
        assert torch.equal(kept, short.row(slot))
        assert int((kept != 0).sum()) == 5 + 5 + 5 + 4
        assert torch.equal(kept[kept != 0], row[kept != 0])
