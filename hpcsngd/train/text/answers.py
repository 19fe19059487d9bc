"""From the logits of a question's windows to its answer, and how good that answer is.

The score of a span is the logit of its first token as a beginning plus that of its last as an end. Of each
window the `n_best` likeliest beginnings and ends are paired; a span must lie in the paragraph, must not end
before it begins, and must not be longer than `max_tokens`. The score of no answer is the lowest, over the
windows, of the class token's sum: a question has no answer only if every window says so (Devlin et al.,
2019, section 4.3). As in the published evaluations n_best is 20, max_tokens 30 and the threshold 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpcsngd.train.text import hub

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

N_BEST, MAX_TOKENS, NULL_THRESHOLD = 20, 30, 0.0


@dataclass
class Best:
    """The best answer to a question in the windows seen so far.

    Attributes:
        score: of the best span; minus infinity where no window has any.
        span: its first character in the paragraph and its end.
        null: the lowest score of no answer.
    """

    score: float = -math.inf
    span: tuple[int, int] = (0, 0)
    null: float = math.inf

    def add(self, begins: Floats, ends: Floats, spans: Places, null: int) -> None:
        """Takes a window; of equal spans the one that came first stays.

        Args:
            begins: logits of the tokens as beginnings, ``(tokens,)``.
            ends: as ends.
            spans: first character and end of each token, ``(tokens, 2)``; -1 outside of the paragraph.
            null: place of the class token.
        """
        self.null = min(self.null, float(begins[null] + ends[null]))
        found = best_span(begins, ends, spans[:, 0] >= 0)
        if found is not None and found[0] > self.score:
            score, first, last = found
            self.score, self.span = score, (int(spans[first, 0]), int(spans[last, 1]))

    def text(self, context: str, *, may_be_none: bool, threshold: float = NULL_THRESHOLD) -> str:
        """Returns the answer; nothing where there is none.

        Args:
            context: the paragraph.
            may_be_none: whether a question may have no answer: SQuAD v2.
            threshold: by how much no answer must be above the best span.
        """
        is_none = self.score == -math.inf or (may_be_none and self.null - self.score > threshold)
        return "" if is_none else context[slice(*self.span)]


def best_span(
    begins: Floats,
    ends: Floats,
    inside: npt.NDArray[np.bool_],
    *,
    n_best: int = N_BEST,
    max_tokens: int = MAX_TOKENS,
) -> tuple[float, int, int] | None:
    """Returns score, first and last token of a window's best span; None if no pair is allowed.

    Args:
        begins: logits of the tokens as beginnings, ``(tokens,)``.
        ends: as ends.
        inside: which tokens are in the paragraph.
        n_best: how many beginnings and ends are paired.
        max_tokens: of a span.
    """
    firsts, lasts = (np.argsort(-logits, kind="stable")[:n_best] for logits in (begins, ends))
    first, last = firsts[:, None], lasts[None, :]
    allowed = inside[first] & inside[last] & (last >= first) & (last - first < max_tokens)
    if not allowed.any():
        return None
    scores = np.where(allowed, begins[first] + ends[last], -np.inf)
    row, column = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[row, column]), int(firsts[row]), int(lasts[column])


def exact_match_and_f1(answer: str, marked: Sequence[str]) -> tuple[float, float]:
    """Returns both scores of an answer, from 0 to 1, by torchmetrics: the best over what people marked.

    Case, punctuation, articles and white space do not count. Where nothing is marked, no answer is right.

    Args:
        answer: nothing for no answer.
        marked: the right answers.
    """
    right = [text for text in marked if text] or [""]
    found = hub.torchmetrics_text().squad(
        {"prediction_text": answer, "id": "0"},
        {"answers": {"answer_start": [0] * len(right), "text": right}, "id": "0"},
    )
    return float(found["exact_match"]) / 100, float(found["f1"]) / 100
