"""Collectives on 1, 2 and 3 ranks, and the helper that starts them."""

from __future__ import annotations

import os
import time

import pytest
import torch

from hpcsngd import dist
from tests.ranks import RankError, run_on_ranks


def collectives() -> dict[str, object]:
    rank, size = dist.rank(), dist.world_size()
    rows = torch.arange(rank * 2.0).reshape(rank, 2) + 10 * rank
    total = torch.full((2,), float(rank + 1))
    dist.barrier()
    return {
        "rank": rank,
        "sum": dist.all_reduce_sum(total),
        "sum_in_place": total,
        "transposed": dist.all_reduce_sum(torch.arange(6.0).reshape(2, 3).t()),
        "broadcast": dist.broadcast(torch.tensor([rank, rank]), src=size - 1),
        "rows": dist.all_gather_rows(rows),
        "rows_known": dist.all_gather_rows(rows, sizes=range(size)),
        "exchanged": dist.all_to_all(
            [torch.full((rank + 1,), 10.0 * rank + to) for to in range(size)], range(1, size + 1)
        ),
        "object": dist.broadcast_object({"from": rank} if rank == size - 1 else None, src=size - 1),
        "objects": dist.gather_objects(f"rank {rank}"),
    }


def check(result: dict[str, object], rank: int, size: int) -> None:
    assert result["rank"] == rank
    expected = float(sum(range(1, size + 1)))
    torch.testing.assert_close(result["sum"], torch.full((2,), expected))
    torch.testing.assert_close(result["sum_in_place"], torch.full((2,), expected))
    torch.testing.assert_close(result["transposed"], size * torch.arange(6.0).reshape(2, 3).t())
    assert result["broadcast"].tolist() == [size - 1, size - 1]
    for key in ("rows", "rows_known"):
        assert [part.shape for part in result[key]] == [(source, 2) for source in range(size)]
        for source, part in enumerate(result[key]):
            torch.testing.assert_close(part, torch.arange(source * 2.0).reshape(source, 2) + 10 * source)
    assert [part.tolist() for part in result["exchanged"]] == [
        [10.0 * source + rank] * (source + 1) for source in range(size)
    ]
    assert result["object"] == {"from": size - 1}
    assert result["objects"] == ([f"rank {r}" for r in range(size)] if rank == 0 else None)


def test_without_a_group_everything_is_one_rank() -> None:
    assert not dist.is_initialized()
    assert dist.world_size() == 1
    check(collectives(), 0, 1)


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, 2, 3])
def test_collectives_on_ranks(size: int) -> None:
    for rank, result in enumerate(run_on_ranks(collectives, size)):
        check(result, rank, size)


def test_known_sizes_must_fit() -> None:
    with pytest.raises(ValueError, match=r"rank 0 of 1 has 2 rows, sizes say \[3\]"):
        dist.all_gather_rows(torch.zeros(2, 1), sizes=[3])


def test_init_without_environment_stays_single(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert dist.init() is False
    assert not dist.is_initialized()
    dist.shutdown()


def test_init_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"):
        dist.init()


def raise_on_last() -> None:
    if dist.rank() == dist.world_size() - 1:
        raise KeyError("broken on purpose")
    dist.barrier()


def die_on_last() -> None:
    if dist.rank() == dist.world_size() - 1:
        os._exit(7)
    dist.barrier()


def hang_on_last() -> None:
    if dist.rank() == dist.world_size() - 1:
        time.sleep(600)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (raise_on_last, r"(?s)rank 1 raised:.*broken on purpose"),
        (die_on_last, "rank 1 died with exit code 7"),
        (hang_on_last, "rank 1 hung and was terminated"),
    ],
)
def test_a_lost_rank_fails_the_test(fn: object, message: str) -> None:
    with pytest.raises(RankError, match=message):
        run_on_ranks(fn, 2, timeout_s=6)
