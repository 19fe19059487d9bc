"""The experiments in jobs/ say what they should, and the tables of jobs/README.md are theirs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hpcsngd.config import matrix
from hpcsngd.config.experiment import KFAC, Experiment, HyLo
from hpcsngd.config.present import experiments
from hpcsngd.config.resolve import load_experiment, resolve
from hpcsngd.optim.kfac_variants import VARIANTS
from hpcsngd.resources import named_files

ROOT = Path(__file__).parents[1]
README = (ROOT / "jobs" / "README.md").read_text()
NAMES = list(named_files("jobs"))
MIST = {"MIST_ACCOUNT": "none", "SCRATCH": "/scratch/none"}

#: What the published scripts say, on the ranks that they were made for: key path -> value.
PUBLISHED: dict[str, dict[str, Any]] = {
    "resnet32-hylo": {
        "epochs": 100,
        "batch_size": 128,
        "optimizer.lr": 1.8,
        "optimizer.weight_decay": 4.5e-4,
        "preconditioner.damping.initial": 1.5,
        "preconditioner.damping.target": 0.1,
        "preconditioner.refresh_every": 13,
        "preconditioner.ratio": 0.1,
        "schedule.milestones": [35, 75, 90],
        "schedule.gamma": 0.3,
        "schedule.warmup_epochs": 5,
        "ranks": 32,
    },
    "resnet32-kfac": {
        "optimizer.lr": 0.07 * 32,
        "optimizer.weight_decay": 8e-5,
        "preconditioner.factor_every": 1,
        "preconditioner.inverse_every": 13,
        "schedule.gamma": 0.1,
    },
    "resnet32-sgd": {"optimizer.lr": 3.2, "optimizer.weight_decay": 5e-4, "preconditioner": None},
    "resnet50-hylo": {
        "epochs": 55,
        "batch_size": 80,
        "optimizer.lr": 4,
        "optimizer.weight_decay": 2.5e-5,
        "preconditioner.damping.initial": 4,
        "preconditioner.damping.target": 0.04,
        "preconditioner.refresh_every": 200,
        "schedule.milestones": [25, 35, 40, 45, 50],
        "ranks": 64,
    },
    "resnet50-kfac": {
        "epochs": 60,
        "optimizer.lr": 2,
        "preconditioner.factor_every": 20,
        "preconditioner.inverse_every": 200,
        "preconditioner.grad_worker_fraction": 0.5,
    },
    "unet-hylo": {
        "epochs": 50,
        "batch_size": 16,
        "optimizer.lr": 8e-4,
        "preconditioner.damping": 0.03,
        "preconditioner.refresh_every": 200,
        "schedule.warmup_epochs": 10,
        "data.validation_patients": 10,
        "ranks": 4,
    },
    "densenet-cifar100-sngd": {
        "epochs": 60,
        "optimizer.lr": 0.05,
        "preconditioner.damping": 0.2,
        "preconditioner.refresh_every": 100,
        "schedule.milestones": [30, 45],
        "ranks": 1,
    },
    "fashion-mnist-sngd": {
        "epochs": 10,
        "optimizer.lr": 0.003,
        "preconditioner.damping": 0.3,
        "preconditioner.refresh_every": 100,
        "ranks": 1,
    },
    "resnet110-cifar10-kfac": {
        "epochs": 100,
        "optimizer.lr": 0.4,
        "preconditioner.damping": 0.03,
        "preconditioner.inverse_every": 1,
        "schedule.milestones": [35, 75, 90],
    },
    "vgg16-cifar100-kfac": {"optimizer.lr": 0.4, "schedule.milestones": [35, 65, 80, 90]},
    "resnet50-imagenet-kfac": {
        "epochs": 55,
        "batch_size": 32,
        "optimizer.lr": 0.8,
        "preconditioner.damping.initial": 0.002,
        "schedule.warmup_epochs": 5,
        "ranks": 64,
    },
    "resnet20-cifar10-sparse-mfac": {
        "epochs": 164,
        "optimizer.lr": 1e-3,
        "preconditioner.num_grads": 1024,
        "preconditioner.density": 0.01,
        "preconditioner.damping": 1e-4,
        "schedule.milestones": [82, 123],
    },
    "resnet18-imagenet-sparse-mfac": {
        "epochs": 88,
        "batch_size": 1024,
        "optimizer.lr": 1e-3,
        "preconditioner.damping": 1e-7,
        "data.size": 160,
    },
    "ptb-lstm-sgd": {
        "epochs": 39,
        "batch_size": 20,
        "data.stream.length": 35,
        "optimizer.lr": 1,
        "clip_norm": 5,
        "schedule.gamma": 1 / 1.2,
        "schedule.milestones": list(range(6, 39)),
        "model.args": {"width": 650, "hidden": 650, "layers": 2, "dropout": 0.5, "init": 0.05},
    },
    "multi30k-transformer-adam": {
        "epochs": 200,
        "batch_size": 128,
        "optimizer.lr": 0.5 / (512 * 4000) ** 0.5,
        "optimizer.betas": (0.9, 0.98),
        "schedule.warmup_steps": 4000,
        "loss.label_smoothing": 0.1,
        "decoding.beam": 5,
    },
    "multi30k-transformer-kfac": {
        "optimizer.lr": 1e-6,
        "loss.average": "none",
        "preconditioner.damping": 0.03,
        "preconditioner.factors": "local",
        "preconditioner.inverse_every": 1,
    },
    "wikitext2-lstm-kfac": {
        "epochs": 40,
        "batch_size": 20,
        "optimizer.lr": 20,
        "preconditioner.damping": 0.002,
        "preconditioner.inverse_every": 10,
    },
    "wikitext2-transformer-kfac": {"optimizer.lr": 1, "clip_norm": 0.5, "schedule.kind": "plateau"},
    "squad-bert-adamw": {"epochs": 3, "batch_size": 8, "optimizer.lr": 5e-5, "data.max_length": 384},
    "squad-bert-kfac": {
        "epochs": 3,
        "batch_size": 4,
        "eval_batch_size": 8,
        "optimizer.lr": 5e-6 * 8,
        "preconditioner.damping": 0.03,
        "preconditioner.factor_every": 1,
        "preconditioner.inverse_every": 1,
        "preconditioner.factors": "local",
        "data.doc_stride": 128,
        "ranks": 8,
    },
    "squadv2-bert-sparse-mfac": {
        "epochs": 2,
        "optimizer.lr": 3e-5,
        "preconditioner.damping": 5e-5,
        "preconditioner.num_grads": 1024,
        "preconditioner.density": 0.01,
        "clip_norm": 1,
    },
    "mnli-bert-sparse-mfac": {
        "epochs": 3,
        "batch_size": 32,
        "optimizer.lr": 2e-5,
        "preconditioner.damping": 5e-5,
        "preconditioner.num_grads": 1024,
        "preconditioner.density": 0.01,
        "data.max_length": 128,
        "clip_norm": 1,
    },
    "logreg-sparse-ggt": {
        "epochs": 10,
        "optimizer.lr": 1,
        "preconditioner.num_grads": 100,
        "preconditioner.eps": 1e-5,
        "preconditioner.beta2": 1,
    },
}


def value_at(experiment: Experiment, path: str) -> Any:
    found: Any = experiment.model_dump()
    for part in path.split("."):
        found = found[part]
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name: str) -> None:
    cells = matrix.resolve("mist", name, environment=MIST)
    resolved = cells.cells[0].resolved if cells else resolve("mist", name, environment=MIST)
    for path, expected in PUBLISHED[name].items():
        found = resolved.world_size if path == "ranks" else value_at(resolved.experiment, path)
        assert found == (pytest.approx(expected) if isinstance(expected, float) else expected), path


@pytest.mark.parametrize("name", NAMES)
def test_each_says_whose_settings_it_has(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.paper
    assert experiment.reference
    if not experiment.paper.startswith("this repository"):
        assert experiment.corrections


@pytest.mark.parametrize("name", NAMES)
def test_each_says_which_convolutions_and_damping_it_uses(name: str) -> None:
    experiment = load_experiment(name)
    method, words = experiment.preconditioner, " ".join(experiment.corrections)
    if experiment.paper.startswith("this repository") or method is None:
        return
    if isinstance(method, HyLo):
        assert f"conv_mode {method.conv_mode}" in words
        assert "conv_mode" in method.model_fields_set
    if isinstance(method, KFAC):
        assert f"sharing {method.sharing}" in words
        assert "sharing" in method.model_fields_set
    assert "damping" in words


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.startswith(("resnet", "unet", "densenet", "fashion-mnist-sngd"))]
)
def test_what_keeps_the_published_scaling_has_a_corrected_sibling(name: str) -> None:
    method = load_experiment(name).preconditioner
    if not isinstance(method, HyLo) or method.conv_mode != "paper":
        return
    sibling = load_experiment(f"{name}-reduce")
    assert isinstance(sibling.preconditioner, HyLo)
    assert sibling.preconditioner.conv_mode == "reduce"
    assert sibling.preconditioner.damping != method.damping
    # where the number comes from; tests/test_benchmarks_damping.py holds it against the study
    assert re.search(r"damping.* tuned .*benchmarks/", " ".join(sibling.corrections))


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(("-hylo", "-sngd"))])
def test_each_has_its_baselines(name: str) -> None:
    base = {"fashion-mnist-sngd": "fashion-mnist-wide"}.get(
        name, name.removesuffix("-hylo").removesuffix("-sngd")
    )
    for baseline in ("sgd", "kfac"):
        assert f"{base}-{baseline}" in NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if load_experiment(name).matrix.get("include")])
def test_the_four_variants_are_those_of_the_optimizer(name: str) -> None:
    if not name.endswith("-kfac"):
        return
    found = matrix.resolve("mist", name, environment=MIST)
    assert found is not None
    keys = next(iter(VARIANTS.values()))
    cells = [value_at(cell.resolved.experiment, "preconditioner") for cell in found.cells]
    variants = [{key: cell[key] for key in keys} for cell in cells]
    assert sorted(map(str, variants)) == sorted(str(dict(variant)) for variant in VARIANTS.values())


def test_the_study_of_accuracy_has_the_settings_of_the_single_files() -> None:
    study = matrix.resolve("mist", "study-accuracy-time", environment=MIST)
    assert study is not None
    names = ("resnet32-hylo", "resnet32-hylo-reduce", "resnet32-kfac", "resnet32-sgd")
    expected = [resolve("mist", name, environment=MIST).experiment for name in names]
    cells = [cell.resolved.experiment for cell in study.cells]
    assert [cell.seed for cell in cells] == [1, 2, 3] * len(names)
    for one, three in zip(expected, [cells[i : i + 3] for i in range(0, 12, 3)], strict=True):
        for cell in three:
            for part in ("model", "data", "optimizer", "preconditioner", "schedule", "batch_size", "epochs"):
                assert getattr(cell, part) == getattr(one, part), part


def test_the_ranks_of_the_timing_study_are_those_of_the_figure() -> None:
    study = matrix.resolve("mist", "study-timing-ranks", environment=MIST)
    assert study is not None
    assert sorted({cell.resolved.world_size for cell in study.cells}) == [8, 16, 32, 64]


def test_the_batches_of_the_rank_study_are_global_ones() -> None:
    study = matrix.resolve("mist", "study-rank-analysis", environment=MIST)
    assert study is not None
    found = [cell.resolved.experiment.batch_size * cell.resolved.world_size for cell in study.cells]
    assert found == [512, 1024, 2048, 4096]


def rows(heading: str) -> list[list[str]]:
    """Returns the cells of the README's table below a heading, without its two first lines."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_readme_lists_every_experiment_with_its_facts() -> None:
    expected = [
        [
            f"`{row['name']}`",
            row["paper"],
            row["model"],
            row["data"],
            row["method"],
            f"{row['ranks']} x {row['batch_size']}",
        ]
        for row in experiments()
    ]
    assert rows("All of them") == expected


def test_the_readme_has_every_published_number_and_how_to_reproduce_it() -> None:
    expected = [
        [f"`{name}`", result.what, result.value, result.source, result.reproduce]
        for name in NAMES
        for result in load_experiment(name).published
    ]
    assert rows("Published numbers") == expected
    assert len(expected) >= 8


def test_how_to_reproduce_names_experiments_that_exist() -> None:
    named = re.findall(r"--exp ([\w-]+)", README)
    assert len(named) > 8
    assert set(named) - {"NAME", "X"} <= set(NAMES)
