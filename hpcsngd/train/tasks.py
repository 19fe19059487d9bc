"""What is learned: a class for each sample, a mask, words. The loop takes a task and has no branches on it.

Scores and losses are sums over targets, so that numbers of micro-batches and ranks add up exactly. A sample
has one target, or in texts as many as it has tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hpcsngd import dist
from hpcsngd.config.catalogue import DATASETS as CATALOGUE
from hpcsngd.config.experiment import Experiment
from hpcsngd.train import losses, volume_dice
from hpcsngd.train.data.samples import Samples
from hpcsngd.train.metrics import Sums


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation, equal on every rank.

    Attributes:
        sums: over all targets, each once.
        patients: patient -> number of slices, Dice coefficient of the volume; empty for other tasks.
        confusion: ``(classes, classes)``, int64: samples of each class (row) by the class that the model says
            (column); None for other tasks.
        scores: further numbers by name: perplexity, BLEU.
    """

    sums: Sums
    patients: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    confusion: Tensor | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


class Evaluation(ABC):
    """Takes this rank's batches of one evaluation."""

    def look(self, model: nn.Module, indices: list[int], inputs: tuple[Tensor, ...]) -> None:  # noqa: B027
        """Sees the model and a batch's inputs, before `add`: for what outputs do not tell; does nothing."""

    @abstractmethod
    def add(self, indices: list[int], outputs: Tensor, targets: Tensor) -> None:
        """Takes one batch: which samples, what the model says, and what is true."""

    @abstractmethod
    def result(self) -> Evaluated:
        """Returns the numbers of all ranks; every rank must call it."""


class Task(ABC):
    """What the loop asks of a task, for one set of samples."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the training loss of a micro-batch, the sum over its targets."""

    @abstractmethod
    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns how good a micro-batch's predictions are, the sum over its targets, float64."""

    @abstractmethod
    def evaluation(self, device: torch.device, *, is_full: bool = True) -> Evaluation:
        """Returns a new evaluation.

        Args:
            device: where the model computes.
            is_full: whether to do what takes long as well: translating.
        """

    def curvature_outputs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the outputs whose distribution a Fisher matrix is of, with their graph: all of them."""
        return outputs


class Classification(Task):
    """A class for each image.

    Args:
        classes: how many there are.
        smoothing: of labels, in training.
    """

    def __init__(self, classes: int, smoothing: float = 0.0) -> None:
        self._classes, self._smoothing = classes, smoothing

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the summed cross-entropy, with smoothed labels."""
        return losses.cross_entropy(outputs, targets, self._smoothing)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the number of correct predictions."""
        return (outputs.argmax(dim=1) == targets).sum().double()

    def evaluation(self, device: torch.device, *, is_full: bool = True) -> Evaluation:
        """Returns an evaluation by cross-entropy without smoothing."""
        return _ClassificationSums(self._classes, device)


class _ClassificationSums(Evaluation):
    def __init__(self, classes: int, device: torch.device) -> None:
        self._task = Classification(classes)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def add(self, indices: list[int], outputs: Tensor, targets: Tensor) -> None:
        loss = self._task.loss(outputs, targets).double()
        self._sums += torch.stack([loss, self._task.score(outputs, targets), loss.new_tensor(len(targets))])
        pairs = targets * len(self._confusion) + outputs.argmax(dim=1)
        # unlike bincount this does not wait for a GPU
        self._confusion.view(-1).index_add_(0, pairs, torch.ones_like(pairs))

    def result(self) -> Evaluated:
        loss, correct, count = dist.all_reduce_sum(self._sums).tolist()
        return Evaluated(Sums(loss, correct, int(count)), confusion=dist.all_reduce_sum(self._confusion))


class Segmentation(Task):
    """A mask for each image, one channel.

    Args:
        smooth: of the Dice loss.
        groups: patient -> number of slices, in the order of the set that is evaluated.
    """

    def __init__(self, smooth: float, groups: Mapping[str, int]) -> None:
        self._smooth, self._groups = smooth, groups

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the Dice loss of the micro-batch, times its size."""
        return losses.dice(outputs, targets, self._smooth)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the Dice coefficient of the micro-batch's predicted masks, times its size."""
        both, all_of_them = losses.overlap((outputs > 0).double(), targets.double())
        coefficient = torch.where(all_of_them > 0, 2 * both / all_of_them, 1.0)
        return len(targets) * coefficient

    def evaluation(self, device: torch.device, *, is_full: bool = True) -> Evaluation:
        """Returns an evaluation of whole volumes."""
        return _Volumes(self._smooth, self._groups, device)


class _Volumes(Evaluation):
    """Dice loss and Dice coefficient of each patient; a patient's slices are all on one rank, in order."""

    def __init__(self, smooth: float, groups: Mapping[str, int], device: torch.device) -> None:
        self._smooth, self._names, self._device = smooth, list(groups), device
        counts = torch.tensor(list(groups.values()))
        self._counts = counts
        self._patient_of = torch.repeat_interleave(torch.arange(len(counts)), counts)
        # for each patient: sum p t, sum p + sum t, Dice coefficient
        self._table = torch.zeros(len(counts), 3, dtype=torch.float64)
        self._predicted: dict[int, list[Tensor]] = {}
        self._true: dict[int, list[Tensor]] = {}

    def add(self, indices: list[int], outputs: Tensor, targets: Tensor) -> None:
        probabilities = outputs.float().sigmoid()
        for place, patient in enumerate(self._patient_of[indices].tolist()):
            both, all_of_them = losses.overlap(probabilities[place].double(), targets[place].double())
            self._table[patient, :2] += torch.stack([both, all_of_them]).cpu()
            self._predicted.setdefault(patient, []).append((outputs[place, 0] > 0).cpu())
            self._true.setdefault(patient, []).append((targets[place, 0] > 0).cpu())

    def result(self) -> Evaluated:
        for patient, slices in self._predicted.items():
            true = torch.stack(self._true[patient])
            self._table[patient, 2] = volume_dice.dice(torch.stack(slices).numpy(), true.numpy())
        both, all_of_them, coefficients = dist.all_reduce_sum(self._table.to(self._device)).cpu().T
        loss = 1 - (2 * both + self._smooth) / (all_of_them + self._smooth)
        count = int(self._counts.sum())
        sums = Sums(float((loss * self._counts).sum()), float(coefficients.mean()) * count, count)
        rows = zip(self._counts.tolist(), coefficients.tolist(), strict=True)
        return Evaluated(sums, dict(zip(self._names, rows, strict=True)))


def _classification(config: Experiment, classes: int, samples: Samples) -> Task:
    return Classification(classes, config.loss.label_smoothing)


def _segmentation(config: Experiment, classes: int, samples: Samples) -> Task:
    return Segmentation(config.loss.smooth, samples.groups)


#: By the names of experiments, for images; tasks on text have theirs in `hpcsngd.train.text.tasks`.
TASKS: dict[str, Callable[[Experiment, int, Samples], Task]] = {
    "classification": _classification,
    "segmentation": _segmentation,
}


def build(config: Experiment, classes: int, samples: Samples) -> Task:
    """Returns an experiment's task for a set that is evaluated.

    Args:
        config: the experiment.
        classes: outputs of the model.
        samples: the set.
    """
    if CATALOGUE[config.data.name].kind == "images":
        return TASKS[config.task](config, classes, samples)
    # not above: it imports this module
    from hpcsngd.train.text.tasks import TASKS as TEXT_TASKS

    return TEXT_TASKS[config.task](config, classes, samples)
