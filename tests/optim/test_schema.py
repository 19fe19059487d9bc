"""What experiments may write is what HyLo takes, with the same defaults and the same refusals."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from pydantic import ValidationError

from hpcsngd.config import experiment
from hpcsngd.optim import DampingDecay, HyLo, SwitchRule
from tests.optim import models

#: Given by training itself, or a function that YAML cannot write.
NOT_WRITTEN = {"self", "model", "loss_reduction", "accumulation_steps", "dtype", "seed", "communicator"}
NOT_WRITTEN |= {"profile", "observe", "rank_shares"}


@pytest.mark.parametrize(
    ("schema", "built", "others"),
    [
        (experiment.HyLo, HyLo.__init__, {"refresh_every"}),
        (experiment.Switch, SwitchRule.__init__, set()),
        (experiment.DampingDecay, DampingDecay.__init__, set()),
    ],
)
def test_fields_are_arguments_with_their_defaults(schema: Any, built: Any, others: set[str]) -> None:
    arguments = inspect.signature(built).parameters
    for name, field in schema.model_fields.items():
        if name != "name" and not field.is_required() and name not in others | {"skip"}:
            assert field.default == arguments[name].default, name
    assert set(schema.model_fields) - {"name"} == set(arguments) - NOT_WRITTEN


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "hybrid", "switch": {"windows": [[0, 10], [35, 40]]}, "low_rank": 32},
        {"method": "kid", "share": 0.9, "complement": "residual", "kl_clip": 1e-3, "rescale": "norm"},
        {"damping": {"initial": 1.5, "target": 0.1, "epochs": 90, "warmup_epochs": 5}},
    ],
)
def test_what_the_schema_accepts_is_built(fields: dict[str, Any]) -> None:
    written = experiment.HyLo.model_validate({"name": "hylo", **fields}).model_dump()
    del written["name"]
    hylo = HyLo(models.mlp(), **written)
    assert hylo.diagnostics().method == {"hybrid": "kid"}.get(written["method"], written["method"])


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "sngd", "ratio": 0.5},
        {"method": "kid", "ratio": 0.5, "low_rank": 3},
        {"method": "kis", "switch": {}},
        {"method": "hybrid", "switch": {"windows": [[2, 1]]}},
        {"damping": {"initial": 0.1, "target": 1.0, "epochs": 9}},
        {"damping": {"initial": 1.0, "target": 0.1, "epochs": 2}},
        {"kl_clip": 0.0},
        {"share": 1.1},
    ],
    ids=str,
)
def test_both_refuse(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        experiment.HyLo.model_validate({"name": "hylo", **fields})
    with pytest.raises(ValueError, match=r"\w"):
        HyLo(models.mlp(), **fields)
