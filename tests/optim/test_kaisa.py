"""Who holds, inverts and preconditions what, and how factors are packed: arithmetic, without ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcsngd.optim.kaisa import Grid, inversion_cost, place
from hpcsngd.optim.kfac_inverter import Inverter
from hpcsngd.optim.packing import pack, packed_numbers, unpack

costs_of_layers = st.dictionaries(
    st.text("abc", min_size=1, max_size=3), st.lists(st.integers(1, 99), min_size=1, max_size=2), min_size=1
)


@pytest.mark.parametrize(
    ("ranks", "fraction", "columns", "rows"),
    [
        (1, 1.0, [[0]], [[0]]),
        (4, 1.0, [[0, 1, 2, 3]], [[0], [1], [2], [3]]),
        (4, 0.5, [[0, 2], [1, 3]], [[0, 1], [2, 3]]),
        (4, 0.25, [[0], [1], [2], [3]], [[0, 1, 2, 3]]),
        (4, 0.0, [[0], [1], [2], [3]], [[0, 1, 2, 3]]),
        (6, 1 / 3, [[0, 3], [1, 4], [2, 5]], [[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_grid(ranks: int, fraction: float, columns: list[list[int]], rows: list[list[int]]) -> None:
    grid = Grid.of_fraction(ranks, fraction)
    assert (grid.columns, grid.rows) == (columns, rows)
    assert [grid.column_of(rank) for column in columns for rank in column] == [
        index for index, column in enumerate(columns) for _ in column
    ]


@pytest.mark.parametrize(("ranks", "fraction"), [(4, 0.75), (4, 0.3), (3, 0.5), (2, 1.5), (2, -0.5)])
def test_grid_refuses_what_does_not_divide_the_ranks(ranks: int, fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"grad_worker_fraction={fraction}: on {ranks} ranks it may be .*1"):
        Grid.of_fraction(ranks, fraction)


@given(costs_of_layers, st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4), (6, 2)]), st.booleans())
def test_every_factor_has_a_holder_in_its_column(
    costs: dict[str, list[int]], sizes: tuple[int, int], colocate: bool
) -> None:
    grid = Grid(*sizes)
    roles = place(costs, grid, colocate=colocate)
    assert list(roles) == list(costs)
    for name, role in roles.items():
        assert len(role.holders) == len(costs[name])
        assert set(role.holders) <= set(grid.columns[role.column])
        assert not colocate or len(set(role.holders)) == 1


@given(costs_of_layers, st.sampled_from([1, 2, 4]), st.booleans())
def test_no_column_or_rank_does_much_more_than_its_share(
    costs: dict[str, list[int]], workers: int, colocate: bool
) -> None:
    """The mean and the largest task bound every bin of longest processing time first."""
    grid = Grid(4, workers)
    roles = place(costs, grid, colocate=colocate)
    sums = {name: sum(factors) for name, factors in costs.items()}
    for column, members in enumerate(grid.columns):
        here = [name for name in costs if roles[name].column == column]
        load = sum(sums[name] for name in here)
        assert load <= sum(sums.values()) / len(grid.columns) + max(sums.values())
        tasks = [sums[name] for name in here] if colocate else [c for name in here for c in costs[name]]
        for rank in members:
            held = sum(
                cost for n in here for cost, at in zip(costs[n], roles[n].holders, strict=True) if at == rank
            )
            assert held <= load / len(members) + max(tasks, default=0)


def test_split_factors_of_one_large_layer_use_two_ranks() -> None:
    assert place({"a": [5, 4]}, Grid(2, 2), colocate=False)["a"].holders == (0, 1)
    assert place({"a": [5, 4]}, Grid(2, 2), colocate=True)["a"].holders == (0, 0)


def test_costs_of_factors() -> None:
    assert inversion_cost((2, 3, 3)) == 2 * 27
    assert inversion_cost((1, 50)) == 50
    eigen, cholesky = Inverter("eigen", True, None), Inverter("cholesky", True, None)
    # The triangle; the vectors and values, or the inverse.
    assert eigen.kept_numbers((2, 3, 3)) == 2 * (6 + 9 + 3)
    assert cholesky.kept_numbers((2, 3, 3)) == 2 * (6 + 9)
    assert eigen.kept_numbers((1, 50)) == cholesky.kept_numbers((1, 50)) == 100


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
def test_a_resnet_32_is_kept_in_twelve_times_its_weights(inverse: Any) -> None:
    """On one rank, where nothing is shared out; others keep 18.7 times the weights of this network."""
    blocks = {(16, 27): 1, (16, 144): 10, (32, 144): 1, (32, 288): 9, (64, 288): 1, (64, 576): 9, (10, 65): 1}
    units = 2 * (11 * 16 + 10 * 32 + 10 * 64)  # scales and shifts of the norm layers
    weights = sum(d_out * d_in * count for (d_out, d_in), count in blocks.items()) + units
    assert weights == 464_154
    kept = Inverter(inverse, True, None).kept_numbers
    numbers = sum(count * kept((1, side, side)) for sides, count in blocks.items() for side in sides)
    assert numbers + kept((units // 2, 2, 2)) <= 12 * weights


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 6))
def test_triangles_come_back_symmetric(seed: int, blocks: int, side: int) -> None:
    x = torch.randn(blocks, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x + x.mT
    flat = pack(x)
    assert flat.shape == (packed_numbers(x.shape),) == (blocks * side * (side + 1) // 2,)
    assert torch.equal(unpack(flat, x.shape), x)


def test_diagonals_travel_whole() -> None:
    x = torch.randn(1, 7)
    assert len(pack(x)) == packed_numbers(x.shape) == 7
    assert torch.equal(unpack(pack(x), x.shape), x)
