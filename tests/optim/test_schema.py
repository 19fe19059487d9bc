"""What experiments may write is what HyLo takes, with the same defaults and the same refusals."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from pydantic import ValidationError

from hpcsngd.config import experiment
from hpcsngd.optim import GGT, KFAC, MFAC, DampingDecay, DampingSteps, HyLo, SwitchRule
from tests.optim import models

#: Given by training itself, or a function that YAML cannot write.
NOT_WRITTEN = {"self", "model", "loss_reduction", "accumulation_steps", "dtype", "seed", "communicator"}
NOT_WRITTEN |= {"profile", "observe", "rank_shares", "loss", "parameters"}


@pytest.mark.parametrize(
    ("schema", "built", "others"),
    [
        (experiment.HyLo, HyLo.__init__, {"refresh_every"}),
        (experiment.KFAC, KFAC.__init__, {"factor_every", "inverse_every"}),
        (experiment.MFAC, MFAC.__init__, set()),
        (experiment.GGT, GGT.__init__, set()),
        (experiment.Switch, SwitchRule.__init__, set()),
        (experiment.DampingDecay, DampingDecay.__init__, set()),
        (experiment.DampingSteps, DampingSteps.__init__, set()),
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
        {"damping": {"initial": 0.002, "factor": 0.5, "milestones": [40, 80]}},
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


@pytest.mark.parametrize(
    ("schema", "build", "fields"),
    [
        (experiment.MFAC, MFAC, {"storage": "sparse", "entries": "bf16+int16", "early": "error"}),
        (experiment.MFAC, MFAC, {"storage": "lowrank", "low_rank": 2, "scale_rule": "count"}),
        (experiment.GGT, GGT, {"storage": "sparse", "beta1": 0.0, "beta2": 1.0, "skip": ["^0$"]}),
    ],
)
def test_what_the_window_schemas_accept_is_built(schema: Any, build: Any, fields: dict[str, Any]) -> None:
    written = schema.model_validate({"name": build.__name__.lower(), **fields}).model_dump()
    del written["name"]
    assert build(models.mlp(), **written).capacity == written["num_grads"]


@pytest.mark.parametrize(
    ("schema", "build", "fields"),
    [
        (experiment.MFAC, MFAC, {"num_grads": 0}),
        (experiment.MFAC, MFAC, {"storage": "sparse", "density": 0.0}),
        (experiment.MFAC, MFAC, {"damping": 0.0}),
        (experiment.GGT, GGT, {"beta1": 0.9, "beta2": 0.5}),
        (experiment.GGT, GGT, {"eps": 0.0}),
    ],
)
def test_both_refuse_for_windows(schema: Any, build: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        schema.model_validate({"name": build.__name__.lower(), **fields})
    with pytest.raises(ValueError, match=r"\w"):
        build(models.mlp(), **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"inverse": "cholesky", "pi_split": False, "sharing": "reduce", "kl_clip": 1e-3, "rescale": "norm"},
        {"fisher": "mc", "mc_samples": 4, "factor_dtype": "bfloat16", "inverse_dtype": "float32"},
        {"damping": {"initial": 0.3, "target": 0.03, "epochs": 20}, "skip": ["^0$"], "largest_factor": 100},
        {"factors": "local", "grad_worker_fraction": 0.0, "placement_cost": "memory", "inverse_every": 0},
        {"stagger": True, "colocate": False},
    ],
)
def test_what_the_kfac_schema_accepts_is_built(fields: dict[str, Any]) -> None:
    written = experiment.KFAC.model_validate({"name": "kfac", **fields}).model_dump()
    del written["name"]
    kfac = KFAC(models.mlp(), **written)
    assert kfac.diagnostics().method == written["inverse"]


@pytest.mark.parametrize(
    "fields",
    [
        {"mc_samples": 4},
        {"pi_split": False},
        {"factors": "local", "colocate": False},
        {"factor_decay": 1.0},
        {"factor_every": -1},
        {"damping": 0.0},
        {"largest_factor": 0},
        {"grad_worker_fraction": 1.5},
    ],
    ids=str,
)
def test_both_refuse_for_kfac(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        experiment.KFAC.model_validate({"name": "kfac", **fields})
    with pytest.raises(ValueError, match=r"\w"):
        KFAC(models.mlp(), **fields)
