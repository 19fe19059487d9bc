from __future__ import annotations

import itertools
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcsngd.train.faults import SettingError
from hpcsngd.train.sampler import (
    EvaluationSampler,
    ShardedSampler,
    StreamSampler,
    even_parts,
    micro_batch_count,
    step_sizes,
)

SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 20), st.integers(1, 6), st.integers(1, 4))


def samplers(samples: int, batch: int, ranks: int, accumulate: int) -> list[ShardedSampler]:
    return [
        ShardedSampler(samples, batch, accumulate=accumulate, rank=rank, ranks=ranks, seed=5)
        for rank in range(ranks)
    ]


def by_step(sampler: ShardedSampler, epoch: int = 0, first: int = 0) -> list[list[list[int]]]:
    """Returns the micro-batches of every step."""
    sampler.start_at(epoch, first)
    batches = iter(sampler)
    result = [
        [next(batches) for _ in range(sampler.micro_batches_in(step))]
        for step in range(first, sampler.steps_per_epoch)
    ]
    assert next(batches, None) is None
    return result


@given(SHAPES)
def test_every_sample_is_used_once_per_epoch(shape: tuple[int, int, int, int]) -> None:
    samples, _, ranks, _ = shape
    if samples < ranks:
        return
    used = [
        index for sampler in samplers(*shape) for step in by_step(sampler) for part in step for index in part
    ]
    assert sorted(used) == list(range(samples))


@given(SHAPES)
def test_ranks_have_even_shares_and_no_micro_batch_is_empty_or_too_large(
    shape: tuple[int, int, int, int],
) -> None:
    samples, batch, ranks, _ = shape
    if samples < ranks:
        return
    per_rank = [by_step(sampler) for sampler in samplers(*shape)]
    for step in zip(*per_rank, strict=True):
        assert len({len(parts) for parts in step}) == 1
        shares = [sum(map(len, parts)) for parts in step]
        assert max(shares) - min(shares) <= 1
        sizes = [len(part) for parts in step for part in parts]
        assert min(sizes) >= 1
        assert max(sizes) <= max(batch, 2)


@given(st.integers(8, 300), st.integers(1, 8), st.integers(0, 3))
def test_a_step_has_the_same_samples_for_any_number_of_ranks(samples: int, batch: int, epoch: int) -> None:
    def steps(ranks: int) -> list[list[int]]:
        per_rank = [by_step(sampler, epoch) for sampler in samplers(samples, batch * 8 // ranks, ranks, 1)]
        return [[i for parts in step for part in parts for i in part] for step in zip(*per_rank, strict=True)]

    alone = steps(1)
    assert steps(2) == alone
    assert steps(4) == alone


def test_ranks_times_accumulation_give_the_same_steps() -> None:
    accumulated = by_step(ShardedSampler(100, 8, accumulate=4, seed=5))
    at_once = by_step(ShardedSampler(100, 32, seed=5))
    assert [list(chain(*step)) for step in accumulated] == [list(chain(*step)) for step in at_once]


@pytest.mark.parametrize("first", [0, 1, 3])
def test_starting_inside_an_epoch_gives_its_remainder(first: int) -> None:
    sampler = ShardedSampler(100, 8, accumulate=2, rank=1, ranks=2, seed=5)
    assert by_step(sampler, 4, first) == by_step(sampler, 4)[first:]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [by_step(ShardedSampler(50, 50, seed=seed), epoch)[0][0] for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(
    ("samples", "global_batch", "ranks", "sizes"),
    [
        (64, 16, 2, [16, 16, 16, 16]),
        (60, 16, 2, [16, 16, 16, 12]),
        (56, 16, 2, [16, 16, 16, 8]),
        (55, 16, 2, [16, 16, 23]),
        (5, 16, 2, [5]),
        (7, 4, 4, [7]),  # one sample per rank: the last 3 cannot be a step of 4 ranks
    ],
)
def test_the_rest_is_a_step_or_joins_the_one_before(
    samples: int, global_batch: int, ranks: int, sizes: list[int]
) -> None:
    assert step_sizes(samples, global_batch, ranks) == sizes


def test_a_joined_step_is_cut_into_more_micro_batches() -> None:
    # 23 samples on 2 ranks: 12 and 11, in micro-batches of at most 8
    assert micro_batch_count(23, 8, 2) == 2
    assert even_parts(12, 2) == [6, 6]
    assert even_parts(11, 2) == [6, 5]


def test_fewer_samples_than_ranks_are_refused() -> None:
    with pytest.raises(SettingError, match="3 training samples cannot be shared by 4 ranks"):
        ShardedSampler(3, 8, rank=0, ranks=4)


@given(st.integers(0, 100), st.integers(1, 20), st.integers(1, 7))
def test_evaluation_has_each_sample_on_one_rank(samples: int, batch: int, ranks: int) -> None:
    batches = [
        part for rank in range(ranks) for part in EvaluationSampler(samples, batch, rank=rank, ranks=ranks)
    ]
    assert sorted(chain(*batches)) == list(range(samples))
    assert all(1 <= len(part) <= batch for part in batches)


class TestBlocks:
    def test_blocks_come_one_after_the_other_in_a_new_order_each_epoch(self) -> None:
        sizes = [5, 3, 6]
        owner = [block for block, size in enumerate(sizes) for _ in range(size)]
        sampler = ShardedSampler(14, 4, blocks=sizes, seed=1)
        orders = []
        for epoch in range(12):
            sampler.start_at(epoch)
            order = [index for batch in sampler for index in batch]
            assert sorted(order) == list(range(14))
            blocks = [block for block, _ in itertools.groupby(owner[index] for index in order)]
            assert len(blocks) == 3
            orders.append((tuple(blocks), tuple(order)))
        assert len({blocks for blocks, _ in orders}) >= 3
        assert len({order for _, order in orders}) == 12

    def test_ranks_share_them_and_steps_can_be_resumed(self) -> None:
        whole = [set(batch) for batch in ShardedSampler(14, 4, blocks=[5, 9])]
        parts = [list(ShardedSampler(14, 2, blocks=[5, 9], rank=rank, ranks=2)) for rank in range(2)]
        assert [set(a) | set(b) for a, b in zip(*parts, strict=True)] == whole
        later = ShardedSampler(14, 4, blocks=[5, 9])
        later.start_at(0, 2)
        assert [set(batch) for batch in later] == whole[2:]

    def test_one_block_is_the_order_of_before(self) -> None:
        assert list(ShardedSampler(14, 4, blocks=[14])) == list(ShardedSampler(14, 4))


def test_groups_are_evaluated_whole() -> None:
    groups = [3, 1, 4, 2]
    seen = [
        [index for batch in EvaluationSampler(10, 3, rank=rank, ranks=3, groups=groups) for index in batch]
        for rank in range(3)
    ]
    assert seen == [[0, 1, 2, 8, 9], [3], [4, 5, 6, 7]]


def test_targets_of_a_step_are_those_of_its_samples() -> None:
    counts = [1 + index % 5 for index in range(23)]
    for ranks in (1, 2):
        samplers = [
            ShardedSampler(23, 8 // ranks, rank=rank, ranks=ranks, seed=3, targets=counts)
            for rank in range(ranks)
        ]
        for epoch in (0, 1):
            for sampler in samplers:
                sampler.start_at(epoch)
            parts = [[index for batch in sampler for index in batch] for sampler in samplers]
            found = [samplers[-1].targets_in(step) for step in range(samplers[0].steps_per_epoch)]
            assert sum(found) == sum(counts)
            first = [part[: samplers[0].sizes[0] // ranks] for part in parts]
            assert found[0] == sum(counts[index] for part in first for index in part)
    assert ShardedSampler(23, 8).targets_in(0) == 8


def test_unshuffled_samples_come_as_they_are_numbered() -> None:
    halves = [ShardedSampler(12, 2, rank=rank, ranks=2, shuffled=False) for rank in range(2)]
    assert [list(half) for half in halves] == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]]


@pytest.mark.parametrize(("streams", "ranks"), [(1, 1), (3, 1), (3, 2), (4, 2), (2, 3)])
def test_streams_stay_on_their_rank_and_in_order(streams: int, ranks: int) -> None:
    moments = 4
    found = [list(StreamSampler(streams * moments, streams, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert sorted(index for part in found for batch in part for index in batch) == list(
        range(streams * moments)
    )
    for part in found:
        for moment, batch in enumerate(part):
            assert [index // streams for index in batch] == [moment] * len(batch)
            assert [index % streams for index in batch] == [index % streams for index in part[0]]


# Steps that overlap, that are files, that are everything


@given(SHAPES, st.floats(0.05, 1.0))
def test_overlapping_steps_share_their_last_samples(shape: tuple[int, int, int, int], overlap: float) -> None:
    samples, batch, ranks, accumulate = shape
    if samples < ranks:
        return
    arguments: list[dict[str, Any]] = [
        {"accumulate": accumulate, "rank": r, "ranks": ranks} for r in range(ranks)
    ]
    plain = [ShardedSampler(samples, batch, seed=5, **each) for each in arguments]
    parts = [ShardedSampler(samples, batch, seed=5, overlap=overlap, **each) for each in arguments]
    before: list[int] = []
    for step in range(plain[0].steps_per_epoch):
        own = [index for part in plain for micro in part.batch(step) for index in micro]
        joined = [index for part in parts for micro in part.batch(step) for index in micro]
        shared = [index for part in parts for micro in part.shared(step) for index in micro]
        assert joined == before + own
        assert len(joined) == parts[0].sizes[step]
        assert len(shared) == min(len(own), max(ranks, round(overlap * len(own))))
        assert shared == own[len(own) - len(shared) :]
        for part in parts:
            assert len(part.batch(step)) == part.micro_batches_in(step)
            assert min(map(len, part.shared(step))) >= 1
        before = shared


def test_without_overlap_nothing_is_shared() -> None:
    assert ShardedSampler(40, 8).shared_size(0) == 0


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_step_can_be_a_file(ranks: int) -> None:
    parts = [
        ShardedSampler(14, 2, blocks=[5, 3, 6], by_block=True, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    files = [set(range(5)), set(range(5, 8)), set(range(8, 14))]
    orders = set()
    for epoch in range(4):
        for part in parts:
            part.start_at(epoch)
        steps = [[set(chain(*part.batch(step))) for part in parts] for step in range(3)]
        assert [len(set().union(*step)) for step in steps] == list(parts[0].sizes)
        # each step is one file, no sample on two ranks
        assert sorted(map(sorted, (set().union(*step) for step in steps))) == [sorted(each) for each in files]
        assert all(sum(map(len, step)) == len(set().union(*step)) for step in steps)
        orders.add(tuple(parts[0].sizes))
    assert len(orders) > 1
    assert parts[0].global_batch == 6


def test_a_file_smaller_than_the_ranks_is_refused() -> None:
    with pytest.raises(SettingError, match="a file of 3 samples cannot be shared by 4 ranks"):
        ShardedSampler(8, 2, blocks=[5, 3], by_block=True, ranks=4)


def test_a_step_can_be_the_whole_set() -> None:
    parts = [ShardedSampler(23, 4, accumulate=None, rank=rank, ranks=2, seed=1) for rank in range(2)]
    assert [(part.steps_per_epoch, part.global_batch) for part in parts] == [(1, 23)] * 2
    used = [index for part in parts for step in by_step(part) for micro in step for index in micro]
    assert sorted(used) == list(range(23))
    assert [part.micro_batches_in(0) for part in parts] == [3, 3]
