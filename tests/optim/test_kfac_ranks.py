"""P ranks equal one process on the joined batch, whatever the shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hpcsngd import dist
from hpcsngd.optim import KFAC
from tests.optim import models, oracle
from tests.optim.kfac_tools import gradients, kept_factors, train
from tests.optim.test_ranks import same
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.dist

OPTIONS: dict[str, dict[str, Any]] = {
    "eigen": {"damping": 0.05},
    "cholesky": {"damping": 0.05, "inverse": "cholesky", "factor_every": 2},
    "reduce": {"damping": 0.05, "sharing": "reduce", "inverse_every": 2},
    "type-2": {"damping": 0.05, "fisher": "type-2", "loss": "mse"},
    "clipped": {"damping": 0.05, "kl_clip": 1e-4},
}


@pytest.mark.parametrize(
    ("kind", "sizes", "method"),
    [
        ("mlp", [6, 6], "eigen"),
        ("mlp", [5, 0, 6, 1], "cholesky"),
        ("conv", [3, 7, 2], "eigen"),
        ("conv", [6, 6], "type-2"),
        ("conv", [5, 0, 6, 1], "clipped"),
        ("tokens", [3, 7], "reduce"),
    ],
    ids=str,
)
def test_ranks_equal_one_process(kind: str, sizes: list[int], method: str) -> None:
    expected = train(kind, [sum(sizes)], 3, OPTIONS[method])
    results = run_on_ranks(train, len(sizes), kind, sizes, 3, OPTIONS[method])
    for result in results:
        same(result["gradients"], expected["gradients"])
        # Every rank has exactly the same result: replicas do not drift apart.
        same(result["gradients"], results[0]["gradients"], tolerance=0)


@pytest.mark.parametrize("sizes", [[12], [4, 4, 4]], ids=str)
def test_resume_on_another_number_of_ranks(sizes: list[int]) -> None:
    options = {**OPTIONS["eigen"], "factor_every": 2, "inverse_every": 3}
    expected = train("mlp", [12], 6, options)
    (saved, _) = run_on_ranks(train, 2, "mlp", [5, 7], 4, options)
    for result in run_on_ranks(train, len(sizes), "mlp", sizes, 6, options, saved["state"]):
        same(result["gradients"], expected["gradients"])


def train_with_ddp(steps: int, parts: int, fisher: Any) -> dict[str, Any]:
    """Trains as users do: mean loss, DDP, default scale, even batches of 8 in all, ``no_sync`` in between."""
    model = models.mlp()
    wrapped: nn.Module = DistributedDataParallel(model) if dist.is_initialized() else model
    kfac = KFAC(wrapped, damping=0.05, accumulation_steps=parts, fisher=fisher, loss="mse")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    ranks, rank = dist.world_size(), dist.rank()
    for step in range(steps):
        optimizer.zero_grad()
        x, target = oracle.batch(models.mlp(), (8, 5), seed=step)
        for micro in range(parts):
            part = slice(rank * parts + micro, None, ranks * parts)
            wrapped.require_backward_grad_sync = micro == parts - 1
            outputs = wrapped(x[part])
            kfac.before_backward(outputs)
            (nn.functional.mse_loss(outputs, target[part]) / parts).backward()
        kfac.step()
        optimizer.step()
    # Names do not carry the wrapper's prefix.
    assert set(kept_factors(kfac)) == {"0", "2"}
    return {"gradients": gradients(model), "record": kfac.diagnostics()}


@pytest.mark.parametrize("fisher", ["empirical", "type-2"])
@pytest.mark.parametrize(("ranks", "parts"), [(2, 1), (4, 2)])
def test_ddp_with_default_scale(ranks: int, parts: int, fisher: str) -> None:
    """DDP's own hooks do not see what type-2 sends through the graph."""
    expected = train_with_ddp(2, 1, fisher)["gradients"]
    for result in run_on_ranks(train_with_ddp, ranks, 2, parts, fisher):
        same(result["gradients"], expected)


def train_through_a_fault(steps: int) -> dict[str, Any]:
    """Trains on all ranks; in the second step the last rank has a sample that is not finite."""
    model = models.mlp()
    kfac = KFAC(model, damping=0.05)
    results = []
    for step in range(steps):
        x, target = oracle.batch(models.mlp(), (6, 5), seed=step + 100 * dist.rank())
        model.zero_grad()
        oracle.mean_loss(model, x, target).backward()
        if step == 1 and dist.rank() == dist.world_size() - 1:
            kfac._collector.watch._calls["2"][0][0].g[0, 0, 0] = float("nan")
        for parameter in model.parameters():
            dist.all_reduce_sum(parameter.grad)
        kfac.step()
        results += gradients(model)
    return {"gradients": results, "record": kfac.diagnostics()}


def test_one_ranks_fault_is_everybodys() -> None:
    first, *others = run_on_ranks(train_through_a_fault, 3, 3)
    assert first["record"].failures == 1
    for other in others:
        assert other["record"].failures == 1
        same(other["gradients"], first["gradients"], tolerance=0)
