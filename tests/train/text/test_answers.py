from __future__ import annotations

import numpy as np
import pytest

from hpcsngd.train.text.answers import Best, best_span, exact_match_and_f1

INSIDE = np.array([False, True, True, True, True, False])


def test_the_best_span_maximizes_the_sum_over_allowed_pairs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        begins, ends = rng.normal(size=(2, 6))
        pairs = [(begins[a] + ends[b], a, b) for a in range(1, 5) for b in range(a, min(a + 2, 5))]
        score, first, last = max(pairs)
        found = best_span(begins, ends, INSIDE, max_tokens=2)
        assert found == (pytest.approx(score), first, last)


def test_only_the_likeliest_ends_are_paired() -> None:
    begins, ends = np.array([0.0, 1, 2, 9, 0, 0]), np.array([0.0, 9, 8, 1, 0, 0])
    # of two each: beginnings 3 and 2, ends 1 and 2
    assert best_span(begins, ends, INSIDE, n_best=2) == (10, 2, 2)
    assert best_span(begins, ends, INSIDE, n_best=1) is None
    assert best_span(begins, ends, np.zeros(6, dtype=bool)) is None


SPANS = np.array([[-1, -1], [0, 3], [4, 7], [8, 11], [12, 15], [-1, -1]])
CONTEXT = "one two six ten"


def logits(begin: int, end: int, height: float, null: float) -> tuple[np.ndarray, np.ndarray]:
    begins, ends = np.zeros((2, 6))
    begins[begin], ends[end] = height, height
    begins[0] = ends[0] = null
    return begins, ends


def test_the_best_window_answers() -> None:
    best = Best()
    best.add(*logits(1, 1, 1.0, 0), SPANS, 0)
    best.add(*logits(2, 3, 2.0, 0), SPANS, 0)
    best.add(*logits(4, 4, 1.5, 0), SPANS, 0)
    assert best.score == 4
    assert best.text(CONTEXT, may_be_none=False) == "two six"


def test_no_answer_needs_every_window_to_say_so() -> None:
    best = Best()
    best.add(*logits(1, 1, 1.0, 3.0), SPANS, 0)
    assert best.null == 6
    assert best.text(CONTEXT, may_be_none=True) == ""
    assert best.text(CONTEXT, may_be_none=False) == "one"
    best.add(*logits(2, 2, 0.5, 0.9), SPANS, 0)
    assert best.null == pytest.approx(1.8)
    assert best.text(CONTEXT, may_be_none=True) == "one"


def test_the_threshold_is_of_the_difference() -> None:
    best = Best()
    best.add(*logits(1, 1, 1.0, 1.25), SPANS, 0)
    assert best.text(CONTEXT, may_be_none=True, threshold=0.49) == ""
    assert best.text(CONTEXT, may_be_none=True, threshold=0.5) == "one"
    assert Best().text(CONTEXT, may_be_none=False) == ""


@pytest.mark.parametrize(
    ("answer", "marked", "exact", "f1"),
    [
        ("The Cat!", ["cat"], 1, 1),
        ("the old  cat", ["cat", "old dog"], 0, 2 * 1 * 0.5 / 1.5),
        # two of three words said, two of four marked
        ("red cat here", ["the red old cat of"], 0, 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("dog", ["cat"], 0, 0),
    ],
)
def test_answers_are_scored_as_by_hand(answer: str, marked: list[str], exact: float, f1: float) -> None:
    assert exact_match_and_f1(answer, marked) == (exact, pytest.approx(f1, rel=1e-6))
