"""PreconditionedSGD: the same core behind one torch optimizer."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd import optim
from hpcsngd.optim import HyLo
from tests.optim import models, oracle

SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}
HYLO: dict[str, Any] = {"method": "kis", "ratio": 0.5, "damping": 0.05, "refresh_every": 3}


def step(model: nn.Module, number: int) -> Tensor:
    loss = oracle.mean_loss(model, *oracle.batch(models.mlp(), (8, 5), seed=number))
    loss.backward()
    return loss


def train(optimizer: Any, model: nn.Module, first: int, last: int) -> None:
    for number in range(first, last):
        optimizer.zero_grad()
        step(model, number)
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_equals_preconditioner_and_sgd() -> None:
    model, other = models.mlp(), models.mlp()
    train(optim.optimizer("hylo", model, **SGD, **HYLO), model, 0, 7)
    hylo, sgd = HyLo(other, **HYLO), torch.optim.SGD(other.parameters(), **SGD)
    for number in range(7):
        sgd.zero_grad()
        step(other, number)
        hylo.step()
        sgd.step()
    assert torch.equal(weights(model), weights(other))
    assert not torch.equal(weights(model), weights(models.mlp()))


@pytest.mark.parametrize("saved_after", [1, 2, 3, 4])
def test_resume_is_bitwise(saved_after: int) -> None:
    model = models.mlp()
    optimizer = optim.optimizer("hylo", model, **SGD, **HYLO)
    train(optimizer, model, 0, saved_after)
    stored = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], stored)
    train(optimizer, model, saved_after, 7)
    stored.seek(0)
    resumed = models.mlp()
    other = optim.optimizer("hylo", resumed, **{**SGD, "lr": 9.0}, **HYLO)
    model_state, optimizer_state = torch.load(stored, weights_only=True)
    resumed.load_state_dict(model_state)
    other.load_state_dict(optimizer_state)
    train(other, resumed, saved_after, 7)
    assert torch.equal(weights(resumed), weights(model))


def test_closure_and_scheduler() -> None:
    model, other = models.mlp(), models.mlp()
    ours, plain = optim.optimizer("hylo", model, **SGD), optim.optimizer("hylo", other, **SGD)
    schedule = torch.optim.lr_scheduler.StepLR(ours, 2)
    for number in range(4):

        def closure(number: int = number) -> Tensor:
            ours.zero_grad()
            return step(model, number)

        assert float(ours.step(closure).detach()) > 0
        schedule.step()
        plain.param_groups[0]["lr"] = 0.05 if number < 2 else 0.005
        train(plain, other, number, number + 1)
    torch.testing.assert_close(weights(model), weights(other))


def test_progress_reaches_the_preconditioner() -> None:
    model = models.mlp()
    damping = {"initial": 0.1, "target": 0.01, "epochs": 4.0}
    optimizer = optim.optimizer("hylo", model, lr=0.1, damping=damping, method="hybrid")
    optimizer.start_step(2.5)
    step(model, 0)
    optimizer.step()
    record = optimizer.preconditioner.diagnostics()
    assert record.damping == optim.DampingDecay(**damping).at_epoch(2.5)
    assert record.switches[0].lr == 0.1


def test_a_state_without_preconditioner_is_refused() -> None:
    model = models.mlp()
    optimizer = optim.optimizer("hylo", model, lr=0.1)
    state = copy.deepcopy(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    with pytest.raises(ValueError, match="no preconditioner"):
        optimizer.load_state_dict(state)


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown preconditioner 'hilo'"):
        optim.optimizer("hilo", models.mlp(), lr=0.1)
    with pytest.raises(TypeError, match="dampnig"):
        optim.optimizer("hylo", models.mlp(), lr=0.1, dampnig=0.1)
