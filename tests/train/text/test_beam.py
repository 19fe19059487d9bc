from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hpcsngd.train.text.beam import Rules, search

CPU = torch.device("cpu")
START, END, WORDS, LONGEST = 0, 1, 4, 4


class Table:
    """A model with a random distribution of the next word after every beginning, another for each task."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        beginnings = [
            (task, START, *words)
            for task in range(3)
            for length in range(LONGEST)
            for words in itertools.product(range(WORDS), repeat=length)
        ]
        drawn = 2 * torch.randn(len(beginnings), WORDS, generator=generator, dtype=torch.float64)
        self.next = dict(zip(beginnings, drawn.log_softmax(1), strict=True))

    def __call__(self, words: Tensor, rows: Tensor) -> Tensor:
        pairs = zip(rows.tolist(), words.tolist(), strict=True)
        return torch.stack([self.next[(task, *sentence)] for task, sentence in pairs])

    def best(self, task: int, power: float) -> list[int]:
        """Returns the best of all sentences."""
        found = {}
        for length in range(1, LONGEST + 1):
            for words in itertools.product(range(WORDS), repeat=length):
                if END in words[:-1] or (words[-1] != END and length < LONGEST):
                    continue
                value = sum(
                    float(self.next[(task, START, *words[:place])][word]) for place, word in enumerate(words)
                )
                found[words] = value / length**power
        best = max(found, key=lambda words: found[words])
        return list(best[:-1] if best[-1] == END else best)


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_as_wide_as_everything_finds_the_best(seed: int, power: float) -> None:
    model = Table(seed)
    rules = Rules(START, END, WORDS**LONGEST, power, LONGEST)
    assert search(model, 3, rules, CPU) == [model.best(task, power) for task in range(3)]


def test_a_beam_of_one_takes_the_best_word_each_time() -> None:
    model, expected = Table(), []
    for task in range(3):
        words: list[int] = []
        while len(words) < LONGEST:
            words.append(int(model.next[(task, START, *words)].argmax()))
            if words[-1] == END:
                break
        expected.append([word for word in words if word != END])
    assert search(model, 3, Rules(START, END, 1, 0.7, LONGEST), CPU) == expected


def test_wider_beams_find_likelier_sentences_and_tasks_do_not_meddle() -> None:
    def value(model: Table, task: int, words: list[int]) -> float:
        ended = [*words, END] if len(words) < LONGEST else words
        return sum(float(model.next[(task, START, *ended[:place])][word]) for place, word in enumerate(ended))

    gains = []
    for seed in range(10):
        model = Table(seed)
        narrow, wide = (search(model, 3, Rules(START, END, beam, 0.0, LONGEST), CPU) for beam in (1, 3))
        for task in range(3):
            one = search(
                lambda words, rows, model=model, task=task: model(words, rows + task),
                1,
                Rules(START, END, 3, 0.0, LONGEST),
                CPU,
            )
            assert one == [wide[task]]
            gains.append(value(model, task, wide[task]) - value(model, task, narrow[task]))
    assert math.fsum(gains) > 0
    assert max(gains) > 0.1


def test_nothing_at_all_is_a_sentence() -> None:
    def silent(words: Tensor, rows: Tensor) -> Tensor:
        return torch.tensor([[-9.0, -0.1, -9.0, -9.0]]).expand(len(rows), -1)

    assert search(silent, 2, Rules(START, END, 2, 0.7, 3), CPU) == [[], []]
