"""Numbers that follow the world size: what is allowed, what they become, and where that is recorded."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from hpcsngd.config.expressions import evaluate
from hpcsngd.config.present import json_schema, leaves, text
from hpcsngd.config.resolve import amend, from_record, parse_set, resolve
from hpcsngd.errors import ConfigError

SITE = """\
description: test site
scheduler: {kind: local}
nodes: 2
ranks_per_node: 4
"""
EXPERIMENT = """\
description: test
model: {name: digits-cnn}
data: {name: digits}
batch_size: 1024 / world_size
epochs: 2
optimizer: {name: sgd, lr: 0.1 * world_size / 8}
preconditioner:
  {name: hylo, method: kis, refresh_every: 416 // world_size, ratio: "min(1, 3.2 / world_size)"}
schedule: {warmup_epochs: 1, warmup_start: 1 / world_size}
"""


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(SITE)
    (tmp_path / "e.yaml").write_text(EXPERIMENT)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("0.1 * world_size / 8", 0.4),
        ("-(world_size - 40) + 2", 10),
        ("world_size // 5", 6),
        ("world_size ** 0.5", 32**0.5),
        ("sqrt(2 * world_size)", 8),
        ("round(1000 / world_size)", 31),
        ("ceil(1000 / world_size) + floor(1.5)", 33),
        ("max(1, min(world_size, 7))", 7),
    ],
)
def test_values(expression: str, value: float) -> None:
    assert evaluate(expression, 32) == pytest.approx(value)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true') or world_size",
        "world_size.__class__",
        "open(world_size)",
        "[world_size][0]",
        "world_size if True else 1",
        "lambda: world_size",
        "world_size * nodes",
        "world_size % 7",
        "max(world_size, key=abs)",
        "'a' * world_size",
        "True * world_size",
        "world_size *",
        "1j * world_size",
        "world_size" + " + 1" * 100,
    ],
)
def test_anything_else_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"allowed|is not an expression|may have 200 characters"):
        evaluate(expression, 32)


@pytest.mark.parametrize(
    "expression",
    [
        "1 / (world_size - 32)",
        "9 ** 9 ** 9 ** world_size",
        "1e308 * world_size",
        "(1 - world_size) ** 0.5",
        "sqrt(-world_size)",
        "round(world_size, 0.5)",
        "min()  * world_size",
    ],
)
def test_what_has_no_value_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"for world_size 32"):
        evaluate(expression, 32)


def test_values_follow_the_ranks_of_the_run() -> None:
    small = resolve("s.yaml", "e.yaml", environment={}).experiment
    large = resolve("s.yaml", "e.yaml", [parse_set("nodes=8")], environment={}).experiment
    assert (small.optimizer.lr, large.optimizer.lr) == pytest.approx((0.1, 0.4))
    assert (small.batch_size, large.batch_size) == (128, 32)
    assert (small.schedule.warmup_start, large.schedule.warmup_start) == (1 / 8, 1 / 32)
    before, after = small.preconditioner, large.preconditioner
    assert before is not None
    assert after is not None
    assert (before.refresh_every, after.refresh_every) == (52, 13)  # type: ignore[union-attr]
    assert (before.ratio, after.ratio) == pytest.approx((0.4, 0.1))  # type: ignore[union-attr]


def test_the_record_holds_the_number_and_the_expression() -> None:
    resolved = resolve("s.yaml", "e.yaml", environment={})
    record = resolved.to_record()
    assert record["experiment"]["optimizer"]["lr"] == pytest.approx(0.1)
    assert record["expressions"]["experiment.optimizer.lr"] == "0.1 * world_size / 8"
    assert from_record(record) == resolved


def test_show_tells_expression_and_ranks() -> None:
    lines = text(leaves("s.yaml", "e.yaml", []), with_origins=True).splitlines()
    (line,) = [line for line in lines if line.startswith("experiment.optimizer.lr:")]
    assert line.split(maxsplit=2) == [
        "experiment.optimizer.lr:",
        "0.1",
        "# e.yaml:6: 0.1 * world_size / 8, with world_size 8",
    ]


def test_without_a_site_the_experiments_own_resources_count() -> None:
    sets = [parse_set("resources={nodes: 3, gpus_per_node: 4}"), parse_set("batch_size=8")]
    (lr,) = [leaf for leaf in leaves(None, "e.yaml", sets) if leaf.path == "experiment.optimizer.lr"]
    assert lr.value == pytest.approx(0.15)


def test_a_run_done_again_on_other_ranks_gets_other_numbers_and_a_resumed_one_does_not() -> None:
    resolved = resolve("s.yaml", "e.yaml", environment={})
    more = [parse_set("resources.nodes=4")]
    assert amend(resolved, more, anew=True).experiment.optimizer.lr == pytest.approx(0.2)
    resumed = amend(resolved, more)
    assert resumed.experiment.optimizer.lr == pytest.approx(0.1)
    assert resumed.expressions == resolved.expressions


def test_a_number_in_place_of_an_expression_forgets_it() -> None:
    resolved = resolve("s.yaml", "e.yaml", environment={})
    changed = amend(resolved, [parse_set("optimizer.lr=3")])
    assert "experiment.optimizer.lr" not in changed.expressions
    assert amend(changed, [parse_set("nodes=4")], anew=True).experiment.optimizer.lr == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lr=0.1 * world_sise", "should be a valid number"),
        ("optimizer.lr=0.1 - world_size", "should be greater than 0"),
        ("optimizer.lr=exec(world_size)", "is not allowed in an expression"),
        ("preconditioner.refresh_every=100 / world_size", "should be a valid integer"),
        ("epochs=world_size", "should be a valid integer"),
    ],
)
def test_mistakes_name_file_and_key(change: str, message: str) -> None:
    key = change.partition("=")[0]
    with pytest.raises(ConfigError, match=message) as error:
        resolve("s.yaml", "e.yaml", [parse_set(change)], environment={})
    assert str(error.value).startswith(f"--set {key}: {key}: ")


def test_the_schema_for_editors_takes_both() -> None:
    base = {
        "description": "x",
        "model": {"name": "digits-cnn"},
        "data": {"name": "digits"},
        "batch_size": 1,
        "epochs": 1,
    }
    schema = json_schema("experiment")
    for lr in (0.1, "0.1 * world_size"):
        jsonschema.validate(base | {"optimizer": {"name": "sgd", "lr": lr}}, schema)
    for lr in (-0.1, "fast"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(base | {"optimizer": {"name": "sgd", "lr": lr}}, schema)
