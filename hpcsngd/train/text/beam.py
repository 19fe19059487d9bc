"""Beam search: the likeliest sentences by a model that says the next word."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Given beginnings ``(m, t)`` and whose they are ``(m,)``, log-probabilities of the next word ``(m, words)``.
NextWord = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rules:
    """How to search.

    Attributes:
        start: the word that every sentence begins with; not part of the result.
        end: the word that ends it; not part of the result.
        beam: beginnings that are kept at each word.
        length_penalty: sentences compare by log-probability over their length, `end` included, to this power.
        max_words: after so many words a sentence ends as it is.
    """

    start: int
    end: int
    beam: int
    length_penalty: float
    max_words: int


@torch.no_grad()
def search(next_word: NextWord, count: int, rules: Rules, device: torch.device) -> list[list[int]]:
    """Returns the best sentence found for each of ``count`` tasks.

    A task is over when it has as many finished sentences as the beam is wide.

    Args:
        next_word: the model.
        count: how many tasks.
        rules: see there.
        device: where the model computes.
    """
    beam, rows = rules.beam, torch.arange(count, device=device)
    words = torch.full((count, beam, 1), rules.start, device=device)
    # all beams begin alike, so that only one of them counts at first
    scores = torch.full((count, beam), -math.inf, device=device)
    scores[:, 0] = 0.0
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(count)]
    for length in range(1, rules.max_words + 1):
        flat = words.flatten(0, 1)
        following = next_word(flat, rows.repeat_interleave(beam)).reshape(len(rows), beam, -1)
        vocabulary = following.shape[2]
        # of 2 x beam candidates at most beam are ends, so that beam beginnings are left
        wide = min(2 * beam, beam * vocabulary)
        total, place = (scores[:, :, None] + following).flatten(1).topk(wide, dim=1)
        parent, word = place // vocabulary, place % vocabulary
        is_end = word == rules.end
        for task, value, sentence in _ended(words, total, parent, is_end):
            finished[int(rows[task])].append((value / length**rules.length_penalty, sentence))
        scores, kept = total.masked_fill(is_end, -math.inf).topk(beam, dim=1)
        words = torch.cat([_chosen(words, parent.gather(1, kept)), word.gather(1, kept).unsqueeze(2)], dim=2)
        busy = torch.tensor([len(finished[row]) < beam for row in rows.tolist()], device=device)
        rows, words, scores = rows[busy], words[busy], scores[busy]
        if not len(rows):
            break
    for row, sentences, values in zip(rows.tolist(), words.tolist(), scores.tolist(), strict=True):
        penalty = rules.max_words**rules.length_penalty
        finished[row] += [
            (value / penalty, sentence[1:]) for value, sentence in zip(values, sentences, strict=True)
        ]
    # the first of equal ones
    return [max(found, key=lambda each: each[0])[1] for found in finished]


def _ended(
    words: Tensor, total: Tensor, parent: Tensor, is_end: Tensor
) -> Iterator[tuple[int, float, list[int]]]:
    """Yields task, log-probability and words of the candidates that end a sentence."""
    # an end counts only among the best that the beam has room for
    for task, candidate in is_end[:, : words.shape[1]].nonzero().tolist():
        value = float(total[task, candidate])
        if math.isfinite(value):
            yield task, value, words[task, int(parent[task, candidate]), 1:].tolist()


def _chosen(words: Tensor, parents: Tensor) -> Tensor:
    """Returns the beginnings of the parents, ``(tasks, beam, length)``."""
    return words.gather(1, parents.unsqueeze(2).expand(-1, -1, words.shape[2]))
