"""The sums behind a run's numbers, and the files that they go to."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

from torch import Tensor

from hpcsngd import dist, rundir
from hpcsngd.config.experiment import Diagnostics
from hpcsngd.optim import StepRecord
from hpcsngd.optim.lbfgs import Counts
from hpcsngd.optim.quantify import Quantify
from hpcsngd.rundir import CsvWriter, RunDir
from hpcsngd.tables import TABLES
from hpcsngd.train.faults import SettingError
from hpcsngd.train.parameter_server.engine import Part


@dataclass
class Sums:
    """Sums over targets (samples, or tokens of a text) of all ranks; equal on every rank after an all-reduce.

    Attributes:
        loss: sum of the targets' losses.
        correct: number of correct predictions; for masks the Dice coefficient, times the samples it is of.
        count: number of targets.
    """

    loss: float = 0.0
    correct: float = 0.0
    count: int = 0

    def add(self, loss: float, correct: float, count: int) -> None:
        """Adds one batch."""
        self.loss += loss
        self.correct += correct
        self.count += count

    @property
    def mean_loss(self) -> float:
        """Returns the mean loss per target; nan where nothing was added."""
        return self.loss / self.count if self.count else float("nan")

    @property
    def accuracy(self) -> float:
        """Returns the share of correct predictions, or the mean Dice coefficient; nan if there is none."""
        return self.correct / self.count if self.count else float("nan")


@dataclass
class Progress:
    """How far a run has come; part of every checkpoint.

    Attributes:
        step: optimizer steps done.
        samples: training samples used, all ranks.
        train_s: seconds spent training, summed over attempts.
        row: since the last row of train.csv.
        epoch: since the beginning of the epoch.
        test: of the last evaluation.
        best_test_accuracy: of all evaluations.
        scores: of the last evaluations, ``<split>_<metric>`` -> value.
        best_test_loss: the lowest of all evaluations.
        plateaus: evaluations whose loss was no lower than the lowest before.
    """

    step: int = 0
    samples: int = 0
    train_s: float = 0.0
    row: Sums = field(default_factory=Sums)
    epoch: Sums = field(default_factory=Sums)
    test: Sums = field(default_factory=Sums)
    best_test_accuracy: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)
    best_test_loss: float = math.inf
    plateaus: int = 0

    def take_test(self, test: Sums) -> None:
        """Takes the sums of an evaluation of the set that schedules and best values go by."""
        self.test = test
        self.best_test_accuracy = max(self.best_test_accuracy, test.accuracy)
        self.plateaus += test.mean_loss >= self.best_test_loss
        self.best_test_loss = min(self.best_test_loss, test.mean_loss)

    def state_dict(self) -> dict[str, Any]:
        """Returns numbers in nested dicts."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Returns the progress that `state_dict` described."""
        # checkpoints of earlier versions lack some
        plain = {item.name: state[item.name] for item in fields(cls) if item.name in state}
        return cls(**plain | {name: Sums(**state[name]) for name in ("row", "epoch", "test")})


class Sink(Protocol):
    """Takes numbers by name; TensorBoard's SummaryWriter is one."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Takes one number."""

    def close(self) -> None:
        """Writes what is left."""


class Recorder:
    """Writes the metrics of one attempt; each file has one rank as its only writer.

    Args:
        run: the run.
        attempt: number of the attempt.
        diagnostics: which tables there are.
        steps_per_epoch: turns steps into epochs.
        started: reading of ``time.monotonic`` when the worker started.
        first_step: steps done before this attempt.

    Raises:
        SettingError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        diagnostics: Diagnostics,
        *,
        steps_per_epoch: int,
        started: float,
        first_step: int = 0,
    ) -> None:
        self._attempt, self._steps_per_epoch, self._started = attempt, steps_per_epoch, started
        is_first = dist.rank() == 0
        self._sink = _tensorboard(run, first_step) if diagnostics.tensorboard and is_first else None
        self._run = run
        self._wanted = {name for name in _tables(diagnostics) if is_first or TABLES[name].per_rank}
        self._files: dict[str, CsvWriter] = {}

    def train(self, progress: Progress, lr: float) -> None:
        """Writes a row of train.csv from the sums since the last one."""
        loss, accuracy = progress.row.mean_loss, progress.row.accuracy
        self._put(
            "train",
            **self._place(progress.step),
            samples=progress.samples,
            loss=loss,
            accuracy=accuracy,
            lr=lr,
            **self._clocks(progress),
        )
        self._show(progress.step, {"train/loss": loss, "train/accuracy": accuracy, "train/lr": lr})

    def evaluation(
        self, progress: Progress, split: str, sums: Sums, scores: Mapping[str, float], eval_s: float
    ) -> None:
        """Writes a row of eval.csv and those of scores.csv from one evaluation.

        Args:
            progress: how far the run is.
            split: which data, as the tables name them.
            sums: over the targets.
            scores: metric -> value.
            eval_s: seconds that it took.
        """
        self._put(
            "eval",
            **self._place(progress.step),
            split=split,
            count=sums.count,
            loss=sums.mean_loss,
            accuracy=sums.accuracy,
            eval_s=eval_s,
            **self._clocks(progress),
        )
        for metric, value in scores.items():
            self._put("scores", **self._place(progress.step), split=split, metric=metric, value=value)
        shown = {"loss": sums.mean_loss, "accuracy": sums.accuracy, **scores}
        self._show(progress.step, {f"{split}/{metric}": value for metric, value in shown.items()})

    def dice(self, step: int, patients: Mapping[str, tuple[int, float]]) -> None:
        """Writes rows of dice.csv: patient -> number of slices, Dice coefficient."""
        for patient, (slices, value) in patients.items():
            self._put("dice", **self._place(step), patient=patient, slices=slices, dice=value)

    def confusion(self, step: int, split: str, counts: Tensor) -> None:
        """Writes confusion.csv, without pairs that do not occur.

        Args:
            step: steps done.
            split: which data.
            counts: ``(classes, classes)``: samples by label (row) and prediction (column).
        """
        if "confusion" in self._wanted:
            here = {**self._place(step), "split": split}
            rows = (
                {**here, "label": label, "predicted": predicted, "count": int(counts[label, predicted])}
                for label, predicted in counts.nonzero().tolist()
            )
            rundir.write_table(self._run.metrics("confusion"), TABLES["confusion"], rows)

    def gradient_norms(self, step: int, norms: Mapping[str, float]) -> None:
        """Writes rows of grad_norm.csv."""
        for layer, norm in norms.items():
            self._put("grad_norm", **self._place(step), layer=layer, norm=norm)

    def quantify(self, step: int, measured: Quantify) -> None:
        """Writes a row of quantify.csv."""
        self._put("quantify", **self._place(step), **asdict(measured))

    def lbfgs(self, step: int, objective: float, counts: Counts) -> None:
        """Writes a row of lbfgs.csv."""
        self._put("lbfgs", **self._place(step), objective=objective, **asdict(counts))

    def staleness(self, step: int, parts: Sequence[Part]) -> None:
        """Writes rows of staleness.csv: the pushes in one update of a parameter server."""
        for part in parts:
            self._put(
                "staleness",
                **self._place(step),
                worker=part.worker,
                pulled=part.pulled,
                staleness=part.staleness,
                work=part.work,
                delay_ms=1000 * part.delay_s,
                utc=rundir.utc_now(),
            )

    def phases(self, step: int, seconds: Mapping[str, float], *, refresh: bool) -> None:
        """Writes rows of this rank's profiling file.

        Phase ``capture`` is work of the preconditioner's hooks and lies within forward and backward, whose
        seconds include it, as does ``reduce`` as far as hooks begin to send; all other phases are disjoint.
        """
        for phase, value in seconds.items():
            self._put(
                "profiling",
                attempt=self._attempt,
                step=step,
                rank=dist.rank(),
                refresh=int(refresh),
                phase=phase,
                seconds=value,
            )

    def preconditioner(self, step: int, record: StepRecord) -> None:
        """Writes what a preconditioner reports of one step, as far as it was asked for.

        Memory and errors change only at refreshes and are written there.
        """
        here = {"attempt": self._attempt, "step": step}
        for sent in record.communication:
            self._put(
                "communication",
                **here,
                phase=sent.phase,
                op=sent.op,
                calls=sent.calls,
                size_bytes=sent.size_bytes,
            )
        for decision in record.switches:
            self._put("switches", attempt=self._attempt, **asdict(decision))
        if not record.refresh:
            return
        for kept in record.kept:
            self._put("kept", **self._place(step), **_without_step(kept))
        for held in record.memory:
            self._put("memory", **here, kind=held.kind, size_bytes=held.size_bytes)
        for spectrum in record.rank_analysis:
            self._put("rank_analysis", **self._place(step), **_without_step(spectrum))
        for error in record.grad_error:
            self._put("grad_error", **self._place(step), **_without_step(error))
        for layer in record.strength:
            self._put("strength", **self._place(step), **_without_step(layer))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes all files."""
        for file in self._files.values():
            file.close()
        if self._sink is not None:
            self._sink.close()

    @property
    def wall_s(self) -> float:
        """Returns the seconds since the worker started."""
        return time.monotonic() - self._started

    def _put(self, table: str, **values: rundir.Value) -> None:
        if table not in self._wanted:
            return
        if table not in self._files:
            self._files[table] = CsvWriter(self._run.metrics(table, dist.rank()), TABLES[table])
        self._files[table].write(**values)

    def _place(self, step: int) -> dict[str, rundir.Value]:
        return {"attempt": self._attempt, "epoch": step / self._steps_per_epoch, "step": step}

    def _clocks(self, progress: Progress) -> dict[str, rundir.Value]:
        return {"train_s": progress.train_s, "wall_s": self.wall_s, "utc": rundir.utc_now()}

    def _show(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._sink is not None:
            for tag, value in numbers.items():
                self._sink.add_scalar(tag, value, step)


def _tables(diagnostics: Diagnostics) -> list[str]:
    wanted = ["train", "eval", "scores", "dice", "confusion", "switches", "quantify", "staleness", "lbfgs"]
    if diagnostics.profiling:
        wanted += ["profiling", "communication", "memory"]
    if diagnostics.rank_analysis:
        wanted += ["rank_analysis", "kept"]
    return wanted + [name for name in ("grad_norm", "grad_error", "strength") if getattr(diagnostics, name)]


def _without_step(record: Any) -> dict[str, rundir.Value]:
    values: dict[str, rundir.Value] = asdict(record)
    del values["step"]
    return values


def _tensorboard(run: RunDir, first_step: int) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SettingError(
            "diagnostics.tensorboard needs the package tensorboard: pip install 'hpcsngd[tensorboard]'"
        ) from error
    # a resumed run repeats the steps after its checkpoint: what an earlier attempt showed of them is purged
    writer: Sink = SummaryWriter(run.tensorboard_dir, purge_step=first_step + 1)
    return writer
