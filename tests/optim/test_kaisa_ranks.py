"""K-FAC on P ranks: the same results as in one process, and the bytes that the formula says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd import dist
from hpcsngd.optim import KFAC
from hpcsngd.optim.kaisa import Grid
from hpcsngd.optim.packing import packed_numbers
from tests.optim import models, oracle
from tests.optim.kfac_tools import kept_factors, saved_factors
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.dist

# Sums are taken in another order on several ranks: float64 rounding, amplified by the factors' condition.
TOLERANCE = 1e-9
STEPS = 4


class Net(nn.Module):
    """One of each: grouped convolution, norm, shared Linear, embedding-free head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.conv(x))).mean((2, 3))
        output: Tensor = self.head(torch.tanh(self.inner(torch.tanh(self.inner(hidden)))))
        return output


def kept_bytes(shape: tuple[int, ...]) -> int:
    """Returns the bytes of a factor's triangle, its eigenvectors and its eigenvalues, none of them halved."""
    values = 0 if len(shape) == 2 else math.prod(shape[:2])
    return 8 * (packed_numbers(shape) + math.prod(shape) + values)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 4, 5, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (12,), generator=generator)


def train(
    options: dict[str, Any], sizes: list[int], steps: int = STEPS, state: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Trains on this rank's share of the batch; gradients are averaged over the ranks as DDP does."""
    model = models.seeded(Net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = KFAC(model, damping=0.05, **options)
    first = 0
    if state is not None:
        kfac.load_state_dict(state["kfac"])
        model.load_state_dict(state["model"])
        first = state["kfac"]["step"]
    start = sum(sizes[: dist.rank()])
    sent, records = [], []
    for step in range(first, steps):
        x, target = (part[start : start + sizes[dist.rank()]] for part in batch(step))
        optimizer.zero_grad()
        total = nn.functional.cross_entropy(model(x), target, reduction="sum")
        (total * dist.world_size() / 12).backward()  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = dist.all_reduce_sum(grad) / dist.world_size()
        kfac.set_progress(0.0, 0.1)
        kfac.step(sample_scale=12 / dist.world_size())
        optimizer.step()
        record = kfac.diagnostics()
        records.append(record)
        sent.append(sum(item.size_bytes for item in record.communication))
    return {
        "weights": [parameter.detach() for parameter in model.parameters()],
        "state": {"kfac": kfac.state_dict(), "model": model.state_dict()},
        "memory": {item.kind: item.size_bytes for item in records[-1].memory} if records else {},
        "sent": sent,
        "kept": {layer.name: sum(map(kept_bytes, layer.factor_shapes())) for layer in kfac._layers},
        "roles": {name: (role.column, role.holders) for name, role in kfac._roles.items()},
        "shapes": {layer.name: layer.factor_shapes() for layer in kfac._layers},
        "entries": {layer.name: sum(p.numel() for p in layer.parameters) for layer in kfac._layers},
    }


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for left, right in zip(found, expected, strict=True):
        assert oracle.relative_error(left, right) <= tolerance


PLACEMENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "2 ranks, comm-opt": (2, {}),
    "2 ranks, mem-opt": (2, {"grad_worker_fraction": 0.5}),
    "3 ranks, mem-opt": (3, {"grad_worker_fraction": 0.0}),
    "3 ranks, split": (3, {"colocate": False}),
    "4 ranks, hybrid": (4, {"grad_worker_fraction": 0.5}),
    "4 ranks, hybrid, split, by memory": (
        4,
        {"grad_worker_fraction": 0.5, "colocate": False, "placement_cost": "memory"},
    ),
}
SIZES = {1: [12], 2: [5, 7], 3: [3, 7, 2], 4: [5, 0, 6, 1]}


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement_changes_nothing(placement: str, inverse: str) -> None:
    """Uneven shares, one of them empty; kl_clip and graft see the same gradients everywhere."""
    ranks, options = PLACEMENTS[placement]
    common = {"inverse": inverse, "kl_clip": 1e-3, "inverse_every": 2}
    expected = train(common, SIZES[1])
    results = run_on_ranks(train, ranks, common | options, SIZES[ranks])
    for result in results:
        same(result["weights"], expected["weights"])
        # Every rank has exactly the same result: replicas do not drift apart.
        same(result["weights"], results[0]["weights"], tolerance=0)


@pytest.mark.parametrize("options", [{"grad_worker_fraction": 0.5}, {"colocate": False}], ids=str)
def test_staggered_ranks_equal_one_process(options: dict[str, Any]) -> None:
    common = {"inverse_every": 2, "stagger": True}
    expected = train(common, SIZES[1])
    for result in run_on_ranks(train, 2, common | options, SIZES[2]):
        same(result["weights"], expected["weights"])


def sent_by_formula(
    options: dict[str, Any], ranks: int, result: dict[str, Any], rank: int
) -> tuple[int, int]:
    """Returns the bytes of a step that updates everything and of a plain step, from `hpcsngd.optim.kaisa`."""
    grid = Grid.of_fraction(ranks, options.get("grad_worker_fraction", 1.0))
    items = [
        (name, shape, at)
        for name, shapes in result["shapes"].items()
        for shape, at in zip(shapes, result["roles"][name][1], strict=True)
    ]

    def inverse_numbers(shape: tuple[int, ...]) -> int:
        if options.get("inverse") == "cholesky":
            return packed_numbers(shape)
        matrix = shape[0] * shape[1] ** 2 if len(shape) == 3 else 0
        return matrix + shape[0] * shape[-1]

    counts = 24 * len(result["shapes"]) + 8 * len(items)
    factors = 8 * sum(packed_numbers(shape) for _, shape, at in items if at != rank)
    agree = 8 * sum(shape[0] for _, shape, _ in items) + 16 * len(items)
    column = grid.columns[grid.column_of(rank)]
    held = [sum(inverse_numbers(shape) for _, shape, at in items if at == member) for member in column]
    inverses = 8 * max(held) if len(column) > 1 else 0
    entries = [
        sum(n for name, n in result["entries"].items() if result["roles"][name][0] == c)
        for c in range(len(grid.columns))
    ]
    step = 8 * max(entries) if len(grid.columns) > 1 else 0
    factors = 0 if options.get("factors") == "local" else factors
    return counts + factors + agree + inverses + step, step


LOCAL = {"factors": "local", "grad_worker_fraction": 0.0}


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
@pytest.mark.parametrize(
    ("ranks", "options"),
    [*PLACEMENTS.values(), (2, LOCAL), (4, LOCAL)],
    ids=[*PLACEMENTS, "2 ranks, local", "4 ranks, local"],
)
def test_bytes_are_those_of_the_formula(ranks: int, options: dict[str, Any], inverse: str) -> None:
    options = options | {"inverse": inverse, "factor_every": 2, "inverse_every": 2}
    for rank, result in enumerate(run_on_ranks(train, ranks, options, [12 // ranks] * ranks)):
        refresh, plain = sent_by_formula(options, ranks, result, rank)
        assert result["sent"] == [refresh, plain, refresh, plain]


def test_one_rank_sends_nothing() -> None:
    assert train({}, [12])["sent"] == [0] * STEPS


def test_local_factors_are_those_of_the_holders_samples() -> None:
    """Each layer's factors are what K-FAC has on its holder's share of the batch alone."""
    options = LOCAL | {"factor_decay": 0.0}
    results = run_on_ranks(train, 2, options, SIZES[2], 1)
    roles = results[0]["roles"]
    assert {at for _, holders in roles.values() for at in holders} == {0, 1}
    for rank in range(2):
        alone = factors_of_share(rank)
        for name in (name for name, (_, holders) in roles.items() if holders[0] == rank):
            found = results[0]["state"]["kfac"]["layers"][name]
            same(saved_factors(found, results[0]["shapes"][name]), alone[name])


def factors_of_share(rank: int) -> dict[str, list[Tensor]]:
    """Returns every layer's factors from one rank's samples, by a process of its own."""
    model = models.seeded(Net)
    kfac = KFAC(model, damping=0.05, factor_decay=0.0, loss_reduction="sum")
    start = sum(SIZES[2][:rank])
    x, target = (part[start : start + SIZES[2][rank]] for part in batch(0))
    nn.functional.cross_entropy(model(x), target, reduction="sum").backward()  # type: ignore[no-untyped-call]
    kfac.step()
    return kept_factors(kfac)


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 2), (4, 2), (2, 1), (1, 4)])
def test_state_continues_on_any_number_of_ranks(saved_on: int, loaded_on: int, inverse: str) -> None:
    options = {"inverse": inverse, "grad_worker_fraction": 0.0, "inverse_every": 2}
    expected = train(options | {"grad_worker_fraction": 1.0}, SIZES[1])
    saved = on_ranks(saved_on, options, 3, None)
    for result in saved[1:]:
        assert result["state"]["kfac"].keys() == saved[0]["state"]["kfac"].keys()
    state = saved[0]["state"]
    for result in on_ranks(loaded_on, options, STEPS, state):
        same(result["weights"], expected["weights"])


def test_resume_is_exact_on_the_same_ranks() -> None:
    options = {"grad_worker_fraction": 0.5, "colocate": False, "inverse_every": 3, "stagger": True}
    whole = on_ranks(2, options, STEPS, None)
    state = on_ranks(2, options, 2, None)[0]["state"]
    for result, expected in zip(on_ranks(2, options, STEPS, state), whole, strict=True):
        same(result["weights"], expected["weights"], tolerance=0)


def on_ranks(
    ranks: int, options: dict[str, Any], steps: int, state: dict[str, Any] | None
) -> list[dict[str, Any]]:
    if ranks == 1:
        return [train(options, SIZES[1], steps, state)]
    return run_on_ranks(train, ranks, options, SIZES[ranks], steps, state)


def test_memory_falls_with_ranks() -> None:
    """Nothing is held twice where one rank preconditions a layer; running factors never are.

    By longest processing time first, no rank has more than ``M / P + (1 - 1 / P) L``: M bytes in all on P
    ranks, L of the largest layer.
    """
    options = {"grad_worker_fraction": 0.0, "placement_cost": "memory"}
    whole = train(options, SIZES[1])
    alone = whole["memory"]
    total = alone["factors"] + alone["inverses"]
    for ranks in (2, 4):
        results = run_on_ranks(train, ranks, options, SIZES[ranks])
        for kind in ("factors", "inverses"):
            assert sum(result["memory"][kind] for result in results) == alone[kind]
        held = [sum(result["memory"].values()) for result in results]
        assert max(held) <= total / ranks + (1 - 1 / ranks) * max(whole["kept"].values())
    replicated = run_on_ranks(train, 2, {}, SIZES[2])
    assert sum(result["memory"]["factors"] for result in replicated) == alone["factors"]
    assert all(result["memory"]["inverses"] == alone["inverses"] for result in replicated)
