"""What is learned from GLUE and SQuAD: classes, a number, or the span that answers a question.

Predictions of all ranks are put together before they are scored, so that scores that are no means over
samples (correlations, F1 of a class) are exact too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hpcsngd import dist
from hpcsngd.config.experiment import Experiment
from hpcsngd.train.data.samples import Samples
from hpcsngd.train.metrics import Sums
from hpcsngd.train.tasks import Classification, Evaluated, Evaluation, Task
from hpcsngd.train.text import answers
from hpcsngd.train.text.glue import LAYOUTS
from hpcsngd.train.text.scores import METRICS
from hpcsngd.train.text.windows import Windows


class Labelling(Classification):
    """A class for each text.

    Args:
        classes: how many there are.
        smoothing: of labels, in training.
        metrics: what predictions are scored by, names in `METRICS`.
        samples: size of the set that is evaluated.
    """

    def __init__(self, classes: int, smoothing: float, metrics: Sequence[str], samples: int) -> None:
        super().__init__(classes, smoothing)
        self._metrics, self._samples = metrics, samples

    def evaluation(self, device: torch.device, *, is_full: bool = True) -> Evaluation:
        """Returns an evaluation by cross-entropy without smoothing, and by the metrics."""
        return _Labels(super().evaluation(device), _Predictions(self._samples, self._metrics, device))


class _Labels(Evaluation):
    def __init__(self, sums: Evaluation, predictions: _Predictions) -> None:
        self._sums, self._predictions = sums, predictions

    def add(self, indices: list[int], outputs: Tensor, targets: Tensor) -> None:
        self._sums.add(indices, outputs, targets)
        self._predictions.add(indices, outputs.argmax(1), targets)

    def result(self) -> Evaluated:
        found = self._sums.result()
        return Evaluated(found.sums, confusion=found.confusion, scores=self._predictions.scores())


class _Predictions:
    """What the model says and what is true, of all samples, each from the one rank that has it."""

    def __init__(self, samples: int, metrics: Sequence[str], device: torch.device) -> None:
        self._metrics = metrics
        self._table = torch.zeros(samples, 2, dtype=torch.float64, device=device)

    def add(self, indices: list[int], predicted: Tensor, targets: Tensor) -> None:
        """Takes one batch."""
        self._table[indices] = torch.stack([predicted.double(), targets.double()], 1)

    def scores(self) -> dict[str, float]:
        """Returns metric -> value; every rank must call it."""
        predicted, true = dist.all_reduce_sum(self._table).cpu().numpy().T
        return {name: METRICS[name](predicted, true) for name in self._metrics}


class Regression(Task):
    """A number for each text, by squared error; the score is the first metric, which training has none of.

    Args:
        metrics: what predictions are scored by, names in `METRICS`.
        samples: size of the set that is evaluated.
    """

    def __init__(self, metrics: Sequence[str], samples: int) -> None:
        self._metrics, self._samples = metrics, samples

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the summed squared error of outputs ``(n, 1)``."""
        return (outputs.float().squeeze(1) - targets).square().sum()

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns nan: a correlation is no sum over samples."""
        return outputs.new_tensor(math.nan, dtype=torch.float64)

    def evaluation(self, device: torch.device, *, is_full: bool = True) -> Evaluation:
        """Returns an evaluation by squared error and by the metrics."""
        return _Numbers(self, _Predictions(self._samples, self._metrics, device), device)


class _Numbers(Evaluation):
    def __init__(self, task: Regression, predictions: _Predictions, device: torch.device) -> None:
        self._task, self._predictions = task, predictions
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, indices: list[int], outputs: Tensor, targets: Tensor) -> None:
        loss = self._task.loss(outputs, targets).double()
        self._sums += torch.stack([loss, loss.new_tensor(len(targets))])
        self._predictions.add(indices, outputs.squeeze(1), targets)

    def result(self) -> Evaluated:
        loss, count = dist.all_reduce_sum(self._sums).tolist()
        scores = self._predictions.scores()
        return Evaluated(Sums(loss, next(iter(scores.values())) * count, int(count)), scores=scores)


class SpanAnswers(Task):
    """The span of a paragraph that answers a question, or none.

    Args:
        windows: the set that is evaluated.
        may_be_none: whether a question may have no answer: SQuAD v2.
    """

    def __init__(self, windows: Windows, *, may_be_none: bool) -> None:
        self._windows, self._may_be_none = windows, may_be_none

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the sum over windows of the mean of both ends' cross-entropies.

        Args:
            outputs: logits of beginnings and ends, ``(n, 2, length)``.
            targets: tokens, ``(n, 2)``.
        """
        ends = nn.functional.cross_entropy(outputs.float().flatten(0, 1), targets.flatten(), reduction="sum")
        return ends / 2

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the number of windows of which both ends are right."""
        return (outputs.argmax(2) == targets).all(1).sum().double()

    def evaluation(self, device: torch.device, *, is_full: bool = True) -> Evaluation:
        """Returns an evaluation of whole questions by exact match and F1."""
        return _Questions(self, self._windows, device, may_be_none=self._may_be_none)


class _Questions(Evaluation):
    """The best answer of each question; a question's windows are all on one rank."""

    def __init__(
        self, task: SpanAnswers, windows: Windows, device: torch.device, *, may_be_none: bool
    ) -> None:
        self._task, self._windows, self._device, self._may_be_none = task, windows, device, may_be_none
        self._best: dict[int, answers.Best] = {}
        self._sums = torch.zeros(2, dtype=torch.float64)

    def add(self, indices: list[int], outputs: Tensor, targets: Tensor) -> None:
        self._sums += torch.stack(
            [self._task.loss(outputs, targets).double().cpu(), torch.tensor(len(indices)).double()]
        )
        for index, (begins, ends) in zip(indices, outputs.double().cpu().numpy(), strict=True):
            spans = self._windows.spans(index).numpy()
            best = self._best.setdefault(self._windows.question(index), answers.Best())
            best.add(begins[: len(spans)], ends[: len(spans)], spans, self._windows.null(index))

    def result(self) -> Evaluated:
        # for each question: exact match, F1, whether it has an answer, whether it was asked
        table = torch.zeros(len(self._windows.questions), 4, dtype=torch.float64)
        for number, best in self._best.items():
            question = self._windows.questions[number]
            said = best.text(question.context, may_be_none=self._may_be_none)
            marked = [text for text, _ in question.answers]
            table[number, :2] = torch.tensor(answers.exact_match_and_f1(said, marked))
            table[number, 2], table[number, 3] = bool(marked), 1
        exact, f1, has_answer, asked = dist.all_reduce_sum(table.to(self._device)).cpu().numpy().T
        loss, count = dist.all_reduce_sum(self._sums.to(self._device)).tolist()
        scores = {"exact_match": exact.sum() / asked.sum(), "f1": f1.sum() / asked.sum()}
        if self._may_be_none:
            for name, chosen in (("has_answer", has_answer == 1), ("no_answer", asked > has_answer)):
                scores |= {f"{name}_exact_match": _mean(exact, chosen), f"{name}_f1": _mean(f1, chosen)}
        plain = {name: float(value) for name, value in scores.items()}
        return Evaluated(Sums(loss, plain["f1"] * count, int(count)), scores=plain)


def labelling(config: Experiment, classes: int, samples: Samples) -> Task:
    """Returns the task of an experiment on classes of text."""
    metrics = LAYOUTS[config.data.name].metrics
    return Labelling(classes, config.loss.label_smoothing, metrics, len(samples))


def regression(config: Experiment, classes: int, samples: Samples) -> Task:
    """Returns the task of an experiment on numbers."""
    return Regression(LAYOUTS[config.data.name].metrics, len(samples))


def question_answering(config: Experiment, classes: int, samples: Samples) -> Task:
    """Returns the task of an experiment on questions.

    Raises:
        TypeError: the samples are no windows of questions.
    """
    if not isinstance(samples, Windows):
        raise TypeError(f"{type(samples).__name__} are no windows of questions")
    return SpanAnswers(samples, may_be_none=config.data.name == "squadv2")


TASKS: dict[str, Callable[[Experiment, int, Samples], Task]] = {
    "classification": labelling,
    "regression": regression,
    "question_answering": question_answering,
}


def _mean(values: answers.Floats, chosen: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> float:
    return float(values[chosen].mean()) if chosen.any() else math.nan
