"""M-FAC and GGT in training: resume with momentum, and normalization layers left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.config import experiment as schema
from hpcsngd.config.experiment import GGT, MFAC
from hpcsngd.train import models
from hpcsngd.train.optimizers import build_optimizers, build_preconditioner
from tests.train.runs import assert_same_weights, dropout_net, make_run, rows, train
from tests.train.test_session import request_stop_at

WINDOWS: dict[str, dict[str, Any]] = {
    "dense": {"name": "mfac"},
    "sparse": {"name": "mfac", "storage": "sparse", "density": 0.1, "early": "error"},
    "lowrank": {"name": "mfac", "storage": "lowrank"},
    "ggt": {"name": "ggt", "eps": 0.1},
    "sparse ggt": {"name": "ggt", "eps": 0.1, "storage": "sparse", "density": 0.1},
}


def settings(name: str) -> dict[str, str]:
    window = {"num_grads": 6, **({"damping": 0.1} if WINDOWS[name]["name"] == "mfac" else {})}
    fields = ", ".join(f"{key}: {value}" for key, value in (WINDOWS[name] | window).items())
    return {
        "preconditioner": f"{{{fields}}}",
        "optimizer": "{name: sgd, lr: 0.01, momentum: 0.9, weight_decay: 0.01, decoupled: true}",
    }


@pytest.mark.parametrize("name", WINDOWS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Window, place in the ring, Gram matrix, error and momentum: stopped while full and not at a wrap."""
    monkeypatch.setitem(models.MODELS, "digits-cnn", dropout_net)
    whole, parted = (make_run(tmp_path, epochs=1, **settings(name)) for _ in range(2))
    assert train(whole)
    with monkeypatch.context() as patch:
        request_stop_at(patch, 8)
        assert not train(parted)
    assert train(parted, attempt=2)
    assert_same_weights(whole, parted)
    assert rows(whole, "train") == rows(parted, "train")


class Normalized(nn.Module):
    """Both kinds of normalization between two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8, bias=False)
        self.batch_norm = nn.BatchNorm1d(8)
        self.layer_norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.relu(self.layer_norm(self.batch_norm(self.first(x)))))
        return result


def ablated(model: nn.Module, preconditioner: dict[str, Any], skip: list[str]) -> dict[str, Tensor]:
    """Trains a few steps; returns how far each parameter has moved."""
    config = schema.Experiment.model_validate(
        {
            "description": "test",
            "model": {"name": "digits-cnn"},
            "data": {"name": "digits"},
            "batch_size": 4,
            "epochs": 1,
            "optimizer": {"name": "sgd", "lr": 0.01},
            "preconditioner": {**preconditioner, "num_grads": 4, "skip": skip},
        }
    )
    assert isinstance(config.preconditioner, MFAC | GGT)
    (optimizer,) = build_optimizers(model, config.optimizer)
    method = build_preconditioner(model, config, seed=0)
    assert method is not None
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(16, 6, generator=generator)
        nn.functional.cross_entropy(model(x), torch.arange(16) % 3).backward()
        plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        method.step()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, plain[name]) == (name in method.skipped)
        optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("preconditioner", [{"name": "mfac", "damping": 0.1}, {"name": "ggt", "eps": 0.1}])
@pytest.mark.parametrize(
    ("skip", "left_out"),
    [
        ([], set()),
        (["BatchNorm1d"], {"batch_norm"}),
        (["BatchNorm1d", "LayerNorm"], {"batch_norm", "layer_norm"}),
        (["_norm$"], {"batch_norm", "layer_norm"}),
    ],
)
def test_normalization_left_out_of_the_window_goes_on_training(
    preconditioner: dict[str, Any], skip: list[str], left_out: set[str]
) -> None:
    torch.manual_seed(0)
    model = Normalized()
    moved = ablated(model, preconditioner, skip)
    assert all(float(change.abs().max()) > 0 for change in moved.values())
    torch.manual_seed(0)
    with_all = ablated(Normalized(), preconditioner, [])
    changed = {name.split(".")[0] for name in moved if not torch.equal(moved[name], with_all[name])}
    assert left_out <= changed
    assert bool(changed) == bool(skip)
