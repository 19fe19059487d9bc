"""Builders of optimizers and preconditioners, and their agreement with the schema."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest
import torch
from torch import nn

from hpcsngd.config import experiment as schema
from hpcsngd.optim import PRECONDITIONERS
from hpcsngd.train.faults import SettingError
from hpcsngd.train.optimizers import (
    OPTIMIZERS,
    STEP_FIELDS,
    build_optimizers,
    build_preconditioner,
    muon,
    set_multiplier,
)


def members(union: Any) -> list[type[schema.Strict]]:
    """Returns the classes in ``Annotated[A | B, ...]``, or the one in ``Annotated[A, ...]``."""
    inside = get_args(union)[0]
    return list(get_args(inside)) or [inside]


def by_name(classes: list[type[schema.Strict]]) -> dict[str, set[str]]:
    """Returns the names that the classes stand for, with the fields that each has."""
    return {
        name: set(each.model_fields) - {"name"}
        for each in classes
        for name in get_args(each.model_fields["name"].annotation)
    }


def test_optimizers_take_exactly_the_fields_of_the_schema() -> None:
    arguments = {
        name: set(inspect.signature(build).parameters) - {"model"} for name, build in OPTIMIZERS.items()
    }
    fields = by_name(members(schema.Optimizer))
    fields["lbfgs"] -= STEP_FIELDS
    assert arguments == fields


def test_preconditioners_take_the_fields_of_the_schema() -> None:
    fields = by_name(members(schema.Preconditioner))
    assert fields.keys() == PRECONDITIONERS.keys()
    for name, wanted in fields.items():
        arguments = set(inspect.signature(PRECONDITIONERS[name].__init__).parameters)
        assert wanted <= arguments, name


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))


def experiment(**changes: Any) -> schema.Experiment:
    fields: dict[str, Any] = {
        "description": "test",
        "model": {"name": "digits-cnn"},
        "data": {"name": "digits"},
        "batch_size": 4,
        "epochs": 1,
        "optimizer": {"name": "sgd", "lr": 0.1},
    }
    return schema.Experiment.model_validate(fields | changes)


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_fields_reach_the_optimizer(name: str, kind: type[torch.optim.Optimizer]) -> None:
    config = experiment(optimizer={"name": name, "lr": 0.25, "weight_decay": 0.5}).optimizer
    (optimizer,) = build_optimizers(net(), config)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_the_multiplier_acts_on_the_peak_rate() -> None:
    built = build_optimizers(net(), experiment().optimizer)
    for factor in (0.5, 0.25):
        set_multiplier(built, factor)
        assert built[0].param_groups[0]["lr"] == 0.1 * factor


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    model = net()
    config = experiment(optimizer={"name": "muon", "lr": 0.02, "adamw_lr": 0.003}).optimizer
    matrices, others = build_optimizers(model, config)
    assert type(matrices).__name__ == "Muon"
    assert [parameter.ndim for parameter in matrices.param_groups[0]["params"]] == [2]
    assert sorted(parameter.ndim for parameter in others.param_groups[0]["params"]) == [1, 1, 4]
    set_multiplier([matrices, others], 0.5)
    assert [each.param_groups[0]["lr"] for each in (matrices, others)] == [0.01, 0.0015]


def test_muon_without_torchs_own_names_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(SettingError, match=r"muon needs torch >= 2\.9; this is torch"):
        muon(net(), lr=0.1, weight_decay=0, no_decay=[], momentum=0.9, nesterov=True, adamw_lr=0.1)


def normalized_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("no_decay", "exempt"),
    [
        ([], set()),
        (["BatchNorm2d"], {"1.weight", "1.bias"}),
        (["BatchNorm2d", "^3$"], {"1.weight", "1.bias", "3.weight", "3.bias"}),
        (["BatchNorm2d", "bias$"], {"0.bias", "1.weight", "1.bias", "3.bias"}),
    ],
)
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_each_parameter_is_in_one_group_and_the_named_modules_do_not_decay(
    name: str, no_decay: list[str], exempt: set[str]
) -> None:
    model = normalized_net()
    fields = {"name": name, "lr": 0.1, "weight_decay": 0.5, "no_decay": no_decay}
    (optimizer,) = build_optimizers(model, experiment(optimizer=fields).optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(each)], group["weight_decay"])
        for group in optimizer.param_groups
        for each in group["params"]
    ]
    assert sorted(found) == sorted((name, 0.0 if name in exempt else 0.5) for name in names.values())


def test_what_does_not_decay_keeps_training() -> None:
    model = normalized_net()
    fields = {"name": "sgd", "lr": 0.1, "weight_decay": 0.5, "no_decay": ["BatchNorm2d"]}
    (optimizer,) = build_optimizers(model, experiment(optimizer=fields).optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    nn.functional.cross_entropy(model(torch.randn(8, 1, 4, 4)), torch.arange(8) % 3).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_a_module_that_is_not_there_cannot_be_exempt() -> None:
    fields = {"name": "sgd", "lr": 0.1, "no_decay": ["LayerNorm"]}
    with pytest.raises(SettingError, match=r"optimizer.no_decay='LayerNorm' matches no module"):
        build_optimizers(normalized_net(), experiment(optimizer=fields).optimizer)


def test_no_preconditioner_without_one_in_the_experiment() -> None:
    assert build_preconditioner(net(), experiment(), seed=0) is None


def test_the_preconditioner_measures_what_the_diagnostics_say() -> None:
    config = experiment(
        preconditioner={"name": "hylo", "method": "kis", "ratio": 0.5},
        diagnostics={"rank_analysis": True, "grad_error": True, "profiling": True},
    )
    model = net()
    preconditioner = build_preconditioner(model, config, seed=0)
    assert preconditioner is not None
    images, labels = torch.randn(8, 1, 4, 4), torch.arange(8) % 3
    nn.functional.cross_entropy(model(images), labels).backward()
    preconditioner.step()
    record = preconditioner.diagnostics()
    assert {item.layer for item in record.rank_analysis} == {"0", "2"}
    assert {item.method for item in record.grad_error} == {"kid", "kis"}
    assert {"capture", "factorise", "precondition"} <= {item.phase for item in record.phases}


@pytest.mark.parametrize("name", ["rank_analysis", "grad_error", "strength"])
def test_a_diagnostic_of_the_preconditioner_needs_one(name: str) -> None:
    with pytest.raises(SettingError, match=f"diagnostics.{name} measure a preconditioner"):
        build_preconditioner(net(), experiment(diagnostics={name: True}), seed=0)


def test_kfac_is_built_for_the_loss() -> None:
    config = experiment(
        preconditioner={"name": "kfac", "fisher": "mc", "mc_samples": 2, "factor_dtype": "bfloat16"},
        diagnostics={"profiling": True},
    )
    model = net()
    preconditioner = build_preconditioner(model, config, seed=0)
    assert preconditioner is not None
    outputs = model(torch.randn(8, 1, 4, 4))
    preconditioner.before_backward(outputs)
    nn.functional.cross_entropy(outputs, torch.arange(8) % 3).backward()
    preconditioner.step()
    record = preconditioner.diagnostics()
    assert {"capture", "reduce", "invert", "precondition"} <= {item.phase for item in record.phases}
    assert record.failures == 0


@pytest.mark.parametrize("name", ["rank_analysis", "grad_error"])
def test_kfac_has_no_kernels_to_measure(name: str) -> None:
    with pytest.raises(SettingError, match=f"diagnostics.{name} measures what hylo has and kfac has not"):
        build_preconditioner(
            net(), experiment(preconditioner={"name": "kfac"}, diagnostics={name: True}), seed=0
        )


def test_kfac_is_built_for_dice_too() -> None:
    changes = {
        "task": "segmentation",
        "model": {"name": "unet"},
        "data": {"name": "lgg-mri"},
        "loss": {"name": "dice"},
    }
    config = experiment(preconditioner={"name": "kfac"}, **changes)
    assert build_preconditioner(net(), config, seed=0) is not None
