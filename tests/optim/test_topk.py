"""Top-k with error feedback: what is chosen, what is kept for later, and that nothing is lost."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpcsngd.optim.compress import BlockTopK, ErrorFeedback, LowRankFeedback, matrix_shape
from hpcsngd.optim.shard import cut_evenly
from hpcsngd.optim.topk import MAX_BLOCK

CPU = torch.device("cpu")


def feedback(rule: BlockTopK, value_dtype: torch.dtype = torch.float64, **options: bool) -> ErrorFeedback:
    return ErrorFeedback(rule, value_dtype=value_dtype, dtype=torch.float64, device=CPU, **options)


def dense(size: int, values: Tensor, positions: Tensor) -> Tensor:
    return torch.zeros(size, dtype=torch.float64).index_put((positions,), values.double(), accumulate=True)


def test_each_block_sends_its_largest_entries() -> None:
    vector = torch.tensor([1.0, -9.0, 2.0, 3.0, 0.0, 0.5, -0.25, 7.0, 8.0, -1.0])
    rule = BlockTopK(10, 0.5, block_size=4)
    assert rule.kept == 2 + 2 + 1
    assert set(rule.choose(vector).tolist()) == {1, 3, 5, 7, 8}


def test_over_everything_and_by_layers() -> None:
    vector = torch.tensor([5.0, 4.0, 3.0, 0.1, 0.2, 0.3])
    assert set(BlockTopK(6, 0.5, scope="global").choose(vector).tolist()) == {0, 1, 2}
    by_layer = BlockTopK(6, 0.5, scope="layer", layers=[3, 3])
    assert by_layer.kept == 4
    assert set(by_layer.choose(vector).tolist()) == {0, 1, 4, 5}


def test_long_layers_are_cut_for_short_positions() -> None:
    size = MAX_BLOCK + 100
    rule = BlockTopK(size, 0.01, scope="layer", layers=[size], is_short=True)
    assert [run.length for run in rule.runs] == [MAX_BLOCK, 100]
    positions = rule.choose(torch.randn(size))
    inside = positions - rule.offsets(CPU)
    assert int(inside.min()) >= 0
    assert int(inside.max()) < MAX_BLOCK


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"density": 0.0}, "density=0.0"),
        ({"density": 1.5}, "density=1.5"),
        ({"density": 0.5, "block_size": MAX_BLOCK + 1, "is_short": True}, "block_size"),
        ({"density": 0.5, "scope": "layer", "layers": [3]}, "do not make up"),
        ({"density": 0.5, "scope": "global", "is_short": True}, "32-bit"),
    ],
)
def test_what_is_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BlockTopK(MAX_BLOCK + 1, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_sent_and_error_are_the_sum_of_the_gradients(size: int, density: float) -> None:
    # whole numbers, so that sums in float64 are exact
    generator = torch.Generator().manual_seed(3)
    rule = BlockTopK(size, density, block_size=16)
    sender = feedback(rule)
    total = torch.zeros(size, dtype=torch.float64)
    sent = total.clone()
    for _ in range(20):
        gradient = torch.randint(-8, 9, (size,), generator=generator).double()
        total += gradient
        sent += dense(size, *sender.send(gradient))
        assert torch.equal(sent + sender.error, total)
    assert (rule.kept == size) == bool((sender.error == 0).all())


def test_rounding_to_bfloat16_is_fed_back_too() -> None:
    sender = feedback(BlockTopK(3, 1.0), torch.bfloat16)
    gradient = torch.tensor([257.0, 1.0, -3.0], dtype=torch.float64)
    values, positions = sender.send(gradient)
    assert values.dtype == torch.bfloat16
    assert torch.equal(dense(3, values, positions) + sender.error, gradient)
    assert float(sender.error.abs().max()) == 1.0  # bfloat16 has 8 bits: 257 is sent as 256


@given(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0]), min_size=1, max_size=40), st.floats(0.05, 1.0))
@settings(max_examples=60, deadline=None)
def test_ties_and_zeros_lose_nothing(entries: list[float], density: float) -> None:
    vector = torch.tensor(entries, dtype=torch.float64)
    rule = BlockTopK(len(entries), density, block_size=8)
    sender = feedback(rule)
    values, positions = sender.send(vector)
    assert len(set(positions.tolist())) == rule.kept
    assert torch.equal(dense(len(entries), values, positions) + sender.error, vector)


def test_without_feedback_the_rest_is_dropped() -> None:
    sender = feedback(BlockTopK(4, 0.5), is_on=False)
    sender.send(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    assert float(sender.error.abs().max()) == 0


def test_the_scale_is_applied_once() -> None:
    sender = feedback(BlockTopK(2, 0.5))
    values, positions = sender.send(torch.tensor([2.0, 1.0], dtype=torch.float64), scale=0.5)
    assert values.tolist() == [1.0]
    assert positions.tolist() == [0]
    assert sender.error.tolist() == [0.0, 0.5]


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_parts_choose_what_the_whole_chooses(parts: int) -> None:
    rule = BlockTopK(100, 0.3, scope="layer", layers=[30, 30, 7, 33])
    vector = torch.randn(100)
    cuts = cut_evenly(rule.boundaries(), parts)
    found: list[int] = []
    for start, stop in itertools.pairwise(cuts):
        own, before = rule.part(start, stop)
        assert before == len(found)
        found += (own.choose(vector[start:stop]) + start).tolist()
    assert found == rule.choose(vector).tolist()


def test_cuts_lie_where_they_may() -> None:
    assert cut_evenly(range(11), 4) == [0, 2, 5, 7, 10]
    assert cut_evenly([0, 90, 100], 3) == [0, 0, 90, 100]
    assert cut_evenly([0, 5], 3) == [0, 0, 5, 5]


def products(factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([(left @ right.mT).reshape(-1) for left, right in factors])


def low_rank(shapes: list[tuple[int, int, int]]) -> LowRankFeedback:
    return LowRankFeedback(shapes, dtype=torch.float64, device=CPU, seeds=[5] * len(shapes))


def test_which_tensors_are_factorized() -> None:
    assert matrix_shape((64, 32, 3, 3), 4) == (64, 288, 4)
    assert matrix_shape((10,), 1) == (10, 1, 1)
    assert matrix_shape((), 1) == (1, 1, 1)
    assert matrix_shape((3, 3), 2) == (9, 1, 1)  # two factors of 3 x 2 would be larger


def test_low_rank_sent_and_error_are_the_sum_of_the_gradients() -> None:
    sender = low_rank([(6, 9, 2), (5, 1, 1)])
    total = torch.zeros(59, dtype=torch.float64)
    sent = total.clone()
    for _ in range(10):
        gradient = torch.randn(59, dtype=torch.float64)
        total += gradient
        sent += products(sender.send(gradient))
        assert torch.allclose(sent + sender.error, total, rtol=0, atol=1e-12)
    assert float(sender.error[:54].norm()) > 0
    assert float(sender.error[54:].norm()) == 0  # vectors are sent in full


def test_a_gradient_of_low_rank_is_found_exactly() -> None:
    sender = low_rank([(8, 12, 2)])
    matrix = torch.randn(8, 2, dtype=torch.float64) @ torch.randn(2, 12, dtype=torch.float64)
    assert torch.allclose(products(sender.send(matrix.reshape(-1))), matrix.reshape(-1), atol=1e-12)


def test_the_warm_start_finds_the_leading_directions() -> None:
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(30, 20, dtype=torch.float64))
    matrix = (left * torch.logspace(0, -3, 20, dtype=torch.float64)) @ right.mT
    best = float(torch.linalg.svdvals(matrix)[2:].norm())
    sender = low_rank([(20, 30, 2)])
    errors = []
    for _ in range(15):
        sender.error.zero_()
        errors.append(float((products(sender.send(matrix.reshape(-1))) - matrix.reshape(-1)).norm()))
    assert errors[0] > 1.05 * best
    assert errors[-1] < 1.0001 * best


def test_zero_gradients_do_not_stop_the_iteration() -> None:
    sender = low_rank([(6, 7, 2)])
    assert float(products(sender.send(torch.zeros(42, dtype=torch.float64))).abs().max()) == 0
    matrix = torch.randn(6, 1, dtype=torch.float64) @ torch.randn(1, 7, dtype=torch.float64)
    sent = products(sender.send(matrix.reshape(-1)))
    assert torch.allclose(sent, matrix.reshape(-1), atol=1e-12)
