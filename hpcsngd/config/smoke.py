"""Any experiment at a size that two CPU cores finish in seconds, to see that it starts, trains and resumes.

What is kept is the method: task, model family, optimizer, preconditioner with its variant, schedule, loss and
diagnostics. What shrinks is size: two epochs of a tiny data set of the true format, two ranks, narrow layers,
small images, periods of two steps. Nothing can be learned from the numbers of such a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hpcsngd.config.catalogue import DATASETS, SMALL_ARGS, SMALL_ENCODER, TORCHVISION_PREFIX
from hpcsngd.config.experiment import GGT, KFAC, LBFGS, MFAC, DampingSteps, Data, Experiment, HyLo, Muon
from hpcsngd.config.resolve import Override, Resolved, amend

ORIGIN = "--smoke"
EPOCHS = 2
RANKS = 2
SAMPLES = {"train_limit": 32, "test_limit": 16}
"""Two steps of the two ranks, and one evaluation; all there are where a step is a file."""
LENGTH = 8
"""Tokens of a sample of a text."""

_BATCH = 8
_PIXELS = 32
_WIDTH = 4
_PERIOD = 2
_WINDOW = 4
_LARGEST_FACTOR = 300
_LR = 1e-3
# torchvision's networks of bottlenecks; its others have no argument for their width
_NARROWED = tuple(f"{TORCHVISION_PREFIX}resnet{depth}" for depth in (50, 101, 152))


def scaled_down(resolved: Resolved, data_root: str) -> Resolved:
    """Returns a configuration at its smallest size, under a name that tells it from the real one.

    What was set on the command line stays as it was set; expressions follow the ranks that there are now.

    Args:
        resolved: the experiment on any site.
        data_root: folder with the tiny data set.

    Raises:
        ConfigError: the command line's own settings do not fit the small size.
    """
    changes = [
        change
        for change in overrides(resolved.experiment, data_root)
        if not resolved.origins.get(change.path, "").startswith("--")
    ]
    return replace(amend(resolved, changes, anew=True), exp_name=f"{resolved.exp_name}-smoke")


def overrides(experiment: Experiment, data_root: str) -> list[Override]:
    """Returns what makes an experiment small; its site is left alone."""
    settings = {
        "epochs": EPOCHS,
        "batch_size": _BATCH,
        "eval_batch_size": _BATCH,
        "accumulate": min(experiment.accumulate, 2),
        "precision": "fp32",
        "checkpoint.every_epochs": 1,
        "checkpoint.every_steps": None,
        "diagnostics.log_every": 1,
        "resources.nodes": 1,
        "resources.gpus_per_node": 0,
        "resources.ranks_per_node": RANKS,
        "resources.walltime": "30m",
        **_model(experiment.model.name),
        **dict(_data(experiment.data, data_root)),
        **({"data.train_limit": None} if getattr(experiment.optimizer, "batches", "") == "file" else {}),
        **dict(_optimizer(experiment)),
        **dict(_schedule(experiment)),
        **({"decoding.beam": 2, "decoding.max_words": 8} if experiment.task == "translation" else {}),
        **dict(_preconditioner(experiment)),
        **dict(_server(experiment)),
    }
    return [Override(f"experiment.{path}", value, ORIGIN) for path, value in settings.items()]


def _server(experiment: Experiment) -> Iterator[tuple[str, Any]]:
    """Yields what one worker beside a parameter server can do; what it does can be repeated bit for bit."""
    settings = experiment.parameter_server
    if settings is None:
        return
    yield "parameter_server.replay", None
    if settings.delay is not None and settings.delay.slow_worker is not None:
        yield "parameter_server.delay.slow_worker", 1


def _model(name: str) -> dict[str, Any]:
    if name in SMALL_ARGS:
        return {f"model.args.{key}": value for key, value in SMALL_ARGS[name].items()}
    if not name.startswith(TORCHVISION_PREFIX):
        return {} if name == "linear" else {"model.args.width": _WIDTH}
    return {"model.args.width_per_group": _WIDTH} if name in _NARROWED else {}


def _data(data: Data, root: str) -> Iterator[tuple[str, Any]]:
    facts = DATASETS[data.name]
    yield "data.workers", 0
    if facts.task == "language_modelling":
        # the text is as long as two steps of the two ranks
        yield "data.stream.length", LENGTH
    else:
        yield from ((f"data.{limit}", count) for limit, count in SAMPLES.items())
    if data.folds is not None:
        # so few samples make two folds, and still a step of the two ranks
        yield "data.train_limit", SAMPLES["train_limit"] + SAMPLES["test_limit"]
        yield "data.folds.count", 2
        yield "data.folds.index", min(data.folds.index, 1)
    if facts.task == "translation":
        yield "data.translation.min_count", 1
    if not facts.needs_root:
        return
    yield from {"data.root": root, "data.download": False, "data.stage": None}.items()
    if data.tokenizer is not None:
        # two windows for most paragraphs
        yield from {"data.tokenizer": SMALL_ENCODER, "data.max_length": _PIXELS}.items()
    if facts.task == "question_answering":
        yield "data.doc_stride", LENGTH
    if facts.resizes:
        yield "data.size", _PIXELS
    if data.eval_size is not None:
        yield "data.eval_size", _PIXELS
    if data.resolution is not None:
        growth = {"start": _PIXELS, "end": 2 * _PIXELS, "first_epoch": 0, "last_epoch": EPOCHS - 1}
        yield from ((f"data.resolution.{key}", value) for key, value in growth.items())
    if data.validation_patients is not None:
        yield "data.validation_patients", 1


def _optimizer(experiment: Experiment) -> Iterator[tuple[str, Any]]:
    if isinstance(experiment.optimizer, LBFGS):
        yield "optimizer.iterations", min(experiment.optimizer.iterations, _PERIOD)
        if experiment.optimizer.line_search == "strong_wolfe":
            return  # a search that begins with a tiny step takes many evaluations to widen it
    # batches this small would make the real rates diverge
    yield "optimizer.lr", min(experiment.optimizer.lr, _LR)
    if isinstance(experiment.optimizer, Muon):
        yield "optimizer.adamw_lr", min(experiment.optimizer.adamw_lr, _LR)


def _schedule(experiment: Experiment) -> Iterator[tuple[str, Any]]:
    shrinks = EPOCHS / experiment.epochs
    yield "schedule.warmup_epochs", experiment.schedule.warmup_epochs * shrinks
    if experiment.schedule.kind == "inverse_sqrt":
        yield "schedule.warmup_steps", 2
    yield "schedule.milestones", [epoch * shrinks for epoch in experiment.schedule.milestones]


def _preconditioner(experiment: Experiment) -> Iterator[tuple[str, Any]]:
    method = experiment.preconditioner
    for path, value in _small(method):
        yield f"preconditioner.{path}", value
    damping = getattr(method, "damping", None)
    if isinstance(damping, DampingSteps):
        shrunk = [epoch * EPOCHS / experiment.epochs for epoch in damping.milestones]
        yield "preconditioner.damping.milestones", shrunk


def _small(method: HyLo | KFAC | MFAC | GGT | None) -> Iterator[tuple[str, Any]]:
    match method:
        case HyLo():
            yield "refresh_every", min(method.refresh_every, _PERIOD)
            if method.switch is not None and method.switch.windows is not None:
                yield "switch.windows", [[0, 1]]
        case KFAC():
            yield "factor_every", min(method.factor_every, 1)
            yield "inverse_every", min(method.inverse_every, _PERIOD)
            yield "largest_factor", min(method.largest_factor or _LARGEST_FACTOR, _LARGEST_FACTOR)
        case MFAC() | GGT():
            yield "num_grads", min(method.num_grads, _WINDOW)
