"""Factors that are summed while the backward pass runs are those that are summed after it, bit for bit."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from hpcsngd import dist
from hpcsngd.optim import KFAC, kfac_exchange
from tests.optim import models, oracle
from tests.optim.kfac_tools import gradients
from tests.optim.test_kaisa_ranks import Net, batch
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.dist

# Several buckets even for a small model.
SMALL = mock.patch.object(kfac_exchange, "BUCKET_NUMBERS", 60)


def train(options: dict[str, Any], parts: int, grad_scale: float, is_announced: bool) -> dict[str, Any]:
    """Trains four steps on this rank's uneven share; returns weights and what was sent in each step."""
    model = models.seeded(Net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sent = []
    with SMALL:
        kfac = KFAC(model, damping=0.05, **options)
        first, size = (0, 5) if dist.rank() == 0 else (5, 7)
        for step in range(4):
            x, target = (part[first : first + size] for part in batch(step))
            optimizer.zero_grad()
            if is_announced:
                kfac.begin_step(6.0, parts)
            for micro in range(parts):
                outputs = model(x[micro::parts])
                kfac.before_backward(outputs)
                total = nn.functional.cross_entropy(outputs, target[micro::parts], reduction="sum")
                (grad_scale * total / 6).backward()  # type: ignore[no-untyped-call]
            for parameter in model.parameters():
                parameter.grad = dist.all_reduce_sum(parameter.grad) / dist.world_size() / grad_scale
            kfac.step(6.0, grad_scale)
            optimizer.step()
            sent.append({(c.phase, c.op): c.size_bytes for c in kfac.diagnostics().communication})
    return {"weights": [parameter.detach() for parameter in model.parameters()], "sent": sent}


@pytest.mark.parametrize(
    ("options", "parts", "grad_scale"),
    [
        ({"stagger": True, "inverse_every": 3, "grad_worker_fraction": 0.5}, 2, 4.0),
        ({"fisher": "type-2", "factor_every": 2}, 1, 1.0),
    ],
    ids=str,
)
def test_when_factors_are_sent_changes_nothing(
    options: dict[str, Any], parts: int, grad_scale: float
) -> None:
    late = run_on_ranks(train, 2, options, parts, grad_scale, False)
    early = run_on_ranks(train, 2, options, parts, grad_scale, True)
    for mine, theirs in zip(early, late, strict=True):
        for found, wanted in zip(mine["weights"], theirs["weights"], strict=True):
            assert torch.equal(found, wanted)
        for sent, expected in zip(mine["sent"], theirs["sent"], strict=True):
            # Every layer gets its gradients, so all factors went before step() and none in it.
            assert ("reduce", "all_to_all") not in sent
            early_bytes = sent.pop(("reduce", "all_to_all_async"), 0)
            assert early_bytes == expected.pop(("reduce", "all_to_all"), 0)
            assert sent == expected
    assert early[0]["sent"][0] != {}


class Branches(nn.Module):
    """Its second branch gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        output: Tensor = self.used(x)
        return output


def step_with_an_idle_layer(is_announced: bool) -> tuple[list[Tensor], dict[Any, int]]:
    model = models.seeded(Branches)
    with SMALL:
        kfac = KFAC(model, damping=0.05)
        if is_announced:
            kfac.begin_step()
        oracle.mean_loss(model, *oracle.batch(models.seeded(Branches), (8, 5), dist.rank())).backward()
        kfac.step()
    sent = {(c.phase, c.op): c.size_bytes for c in kfac.diagnostics().communication}
    return [model.used.weight.grad, model.used.bias.grad], sent


def test_a_layer_without_gradients_is_sent_last() -> None:
    """Nobody can know in the backward pass that nothing will come; ranks still agree on the order."""
    late = run_on_ranks(step_with_an_idle_layer, 2, False)
    for (found, sent), (wanted, _) in zip(run_on_ranks(step_with_an_idle_layer, 2, True), late, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
        assert ("reduce", "all_to_all") in sent


def mistakes() -> list[str]:
    """Returns what is said about a step that is not as announced."""
    said = []
    kfac = KFAC(model := models.mlp())
    kfac.begin_step(4.0)
    for _ in range(2):
        try:
            oracle.mean_loss(model, *oracle.batch(models.mlp(), (6, 5))).backward()
            kfac.step(5.0)
        except (RuntimeError, ValueError) as error:
            said.append(str(error))
    kfac.close()
    return said


def test_a_step_that_was_announced_otherwise_is_refused() -> None:
    for said in run_on_ranks(mistakes, 2):
        assert said[0] == "sample_scale=5.0: begin_step was told 4.0; factors are sent"
        assert said[1].startswith("layer 2: a gradient after its factors were sent; tell begin_step of all")


def test_alone_an_announcement_changes_nothing() -> None:
    found = []
    for is_announced in (True, False):
        kfac = KFAC(model := models.mlp())
        if is_announced:
            kfac.begin_step(3.0, 1)
        oracle.mean_loss(model, *oracle.batch(models.mlp(), (6, 5))).backward()
        kfac.step(3.0)
        found.append(gradients(model))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    with pytest.raises(ValueError, match="micro_batches=0"):
        kfac.begin_step(1.0, 0)
