"""One attempt of a run, from its configuration to its result: builds the parts and starts the loop."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler

from hpcsngd import dist, rundir
from hpcsngd.config import experiment as schema
from hpcsngd.config import resolve
from hpcsngd.config.experiment import Experiment
from hpcsngd.optim.lbfgs import LBFGS
from hpcsngd.rundir import RunDir
from hpcsngd.tables import TABLES
from hpcsngd.train import carried, data, devices, models, optimizers, seeds, tasks
from hpcsngd.train.checkpoint import Checkpoints, Loaded
from hpcsngd.train.faults import SettingError
from hpcsngd.train.layers import layer_rows
from hpcsngd.train.loop import Held, Parts, Trainer
from hpcsngd.train.metrics import Progress, Recorder
from hpcsngd.train.pulse import Pulse
from hpcsngd.train.sampler import EvaluationSampler, ShardedSampler, StreamSampler
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
    splits = _laid_out(data.load(config.data, resolved.site.data_root, seed=config.seed), config)
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
    )
    held = _held(config, splits, device)
    with recorder, StopRequest(run.attempt(attempt).stop_request) as stop_request:
        trainer = Trainer(
            config,
            parts,
            sampler=sampler,
            stepping=_stepping(config, splits.train, sampler, parts),
            task=held[0].task,
            held=held,
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
                facts = (
                    result(config, progress, parts.model, splits.evaluated, sampler.steps_per_epoch) | wall
                )
                rundir.write_yaml(run.attempt(attempt).finished_yaml, facts)
            else:
                rundir.write_yaml(run.attempt(attempt).stopped_yaml, {"step": progress.step, **wall})
        pulse.at("done")
        # nobody ends while another still communicates
        dist.barrier()
    return is_finished


def _laid_out(splits: data.Splits, config: Experiment) -> data.Splits:
    """Returns the sets with long texts cut into streams: one for each sample of a global batch.

    Evaluations have as many streams as ``eval_batch_size`` says in all, whatever the number of ranks, because
    where a stream begins is part of the result.
    """
    held = config.eval_batch_size or config.batch_size
    return replace(
        splits,
        train=splits.train.laid_out(config.batch_size * config.accumulate * dist.world_size()),
        test=splits.test.laid_out(held),
        extra={name: samples.laid_out(held) for name, samples in splits.extra.items()},
    )


def _build_parts(run: RunDir, config: Experiment, splits: data.Splits, device: torch.device) -> Parts:
    scaler = devices.make_scaler(config.precision, device)
    model = new_model(run, config, splits, device)
    goes_once = config.strategy != "full_batch" and config.optimizer.name != "lbfgs"
    if not (config.accumulate == 1 and goes_once) and carried.is_carrying(model):
        raise SettingError(
            f"model {config.model.name} goes on from step to step in its streams: accumulate must be 1, the "
            "strategy not full_batch, and the optimizer not lbfgs"
        )
    strategy = STRATEGIES[config.strategy]()
    trained = strategy.prepare(model, device)

    def rehearsal() -> torch.Tensor:
        inputs = [each.to(device) for each in splits.train.example(_REHEARSAL_BATCH)]
        with devices.autocast(config.precision, device):
            outputs: torch.Tensor = trained(*inputs)
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
        _summarize(run, model, splits.train.example(_REHEARSAL_BATCH), device)
        rundir.write_table(run.metrics("layers"), TABLES["layers"], layer_rows(model))
    return model


def build_model(config: Experiment, splits: data.Splits, device: torch.device) -> nn.Module:
    """Returns an experiment's model for its data; the weights come from torch's random stream."""
    model = models.build_for(splits.train, splits.num_classes, config.model).to(device)
    if config.model.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs
    return model


def _summarize(run: RunDir, model: nn.Module, inputs: Sequence[torch.Tensor], device: torch.device) -> None:
    """Writes torchinfo's table of the model; draws nothing from the random streams, leaves no trace in it.

    Where torchinfo is missing, as in images made of Debian's packages, the model's own words must do.
    """
    try:
        import torchinfo
    except ModuleNotFoundError:
        text = f"{model}\n{sum(p.numel() for p in model.parameters()):,} parameters"
    else:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            summary = torchinfo.summary(
                copy.deepcopy(model),
                input_data=[each.to(device) for each in inputs],
                device=device,
                verbose=0,
            )
        text = str(summary)
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
        carried.restore(parts.model, loaded.own.get("carried", {}))
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
        targets=samples.targets,
        shuffled=not samples.streams,
    )


def _stepping(config: Experiment, samples: data.Samples, sampler: ShardedSampler, parts: Parts) -> Stepping:
    workers, pin = config.data.workers, parts.device.type == "cuda"
    first = parts.optimizers[0]
    if isinstance(first, LBFGS):
        return ClosureStepping(
            first, parts.model, samples, sampler, seed=config.seed, workers=workers, pin=pin
        )
    train = data.loader(samples, data.EpochSampler(sampler), workers=workers, pin=pin)
    return GradientStepping(train, sampler, parts.optimizers, parts.scaler)


def _held(config: Experiment, splits: data.Splits, device: torch.device) -> list[Held]:
    return [
        Held(
            name,
            tasks.build(config, splits.num_classes, samples),
            evaluation_batches(samples, config, device, workers=config.data.workers),
        )
        for name, samples in {splits.evaluated: splits.test, **splits.extra}.items()
    ]


def evaluation_batches(
    samples: data.Samples, config: Experiment, device: torch.device, *, workers: int
) -> DataLoader[data.Batch]:
    """Returns this rank's batches of a set that is evaluated; each sample is on one rank.

    Args:
        samples: the set.
        config: the experiment, for the size of a batch.
        device: where batches go.
        workers: loader processes.
    """
    place = {"rank": dist.rank(), "ranks": dist.world_size()}
    sampler: Sampler[list[int]]
    if samples.streams:
        sampler = StreamSampler(len(samples), samples.streams, **place)
    else:
        size, groups = config.eval_batch_size or config.batch_size, list(samples.groups.values())
        sampler = EvaluationSampler(len(samples), size, groups=groups, **place)
    return data.loader(samples, sampler, workers=workers, pin=device.type == "cuda")


def result(
    config: Experiment, progress: Progress, model: nn.Module, evaluated: str, steps_per_epoch: int
) -> dict[str, Any]:
    """Returns what ``finished.yaml`` says of a run's training."""
    return {
        f"{evaluated}_accuracy": progress.test.accuracy,
        f"{evaluated}_loss": progress.test.mean_loss,
        f"best_{evaluated}_accuracy": progress.best_test_accuracy,
        **progress.scores,
        # with a time limit, perhaps in the midst of one
        "epochs": config.epochs if config.train_limit_s is None else progress.step / steps_per_epoch,
        "steps": progress.step,
        "train_s": progress.train_s,
        "parameters": models.parameter_count(model),
    }
