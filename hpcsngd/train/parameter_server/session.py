"""One attempt of a run with a parameter server: rank 0 serves, every other rank works."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hpcsngd import rundir
from hpcsngd.config import experiment as schema
from hpcsngd.config import resolve
from hpcsngd.config.experiment import Experiment
from hpcsngd.config.resolve import Resolved
from hpcsngd.rundir import RunDir
from hpcsngd.train import data, devices, faults, loop, optimizers, seeds, session, tasks
from hpcsngd.train.checkpoint import Checkpoints, Loaded
from hpcsngd.train.faults import DismissedError, SettingError
from hpcsngd.train.metrics import Progress, Recorder
from hpcsngd.train.parameter_server import partition, replay, transport
from hpcsngd.train.parameter_server.compensation import Rule
from hpcsngd.train.parameter_server.delays import INTENSITIES, DelayModel
from hpcsngd.train.parameter_server.engine import Engine
from hpcsngd.train.parameter_server.link import Link, ServerFailedError
from hpcsngd.train.parameter_server.server import Position, Served, Server, Updates
from hpcsngd.train.parameter_server.work import Ledger, caps
from hpcsngd.train.parameter_server.worker import Orders, Worker
from hpcsngd.train.pulse import Pulse
from hpcsngd.train.sampler import ShardedSampler
from hpcsngd.train.stopping import StopRequest
from hpcsngd.train.tasks import Evaluated

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What one process of a run works on.

    Attributes:
        run: the run.
        attempt: number of this attempt.
        resolved: the run's configuration.
        device: where this process computes.
        workers: how many there are, numbered from 1.
        started: reading of ``time.monotonic`` when the process started.
        pulse: is told where it stands.
    """

    run: RunDir
    attempt: int
    resolved: Resolved
    device: torch.device
    workers: int
    started: float
    pulse: Pulse

    @property
    def config(self) -> Experiment:
        """Returns the experiment."""
        return self.resolved.experiment

    @property
    def settings(self) -> schema.ParameterServer:
        """Returns the settings of the strategy."""
        return self.config.parameter_server or schema.ParameterServer()

    def load(self) -> data.Splits:
        """Returns the data set."""
        return data.load(self.config.data, self.resolved.site.data_root, seed=self.config.seed)


def train(run: RunDir, attempt: int, *, started: float, pulse: Pulse) -> bool:
    """Trains a run to its end, from its newest checkpoint if it has one, as the rank that this process is.

    Args:
        run: the run.
        attempt: number of this attempt.
        started: reading of ``time.monotonic`` when the process started.
        pulse: is told where this rank stands.

    Returns:
        True at the end of the run, with ``finished.yaml`` written; False after a stop request and checkpoint.

    Raises:
        TrainError: what the training code can explain; anything else is a defect or the machine's.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    resolved = resolve.from_record(run.record()["config"])
    job = Job(run, attempt, resolved, devices.choose_device(), ranks - 1, started, pulse)
    check_ranks(job)
    _bound_threads()
    if job.config.deterministic:
        devices.use_deterministic_operations()
    pulse.at("rendezvous")
    transport.meet(rank, ranks)
    pulse.at("build")
    with StopRequest(run.attempt(attempt).stop_request) as stop_request:
        is_finished = _work(job, rank) if rank else _serve(job, stop_request)
    pulse.at("done")
    transport.part()
    return is_finished


def check_ranks(job: Job) -> None:
    """Checks that there are the workers that the experiment speaks of.

    Raises:
        SettingError: there are not.
    """
    if job.workers < 1:
        raise SettingError("strategy parameter_server needs at least 2 ranks: the server and a worker")
    delay = job.settings.delay
    if delay is not None and delay.slow_worker is not None and delay.slow_worker > job.workers:
        raise SettingError(f"delay.slow_worker is {delay.slow_worker}, but the last worker is {job.workers}")


@dataclass(frozen=True)
class Built:
    """A server and what belongs to it.

    Attributes:
        server: in the state of the newest checkpoint.
        recorder: that it writes with.
        served: what is trained.
        evaluated: which data evaluations use.
        steps_per_epoch: updates per epoch.
    """

    server: Server
    recorder: Recorder
    served: Served
    evaluated: str
    steps_per_epoch: int


def build_server(job: Job, stop_request: StopRequest) -> Built:
    """Returns a server in the state of the run's newest checkpoint.

    Args:
        job: what it works on.
        stop_request: says when the run should checkpoint and leave.

    Raises:
        SettingError: the samples cannot be shared so, or the checkpoint or the replay is of another run.
    """
    config, settings, splits = job.config, job.settings, job.load()
    numbers, common = list(range(1, job.workers + 1)), _common_order(job, splits)
    model = session.new_model(job.run, config, splits, job.device)
    served = Served(model, optimizers.build_optimizers(model, config.optimizer))
    progress, position, size = Progress(), Position(), common.steps_per_epoch
    updates = Updates(config, served, steps_per_epoch=size, progress=progress, pulse=job.pulse)
    logged = _logged(job, config.epochs * size)
    checkpoints = Checkpoints(job.run.checkpoints_dir, config.checkpoint.keep)
    loaded = checkpoints.load(job.device)
    rule = settings.compensation
    engine = Engine(
        model,
        served.optimizers,
        mode=settings.mode,
        workers=numbers,
        compensation=None if rule is None else Rule(**rule.model_dump()),
        before_update=updates.before,
        after_update=updates.after,
        replay=None if logged is None else replay.events(logged, 0 if loaded is None else loaded.step),
        ledger=_ledger(job, splits, common, logged),
    )
    if loaded is not None:
        _check_fits(loaded.common, common, numbers)
        _restore(loaded, served, engine, progress, position)
    recorder = Recorder(
        job.run,
        job.attempt,
        config.diagnostics,
        steps_per_epoch=size,
        started=job.started,
        first_step=progress.step,
    )
    server = Server(
        config,
        served,
        engine,
        updates,
        workers=numbers,
        steps_per_epoch=size,
        evaluate=_evaluator(job, splits, model),
        split=splits.evaluated,
        recorder=recorder,
        checkpoints=checkpoints,
        stop_request=stop_request,
        find_lost=job.run.attempt(job.attempt).lost_ranks,
        progress=progress,
        position=position,
        pulse=job.pulse,
        may_hold=logged is None,
        lost_after_s=settings.lost_after_s,
    )
    return Built(server, recorder, served, splits.evaluated, size)


def build_worker(job: Job, number: int, link: Link) -> Worker:
    """Returns a worker.

    Args:
        job: what it works on.
        number: its number, from 1.
        link: its way to the server.

    Raises:
        SettingError: the samples cannot be shared among so many workers.
    """
    config, settings, splits = job.config, job.settings, job.load()
    own = None
    if settings.partition != "dealt":
        own = partition.parts(settings.partition, splits.train.labels, job.workers, config.seed)[number - 1]
    seeds.seed_streams(seeds.derive(config.seed, "weights"))
    return Worker(
        number,
        config,
        session.build_model(config, splits, job.device),
        samples=splits.train,
        orders=Orders(_common_order(job, splits), config.seed, number, own),
        task=tasks.build(config, splits.num_classes, splits.test),
        link=link,
        device=job.device,
        delay=delay_model(settings.delay),
        pulse=job.pulse,
    )


def delay_model(delay: schema.Delay | None) -> DelayModel | None:
    """Returns the delay model of an experiment."""
    if delay is None:
        return None
    mean_ms = INTENSITIES[delay.intensity] if delay.intensity else (delay.mean_ms or 0.0)
    return DelayModel(mean_ms, delay.std_ms, delay.kind, delay.all_workers, delay.slow_worker)


def serve(job: Job, built: Built) -> bool:
    """Serves to the end, writes how it ended and sends the workers home; returns whether the run is finished.

    Args:
        job: what the server works on.
        built: the server.

    Raises:
        Exception: whatever has ended the server.
    """
    files, server = job.run.attempt(job.attempt), built.server
    with built.recorder as recorder:
        is_finished = server.run()
        wall = {"wall_s": recorder.wall_s}
        if is_finished:
            lost = {"lost_workers": server.lost} if server.lost else {}
            facts = session.result(
                job.config, server.progress, built.served.model, built.evaluated, built.steps_per_epoch
            )
            rundir.write_yaml(files.finished_yaml, {**facts, **wall, **lost})
        else:
            rundir.write_yaml(files.stopped_yaml, {"step": server.progress.step, **wall})
        server.dismiss()
    return is_finished


def _serve(job: Job, stop_request: StopRequest) -> bool:
    try:
        built = build_server(job, stop_request)
    except BaseException as error:
        transport.refuse(error)
        raise
    transport.serve(built.server)
    return serve(job, built)


def _work(job: Job, rank: int) -> bool:
    link = transport.RpcLink(rank)
    try:
        return build_worker(job, rank, link).run()
    except ServerFailedError:
        link.leave()
        raise
    except DismissedError:
        raise
    except Exception as error:
        with contextlib.suppress(ServerFailedError):
            link.fail(faults.kind_of(error), faults.message_of(error))
        raise


def _bound_threads() -> None:
    """Keeps the processes of a node from computing on the same cores."""
    if "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))


def _common_order(job: Job, splits: data.Splits) -> ShardedSampler:
    """Returns the order of the samples, and the steps, of the same training without a server."""
    return ShardedSampler(
        len(splits.train),
        job.config.batch_size,
        accumulate=job.config.accumulate,
        ranks=job.workers if job.settings.mode == "sync" else 1,
        seed=job.config.seed,
        blocks=splits.train.blocks,
    )


def _ledger(
    job: Job, splits: data.Splits, common: ShardedSampler, logged: list[replay.Logged] | None
) -> Ledger:
    """Returns the book of the run's steps; refuses what cannot be shared before anybody works."""
    settings, config = job.settings, job.config
    workers = list(range(1, job.workers + 1))
    parts = dict.fromkeys(workers, 1)
    if settings.partition != "dealt":
        found = partition.parts(settings.partition, splits.train.labels, len(workers), config.seed)
        parts = {worker: len(part) for worker, part in zip(workers, found, strict=True)}
    steps = config.epochs * common.steps_per_epoch
    return Ledger(
        common.sizes,
        settings.mode,
        workers,
        config.batch_size,
        caps=caps(steps, parts) if settings.shares == "equal" else None,
        logged=None if logged is None else replay.works(logged),
    )


def _restore(loaded: Loaded, served: Served, engine: Engine, progress: Progress, position: Position) -> None:
    """Sets everything as a checkpoint has it."""
    common = loaded.common
    served.load_state_dict(common["parts"])
    engine.load_state_dict(common["engine"])
    vars(progress).update(vars(Progress.from_state(common["progress"])))
    streams = {} if loaded.own is None else dict(loaded.own["streams"])
    vars(position).update(left=common["left"], lost=common["lost"], streams=streams)
    log.info("resumed after step %d", loaded.step)


def _logged(job: Job, steps: int) -> list[replay.Logged] | None:
    file = job.settings.replay
    if file is None:
        return None
    logged = replay.read(Path(file).expanduser())
    workers = max((each.worker for each in logged), default=0)
    if len(logged) != steps or workers > job.workers:
        raise SettingError(
            f"parameter_server.replay: {file} has {len(logged)} updates of workers up to {workers}; "
            f"this run makes {steps} with {job.workers}"
        )
    return logged


def _check_fits(common: Mapping[str, object], order: ShardedSampler, workers: list[int]) -> None:
    before, now = (common["steps_per_epoch"], common["workers"]), (order.steps_per_epoch, workers)
    if before != now:
        raise SettingError(
            f"the checkpoint has {before[0]} steps per epoch and workers {before[1]}; now there are "
            f"{now[0]} steps and workers {now[1]}: start as many ranks as before"
        )


def _evaluator(job: Job, splits: data.Splits, model: nn.Module) -> Callable[[], Evaluated]:
    config = job.config
    task = tasks.build(config, splits.num_classes, splits.test)
    batches = session.evaluation_batches(splits.test, config, job.device, workers=0)

    def evaluate() -> Evaluated:
        return loop.evaluate(
            model,
            batches,
            task.evaluation(job.device),
            move=lambda batch: loop.to_device(batch, job.device, is_channels_last=config.model.channels_last),
            precision=config.precision,
            tick=lambda: job.pulse.at("evaluate"),
        )

    return evaluate
