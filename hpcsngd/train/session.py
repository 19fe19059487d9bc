"""One attempt of a run, from its configuration to its result: builds the parts and starts the loop."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from hpcsngd import dist, rundir
from hpcsngd.config import experiment as schema
from hpcsngd.config import resolve
from hpcsngd.config.experiment import Experiment
from hpcsngd.optim.lbfgs import LBFGS
from hpcsngd.rundir import RunDir
from hpcsngd.tables import TABLES
from hpcsngd.train import data, devices, models, optimizers, seeds, tasks
from hpcsngd.train.checkpoint import Checkpoints, Loaded
from hpcsngd.train.faults import SettingError
from hpcsngd.train.layers import layer_rows
from hpcsngd.train.loop import Parts, Trainer
from hpcsngd.train.metrics import Progress, Recorder
from hpcsngd.train.pulse import Pulse
from hpcsngd.train.sampler import EvaluationSampler, ShardedSampler
from hpcsngd.train.stepping import ClosureStepping, GradientStepping, Stepping
from hpcsngd.train.stopping import StopRequest
from hpcsngd.train.strategy import STRATEGIES

log = logging.getLogger(__name__)

_REHEARSAL_BATCH = 2
_OVERLAP = 0.25


def train(
    run: RunDir, attempt: int, device: torch.device, *, started: float, pulse: Pulse | None = None
) -> bool:
    """Trains a run to its end, from its newest checkpoint if it has one; the ranks have met before.

    Args:
        run: the run.
        attempt: number of this attempt.
        device: where this rank computes.
        started: reading of ``time.monotonic`` when the worker started.
        pulse: is told where this rank stands; default: nobody is.

    Returns:
        True at the end of the run, with ``finished.yaml`` written; False after a stop request and checkpoint.

    Raises:
        TrainError: what the training code can explain; anything else is a defect or the machine's.
    """
    resolved = resolve.from_record(run.record()["config"])
    config = resolved.experiment
    pulse = pulse or Pulse()
    pulse.at("build")
    if config.deterministic:
        devices.use_deterministic_operations()
    splits = data.load(config.data, resolved.site.data_root, seed=config.seed)
    parts = _build_parts(run, config, splits, device)
    sampler = _sampler(config, splits.train)
    checkpoints = Checkpoints(run.checkpoints_dir, config.checkpoint.keep)
    progress = _resume(checkpoints, config, parts, sampler)
    recorder = Recorder(
        run,
        attempt,
        config.diagnostics,
        steps_per_epoch=sampler.steps_per_epoch,
        started=started,
        first_step=progress.step,
        evaluated=splits.evaluated,
    )
    stepping, test_batches = _batches(config, splits, sampler, parts)
    with recorder, StopRequest(run.attempt(attempt).stop_request) as stop_request:
        trainer = Trainer(
            config,
            parts,
            sampler=sampler,
            stepping=stepping,
            test=test_batches,
            task=tasks.build(config, splits.num_classes, splits.test.groups),
            recorder=recorder,
            checkpoints=checkpoints,
            stop_request=stop_request,
            progress=progress,
            pulse=pulse,
        )
        is_finished = trainer.run()
        if dist.rank() == 0:
            wall = {"wall_s": recorder.wall_s}
            if is_finished:
                facts = result(config, progress, parts.model, splits.evaluated) | wall
                rundir.write_yaml(run.attempt(attempt).finished_yaml, facts)
            else:
                rundir.write_yaml(run.attempt(attempt).stopped_yaml, {"step": progress.step, **wall})
        pulse.at("done")
        # nobody ends while another still communicates
        dist.barrier()
    return is_finished


def _build_parts(run: RunDir, config: Experiment, splits: data.Splits, device: torch.device) -> Parts:
    scaler = devices.make_scaler(config.precision, device)
    images = splits.train
    model = new_model(run, config, splits, device)
    strategy = STRATEGIES[config.strategy]()
    trained = strategy.prepare(model, device)
    shape = (_REHEARSAL_BATCH, images.channels, images.size, images.size)

    def rehearsal() -> torch.Tensor:
        with devices.autocast(config.precision, device):
            outputs: torch.Tensor = trained(torch.zeros(shape, device=device))
        return outputs.float().sum()

    strategy.settle(rehearsal)
    preconditioner = optimizers.build_preconditioner(trained, config, seed=config.seed)
    if preconditioner is not None and dist.rank() == 0:
        for name, reason in preconditioner.skipped.items():
            log.info("layer %s keeps its plain gradient: %s", name, reason)
    built = optimizers.build_optimizers(model, config.optimizer)
    return Parts(model, trained, strategy, built, preconditioner, scaler, device)


def new_model(run: RunDir, config: Experiment, splits: data.Splits, device: torch.device) -> nn.Module:
    """Returns a run's model with its initial weights; rank 0 writes down what it is made of."""
    seeds.seed_streams(seeds.derive(config.seed, "weights"))
    model = build_model(config, splits, device)
    if dist.rank() == 0:
        _summarize(run, model, splits.train, device)
        rundir.write_table(run.metrics("layers"), TABLES["layers"], layer_rows(model))
    return model


def build_model(config: Experiment, splits: data.Splits, device: torch.device) -> nn.Module:
    """Returns an experiment's model for its data; the weights come from torch's random stream."""
    images = splits.train
    model = models.build_model(
        config.model.name,
        splits.num_classes,
        images.channels,
        images.size,
        blurpool=config.model.blurpool,
        **config.model.args,
    ).to(device)
    if config.model.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs
    return model


def _summarize(run: RunDir, model: nn.Module, images: data.Samples, device: torch.device) -> None:
    """Writes torchinfo's table of the model; draws nothing from the random streams, leaves no trace in it.

    Where torchinfo is missing, as in images made of Debian's packages, the model's own words must do.
    """
    try:
        import torchinfo
    except ModuleNotFoundError:
        text = f"{model}\n{sum(p.numel() for p in model.parameters()):,} parameters"
    else:
        shape = (_REHEARSAL_BATCH, images.channels, images.size, images.size)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            text = str(torchinfo.summary(copy.deepcopy(model), input_size=shape, device=device, verbose=0))
    run.summary_txt.write_text(text + "\n", encoding="utf-8")
    log.info("model\n%s", text)


def _resume(checkpoints: Checkpoints, config: Experiment, parts: Parts, sampler: ShardedSampler) -> Progress:
    """Returns where to begin, with all states and random streams set accordingly."""
    loaded = checkpoints.load(parts.device)
    if loaded is None:
        seeds.seed_streams(seeds.derive(config.seed, "rank", dist.rank()))
        return Progress()
    _check_fits(loaded, sampler)
    parts.load_state_dict(loaded.common["parts"])
    progress = Progress.from_state(loaded.common["progress"])
    if loaded.own is not None:
        seeds.restore_streams(loaded.own)
    else:
        seeds.seed_streams(seeds.derive(config.seed, "rank", dist.rank(), "step", loaded.step))
        log.info(
            "checkpoint of %d ranks continues on %d: random streams (dropout) begin anew",
            loaded.world_size,
            dist.world_size(),
        )
    log.info("resumed after step %d", loaded.step)
    return progress


def _check_fits(loaded: Loaded, sampler: ShardedSampler) -> None:
    before = (loaded.common["global_batch"], loaded.common["steps_per_epoch"])
    now = (sampler.global_batch, sampler.steps_per_epoch)
    if before != now:
        raise SettingError(
            f"the checkpoint of step {loaded.step} was written by {loaded.world_size} ranks with a global "
            f"batch of {before[0]} ({before[1]} steps per epoch); {dist.world_size()} ranks now make "
            f"{now[0]} ({now[1]} steps): start as many ranks as before"
        )


def _sampler(config: Experiment, samples: data.Samples) -> ShardedSampler:
    lbfgs = config.optimizer if isinstance(config.optimizer, schema.LBFGS) else None
    overlaps = lbfgs is not None and lbfgs.batches == "overlap"
    return ShardedSampler(
        len(samples),
        config.batch_size,
        accumulate=None if config.strategy == "full_batch" else config.accumulate,
        rank=dist.rank(),
        ranks=dist.world_size(),
        seed=config.seed,
        blocks=samples.blocks,
        by_block=lbfgs is not None and lbfgs.batches == "file",
        overlap=(lbfgs.overlap or _OVERLAP) if lbfgs is not None and overlaps else 0.0,
    )


def _batches(
    config: Experiment, splits: data.Splits, sampler: ShardedSampler, parts: Parts
) -> tuple[Stepping, DataLoader[data.Batch]]:
    evaluation = EvaluationSampler(
        len(splits.test),
        config.eval_batch_size or config.batch_size,
        rank=dist.rank(),
        ranks=dist.world_size(),
        groups=list(splits.test.groups.values()),
    )
    workers, pin = config.data.workers, parts.device.type == "cuda"
    test = data.loader(splits.test, evaluation, workers=workers, pin=pin)
    first = parts.optimizers[0]
    if isinstance(first, LBFGS):
        lbfgs = ClosureStepping(
            first, parts.model, splits.train, sampler, seed=config.seed, workers=workers, pin=pin
        )
        return lbfgs, test
    train = data.loader(splits.train, data.EpochSampler(sampler), workers=workers, pin=pin)
    return GradientStepping(train, sampler, parts.optimizers, parts.scaler), test


def result(config: Experiment, progress: Progress, model: nn.Module, evaluated: str) -> dict[str, Any]:
    """Returns what ``finished.yaml`` says of a run's training."""
    return {
        f"{evaluated}_accuracy": progress.test.accuracy,
        f"{evaluated}_loss": progress.test.mean_loss,
        f"best_{evaluated}_accuracy": progress.best_test_accuracy,
        "epochs": config.epochs,
        "steps": progress.step,
        "train_s": progress.train_s,
        "parameters": models.parameter_count(model),
    }
