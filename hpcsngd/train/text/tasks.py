"""Tasks whose targets are words: the next word of a text, and translation."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from hpcsngd import dist
from hpcsngd.config.experiment import Decoding, Experiment
from hpcsngd.train import losses
from hpcsngd.train.data.samples import Samples
from hpcsngd.train.faults import SettingError
from hpcsngd.train.losses import IGNORED
from hpcsngd.train.metrics import Sums
from hpcsngd.train.models.transformer import Transformer
from hpcsngd.train.tasks import Evaluated, Evaluation, Task
from hpcsngd.train.text import beam
from hpcsngd.train.text.encoder_tasks import TASKS as ENCODER_TASKS
from hpcsngd.train.text.pairs import Pairs
from hpcsngd.train.text.vocabulary import END, START


class Words(Task):
    """A word at each position; outputs ``(n, length, words)``, targets ``(n, length)``.

    Args:
        smoothing: of labels, in training.
        is_mean: whether a sample's own loss is the mean over its words, and not their sum.
    """

    def __init__(self, smoothing: float = 0.0, *, is_mean: bool = False) -> None:
        self._smoothing, self._is_mean = smoothing, is_mean

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the summed cross-entropy of all words, with smoothed labels."""
        return losses.token_cross_entropy(outputs, targets, self._smoothing)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the number of words that are the likeliest by the model."""
        return (outputs.argmax(dim=2) == targets).sum().double()

    def evaluation(self, device: torch.device, *, is_full: bool = True) -> Evaluation:
        """Returns an evaluation by cross-entropy without smoothing: perplexity."""
        return Perplexity(device)

    def curvature_outputs(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns logits such that padding has no part in the Fisher matrix.

        Where a sample's loss is a sum, one row for each word; where it is a mean, ``(n, words, length)``, so
        that the length is known, and without a graph where there is padding.
        """
        is_word = targets != IGNORED
        if not self._is_mean:
            return outputs[is_word]
        return torch.where(is_word.unsqueeze(2), outputs, outputs.detach()).transpose(1, 2)


class Perplexity(Evaluation):
    """Loss, share of words predicted right, and ``exp`` of the mean loss; every word counts once.

    Args:
        device: where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, indices: list[int], outputs: Tensor, targets: Tensor) -> None:
        """See `Evaluation.add`."""
        loss = losses.token_cross_entropy(outputs, targets).double()
        correct = (outputs.argmax(dim=2) == targets).sum().double()
        self._sums += torch.stack([loss, correct, (targets != IGNORED).sum().double()])

    def result(self) -> Evaluated:
        """See `Evaluation.result`; a perplexity beyond all numbers is infinite."""
        loss, correct, count = dist.all_reduce_sum(self._sums).tolist()
        sums = Sums(loss, correct, int(count))
        try:
            perplexity = math.exp(sums.mean_loss)
        except OverflowError:
            perplexity = math.inf
        return Evaluated(sums, scores={"perplexity": perplexity})


class Translation(Words):
    """Words of a translation, scored by BLEU as well.

    Args:
        samples: the set that is evaluated.
        decoding: how translations are written.
        smoothing: of labels, in training.

    Raises:
        SettingError: sacrebleu is not installed.
    """

    def __init__(self, samples: Pairs, decoding: Decoding, smoothing: float = 0.0) -> None:
        super().__init__(smoothing)
        self._samples, self._decoding = samples, decoding
        _sacrebleu()

    def evaluation(self, device: torch.device, *, is_full: bool = True) -> Evaluation:
        """Returns an evaluation by perplexity, and BLEU if it is full."""
        return Bleu(self._samples, self._decoding, device) if is_full else Perplexity(device)


class Bleu(Perplexity):
    """Perplexity, and BLEU of what beam search writes, by sacrebleu with its own tokenization.

    Args:
        samples: the set that is evaluated.
        decoding: how translations are written.
        device: where the model computes.
    """

    def __init__(self, samples: Pairs, decoding: Decoding, device: torch.device) -> None:
        super().__init__(device)
        self._samples, self._device = samples, device
        self._rules = beam.Rules(START, END, decoding.beam, decoding.length_penalty, decoding.max_words)
        self._written: dict[int, str] = {}

    def look(self, model: nn.Module, indices: list[int], inputs: tuple[Tensor, ...]) -> None:
        """Translates a batch.

        Raises:
            TypeError: the model is no `Transformer`.
        """
        if not isinstance(model, Transformer):
            raise TypeError(f"{type(model).__name__} does not translate")
        sentences = beam.search(next_word(model, inputs[0]), len(indices), self._rules, self._device)
        language = self._samples.languages[1]
        for index, sentence in zip(indices, sentences, strict=True):
            self._written[index] = " ".join(language.decode(sentence))

    def result(self) -> Evaluated:
        """See `Evaluation.result`."""
        plain = super().result()
        gathered = dist.gather_objects(self._written)
        score = None
        if gathered is not None:
            written = {index: text for part in gathered for index, text in part.items()}
            hypotheses = [written[index] for index in range(len(self._samples))]
            score = bleu(hypotheses, self._samples.references, lowercase=self._samples.lowercase)
        scores = {**plain.scores, "bleu": dist.broadcast_object(score)}
        return Evaluated(plain.sums, scores=scores)


def next_word(model: Transformer, source: Tensor) -> beam.NextWord:
    """Returns a model's log-probabilities of the next word, for beam search.

    Args:
        model: in evaluation mode.
        source: the sentences to translate, ``(n, s)``.
    """
    with torch.no_grad():
        memory = model.encode(source)

    def following(words: Tensor, rows: Tensor) -> Tensor:
        logits = model.decode(words, memory[rows], source[rows])[:, -1]
        return logits.float().log_softmax(dim=1)

    return following


def bleu(hypotheses: list[str], references: list[str], *, lowercase: bool) -> float:
    """Returns the corpus's BLEU from 0 to 100 (Papineni et al., ACL 2002), as sacrebleu defines it.

    Args:
        hypotheses: what the model wrote.
        references: what it should have written.
        lowercase: whether case does not count.
    """
    score: float = _sacrebleu().corpus_bleu(hypotheses, [references], lowercase=lowercase).score
    return score


def _sacrebleu() -> ModuleType:
    try:
        return importlib.import_module("sacrebleu")
    except ImportError as error:
        raise SettingError("BLEU needs the package sacrebleu: pip install 'hpcsngd[text]'") from error


def language_modelling(config: Experiment, classes: int, samples: Samples) -> Task:
    """Returns the task of an experiment on a long text."""
    return Words(config.loss.label_smoothing, is_mean=config.loss.average == "tokens")


def translation(config: Experiment, classes: int, samples: Samples) -> Task:
    """Returns the task of an experiment on sentence pairs.

    Raises:
        TypeError: they are none.
    """
    if not isinstance(samples, Pairs):
        raise TypeError(f"{type(samples).__name__} are no sentence pairs")
    return Translation(samples, config.decoding, config.loss.label_smoothing)


TASKS: dict[str, Callable[[Experiment, int, Samples], Task]] = {
    "language_modelling": language_modelling,
    "translation": translation,
    **ENCODER_TASKS,
}
