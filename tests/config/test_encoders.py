"""What experiments with encoders may say, and what is refused before anything is read."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from hpcsngd.config.catalogue import DATASETS, MODEL_TASKS
from hpcsngd.config.experiment import Data, Experiment


def experiment(data: dict[str, Any] | None = None, **fields: Any) -> Experiment:
    """Returns an experiment on a GLUE task with some fields changed."""
    given = {
        "description": "",
        "model": {"name": "encoder"},
        "data": {"name": "rte", "tokenizer": "bert", **(data or {})},
        "batch_size": 8,
        "epochs": 1,
        "optimizer": {"name": "adamw", "lr": 1e-5},
    }
    return Experiment.model_validate(given | fields)


SQUAD = {"name": "squad"}
ANSWERS = {"data": SQUAD, "task": "question_answering"}
NUMBERS = {"data": {"name": "stsb"}, "task": "regression", "loss": {"name": "mse"}}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        ANSWERS,
        NUMBERS,
        {"preconditioner": {"name": "kfac", "fisher": "mc"}},
        NUMBERS | {"preconditioner": {"name": "kfac", "fisher": "type-2"}},
        {"data": {"folds": {"count": 3, "index": 0}}},
        {"data": {"tokenizer": "/models/bert", "stage": {"to": "$TMPDIR"}}},
    ],
)
def test_these_fit_together(fields: dict[str, Any]) -> None:
    found = experiment(**fields)
    assert DATASETS[found.data.name].task == found.task
    assert found.task in MODEL_TASKS["encoder"]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"data": {"tokenizer": None}}, "data set rte needs tokenizer: the folder of an encoder"),
        ({"data": {"stage": {"to": "/tmp"}}}, "with stage, tokenizer must be an absolute path"),
        ({"data": {"doc_stride": 64}}, "doc_stride: not for data set rte"),
        ({"data": {"name": "cifar10"}}, "tokenizer: not for data set cifar10"),
        ({"data": {"augment": {"flip": True}}}, "augment.flip: not for data set rte"),
        (
            NUMBERS | {"data": {"name": "stsb", "folds": {"count": 3, "index": 0}}},
            "folds: not for data set stsb",
        ),
        ({"task": "regression"}, "data set rte is not for task regression"),
        ({"model": {"name": "resnet20"}}, "model resnet20 is not for task classification on text"),
        (NUMBERS | {"loss": {}}, "loss cross_entropy is not for task regression"),
        ({"loss": {"name": "mse"}}, "loss mse is not for task classification"),
        ({"loss": {"average": "tokens"}}, "loss.average: tokens is for targets that are words"),
        (ANSWERS | {"loss": {"label_smoothing": 0.1}}, "label_smoothing is not for task question_answering"),
        (
            ANSWERS | {"preconditioner": {"name": "kfac", "fisher": "mc"}},
            "fisher: empirical is the only one for task question_answering",
        ),
    ],
)
def test_these_do_not(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        experiment(**fields)


def test_every_data_set_for_encoders_asks_for_one() -> None:
    names = [
        name
        for name, facts in DATASETS.items()
        if facts.kind == "text" and facts.task in MODEL_TASKS["encoder"]
    ]
    assert len(names) == 11
    for name in names:
        with pytest.raises(ValidationError, match=f"data set {name} needs tokenizer"):
            Data(name=name)
        assert Data(name=name, tokenizer="bert").max_length is None
