"""Whole runs on GLUE and SQuAD, their evaluation on several ranks, and what is said of partial folders."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsngd import dist
from hpcsngd.config import experiment as schema
from hpcsngd.config.catalogue import SMALL_ENCODER
from hpcsngd.rundir import RunDir
from hpcsngd.train import data
from hpcsngd.train.faults import MissingDataError
from hpcsngd.train.sampler import EvaluationSampler
from hpcsngd.train.tasks import Evaluated
from hpcsngd.train.text.encoder_tasks import Labelling, Regression, SpanAnswers
from hpcsngd.train.text.squad import Question
from hpcsngd.train.text.windows import Window, Windows
from tests.ranks import run_on_ranks
from tests.train.runs import HYLO, assert_same_weights, make_run, rows, train
from tests.train.test_session import finished, request_stop_at

ADAMW = "{name: adamw, lr: 0.003, weight_decay: 0.01, no_decay: [LayerNorm, bias$]}"


def text_run(folder: Path, root: Path, name: str, **settings: Any) -> RunDir:
    common = {
        "data": f"{{name: {name}, root: {root}, tokenizer: {SMALL_ENCODER}, max_length: 32}}",
        "model": "{name: encoder, args: {weights: random, initializer_range: 0.3}}",
        "optimizer": ADAMW,
        "schedule": "{kind: linear, warmup_epochs: 1}",
        "clip_norm": "1",
        "batch_size": "8",
        "epochs": "8",
    }
    return make_run(folder, **(common | settings))


def test_classes_of_text_are_learned_and_scored_for_both_sets(root: Path, tmp_path: Path) -> None:
    run = text_run(tmp_path, root, "mnli", epochs="12")
    assert train(run)
    losses = [row["loss"] for row in rows(run, "train")]
    assert losses[-1] < losses[0] - 0.3
    evaluated = [(row["split"], row["count"]) for row in rows(run, "eval")]
    assert sorted(set(evaluated)) == [("validation", 16), ("validation_mismatched", 16)]
    result = finished(run)
    assert result["validation_accuracy"] > 0.6
    assert result["validation_mismatched_accuracy"] > 0.6


def test_numbers_of_text_are_learned_and_resumed_bit_for_bit(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"task": "regression", "loss": "{name: mse}", **HYLO, "preconditioner.rescale": "norm"}
    whole, parted = (text_run(tmp_path, root, "stsb", **settings) for _ in range(2))
    assert train(whole)
    with monkeypatch.context() as patch:
        request_stop_at(patch, 21)
        assert not train(parted)
    assert train(parted, attempt=2)
    assert_same_weights(whole, parted)
    for table in ("eval", "scores"):
        assert rows(whole, table) == rows(parted, table)
    losses = [row["loss"] for row in rows(whole, "train")]
    assert losses[-1] < losses[0] - 2
    assert all(math.isnan(row["accuracy"]) for row in rows(whole, "train"))
    last = {row["metric"]: row["value"] for row in rows(whole, "scores")[-2:]}
    assert last["spearman"] == finished(whole)["validation_accuracy"]
    assert set(last) == {"spearman", "pearson"}


def test_kfac_of_drawn_targets_works_on_text(root: Path, tmp_path: Path) -> None:
    kfac = "{name: kfac, fisher: mc, damping: 0.1, factor_every: 2, inverse_every: 4, rescale: norm}"
    settings = {"preconditioner": kfac, "diagnostics": "{strength: true}", "epochs": "2"}
    classes = text_run(tmp_path, root, "cola", **settings)
    numbers = text_run(tmp_path, root, "stsb", **settings, task="regression", loss="{name: mse}")
    for run in (classes, numbers):
        assert train(run)
        found = {row["layer"]: row["strength"] for row in rows(run, "strength")}
        assert len(found) == 22
        assert found["network.classifier"] > 0.1


def test_answers_are_learned(root: Path, tmp_path: Path) -> None:
    settings = {"task": "question_answering", "epochs": "6", "data.doc_stride": "8"}
    run = text_run(tmp_path, root, "squadv2", **settings)
    assert train(run)
    losses = [row["loss"] for row in rows(run, "train")]
    assert losses[-1] < losses[0] - 1
    names = ["exact_match", "f1"] + [
        f"{kind}_{score}" for kind in ("has_answer", "no_answer") for score in ("exact_match", "f1")
    ]
    assert {row["metric"] for row in rows(run, "scores")} == set(names)
    result = finished(run)
    assert result["validation_accuracy"] == result["validation_f1"] > 0.2
    split = data.load(schema.Data.model_validate(_settings("squadv2")), str(root)).test
    assert rows(run, "eval")[-1]["count"] == len(split) > 16


def _settings(name: str) -> dict[str, Any]:
    return {"name": name, "tokenizer": SMALL_ENCODER, "max_length": 32} | (
        {"doc_stride": 8} if name.startswith("squad") else {}
    )


def evaluate_labels() -> Evaluated:
    """Returns the evaluation of 11 texts, whose outputs follow from their indices, on these ranks."""
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(11, 2, generator=generator), torch.arange(11) % 2
    evaluation = Labelling(2, 0.1, ("accuracy", "f1", "matthews"), 11).evaluation(torch.device("cpu"))
    for indices in EvaluationSampler(11, 2, rank=dist.rank(), ranks=dist.world_size()):
        evaluation.add(indices, outputs[indices], targets[indices])
    return evaluation.result()


def evaluate_numbers() -> Evaluated:
    """The same with numbers."""
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(2, 11, generator=generator)
    evaluation = Regression(("spearman", "pearson"), 11).evaluation(torch.device("cpu"))
    for indices in EvaluationSampler(11, 2, rank=dist.rank(), ranks=dist.world_size()):
        evaluation.add(indices, outputs[indices].unsqueeze(1), targets[indices])
    return evaluation.result()


def windows() -> Windows:
    """Returns seven windows of four questions, of which the last has no answer."""
    context = "one two six ten"
    spans = [(-1, -1), (0, 3), (4, 7), (8, 11), (12, 15), (-1, -1)]
    answers = [[("one", 0)], [("two six", 4)], [("ten", 12)], []]
    questions = [Question(f"q{i}", "which?", context, found) for i, found in enumerate(answers)]
    made = [Window(number, [1] * 6, [0] * 6, spans, 0) for number in (0, 0, 1, 2, 2, 2, 3)]
    return Windows(Path(), questions, made, length=8, padding=0)


def evaluate_answers() -> Evaluated:
    """Returns the evaluation of `windows` by logits that say, in turn, right, too long, wrong and nothing."""
    part = windows()
    outputs = torch.zeros(7, 2, 8)
    #      window: first, last, height
    for index, (first, last, height) in enumerate(
        [(1, 1, 3), (2, 2, 1), (2, 4, 3), (0, 0, 9), (1, 1, 2), (0, 0, 9), (0, 0, 5)]
    ):
        outputs[index, 0, first] = outputs[index, 1, last] = height
    evaluation = SpanAnswers(part, may_be_none=True).evaluation(torch.device("cpu"))
    groups = list(part.groups.values())
    targets = torch.zeros(7, 2, dtype=torch.int64)
    for indices in EvaluationSampler(7, 2, rank=dist.rank(), ranks=dist.world_size(), groups=groups):
        evaluation.add(indices, outputs[indices], targets[indices])
    return evaluation.result()


def test_answers_are_merged_over_the_windows_of_a_question() -> None:
    found = evaluate_answers()
    # "one" is right; "two six ten" has two words of three and misses none; "one" is wrong; nothing is right
    f1 = (1, 2 * (2 / 3) * 1 / (2 / 3 + 1), 0, 1)
    assert found.scores["exact_match"] == 2 / 4
    assert found.scores["f1"] == pytest.approx(sum(f1) / 4, rel=1e-6)
    assert found.scores["has_answer_exact_match"] == 1 / 3
    assert found.scores["has_answer_f1"] == pytest.approx(sum(f1[:3]) / 3, rel=1e-6)
    assert (found.scores["no_answer_exact_match"], found.scores["no_answer_f1"]) == (1, 1)
    assert found.sums.count == 7
    assert found.sums.accuracy == pytest.approx(found.scores["f1"])


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_example_counts_once_on_any_number_of_ranks(ranks: int) -> None:
    alone = evaluate_everything()
    for results in run_on_ranks(evaluate_everything, ranks):
        for found, expected in zip(results, alone, strict=True):
            assert found.scores == expected.scores
            assert found.sums.count == expected.sums.count
            assert found.sums.loss == pytest.approx(expected.sums.loss, rel=1e-6)


def evaluate_everything() -> list[Evaluated]:
    return [evaluate_labels(), evaluate_numbers(), evaluate_answers()]


@pytest.mark.parametrize(
    ("name", "removed", "problem"),
    [
        ("mnli", "MNLI/dev_mismatched.tsv", r"MNLI lacks dev_mismatched\.tsv$"),
        ("cola", "CoLA/train.tsv", r"CoLA lacks train\.tsv$"),
        ("squad", "squad-v1.1/dev-v1.1.json", r"squad-v1\.1 lacks dev-v1\.1\.json$"),
        ("squadv2", "squad-v2.0", r"no squadv2 below the data root .*: put train-v2\.0\.json and dev-v2"),
        ("rte", "RTE", r"no rte below the data root .*: unpack GLUE's RTE below the data root"),
        ("rte", f"{SMALL_ENCODER}/config.json", r"tiny-bert lacks config\.json$"),
        ("rte", SMALL_ENCODER, r"no folder .*tiny-bert \(data\.tokenizer\)"),
    ],
)
def test_partial_folders_are_named(name: str, removed: str, problem: str, root: Path, tmp_path: Path) -> None:
    copied = tmp_path / "data"
    shutil.copytree(root, copied)
    target = copied / removed
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    with pytest.raises(MissingDataError, match=problem):
        data.load(schema.Data.model_validate(_settings(name)), str(copied))


def test_data_without_a_root_are_asked_for() -> None:
    with pytest.raises(MissingDataError, match=r"no qnli below the data root None: unpack GLUE's QNLI"):
        data.load(schema.Data.model_validate(_settings("qnli")), None)


@pytest.mark.parametrize("name", ["sst2", "qqp", "squad"])
def test_limits_and_folds_take_whole_examples(name: str, root: Path) -> None:
    settings = _settings(name) | {"train_limit": 10, "test_limit": 5}
    splits = data.load(schema.Data.model_validate(settings), str(root))
    assert (len(splits.train), len(splits.test), splits.evaluated) == (10, 5, "validation")
    tokens, targets = splits.train[list(range(10))]
    assert tokens.shape == (10, 3, 32)
    assert len(targets) == 10
    if name != "squad":
        folds = {"folds": {"count": 4, "index": 1}}
        parted = data.load(schema.Data.model_validate(_settings(name) | folds), str(root))
        assert (len(parted.train), len(parted.test)) == (36, 12)
