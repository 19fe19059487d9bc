"""Parameter groups: who decays, and that nobody is dropped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpcsngd.config.experiment import SGD
from hpcsngd.optim import DecoupledSGD
from hpcsngd.train import optimizers
from hpcsngd.train.faults import SettingError
from hpcsngd.train.groups import check_coverage, parameter_groups


def net() -> nn.Module:
    block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), block, nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("no_decay", "exempt"),
    [
        ([], set()),
        (["BatchNorm2d", "LayerNorm"], {"1.weight", "1.bias", "3.1.weight", "3.1.bias"}),
        (["bias$"], {"0.bias", "1.bias", "3.0.bias", "3.1.bias", "4.bias"}),
        (["^3$"], {"3.0.weight", "3.0.bias", "3.1.weight", "3.1.bias"}),
        (["^4.weight$", "Conv2d"], {"4.weight", "0.weight", "0.bias"}),
    ],
)
def test_rules_by_type_and_name_cover_every_parameter_once(no_decay: list[str], exempt: set[str]) -> None:
    model = net()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(each)], group["weight_decay"])
        for group in parameter_groups(model, 0.5, no_decay)
        for each in group["params"]
    ]
    assert sorted(found) == sorted((name, 0.0 if name in exempt else 0.5) for name in names.values())


def test_a_shared_parameter_is_known_by_all_its_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    (group,) = parameter_groups(model, 0.5, [r"^1\.weight$"])
    assert (len(group["params"]), group["weight_decay"]) == (1, 0.0)


def test_a_rule_that_names_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match=r"optimizer.no_decay='GroupNorm' matches no module.*no parameter"):
        parameter_groups(net(), 0.5, ["GroupNorm"])


def test_parameters_left_out_or_taken_twice_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    weight = torch.optim.SGD([model.weight], lr=0.1)
    with pytest.raises(SettingError, match=r"exactly one optimizer group: bias in 0$"):
        check_coverage(model, [weight])
    with pytest.raises(SettingError, match=r"exactly one optimizer group: weight in 2$"):
        check_coverage(model, [weight, torch.optim.SGD(model.parameters(), lr=0.1)])
    monkeypatch.setitem(optimizers.OPTIMIZERS, "sgd", lambda model, **_: [weight])
    with pytest.raises(SettingError, match="bias in 0"):
        optimizers.build_optimizers(model, SGD(name="sgd", lr=0.1))


def test_decoupled_decay_is_by_group_too() -> None:
    config = SGD(name="sgd", lr=0.1, weight_decay=0.5, no_decay=["bias$"], decoupled=True)
    (optimizer,) = optimizers.build_optimizers(nn.Linear(2, 2), config)
    assert type(optimizer) is DecoupledSGD
    assert [group["decoupled_weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
