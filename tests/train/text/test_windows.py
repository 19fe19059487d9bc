from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsngd.train.faults import SettingError
from hpcsngd.train.text.squad import Question
from hpcsngd.train.text.windows import Window, Windows, cut

CONTEXT = "the cat is red. the old dog was green. a bad house is blue. the river is white."
QUESTIONS = [
    Question("q0", "what color is the dog?", CONTEXT, [("green", CONTEXT.index("green"))]),
    Question("q1", "what color is the sky?", CONTEXT, []),
    Question("q2", "which was old?", CONTEXT, [("old dog", 20), ("dog", 24)]),
]


def windows(tokenizer: Any, questions: list[Question], max_length: int, stride: int) -> list[Window]:
    return list(cut(tokenizer, questions, max_length, stride))


def said(window: Window, question: Question) -> str | None:
    """Returns the text of a window's target; None for the class token."""
    first, last = window.target(question)
    if first == last == window.null:
        return None
    return question.context[window.spans[first][0] : window.spans[last][1]]


def test_a_short_paragraph_is_one_window_with_its_answer(tokenizer: Any) -> None:
    found = windows(tokenizer, QUESTIONS, 60, 8)
    assert [window.question for window in found] == [0, 1, 2]
    assert [said(window, QUESTIONS[window.question]) for window in found] == ["green", None, "old dog"]
    assert [window.null for window in found] == [0, 0, 0]


def test_windows_overlap_by_the_stride_and_cover_the_paragraph(tokenizer: Any) -> None:
    stride = 5
    found = windows(tokenizer, QUESTIONS[:1], 20, stride)
    assert len(found) > 2
    parts = [[span for span in window.spans if span != (-1, -1)] for window in found]
    for before, after in itertools.pairwise(parts):
        assert before[-stride:] == after[:stride]
        assert after[stride:][0][0] >= before[-1][1]
    whole = windows(tokenizer, QUESTIONS[:1], 60, 0)[0]
    covered = {span for part in parts for span in part}
    assert covered == {span for span in whole.spans if span != (-1, -1)}
    assert max(len(window.ids) for window in found) == 20


def test_only_windows_with_the_whole_answer_are_told_it(tokenizer: Any) -> None:
    found = windows(tokenizer, QUESTIONS[2:], 16, 3)
    texts = [said(window, QUESTIONS[2]) for window in found]
    assert "old dog" in texts
    assert None in texts
    for window, text in zip(found, texts, strict=True):
        spans = [span for span in window.spans if span != (-1, -1)]
        is_inside = spans[0][0] <= 20 and spans[-1][1] >= 27
        assert (text == "old dog") == is_inside


def test_an_answer_inside_a_word_is_the_tokens_around_it(tokenizer: Any) -> None:
    context = "a cat-house is old"
    question = Question("q", "what is old?", context, [("house", 6)])
    (window,) = windows(tokenizer, [question], 40, 4)
    assert said(window, question) == "house"
    part = Question("q", "what is old?", context, [("hous", 6)])
    assert said(windows(tokenizer, [part], 40, 4)[0], part) == "house"


@pytest.mark.parametrize(("length", "stride"), [(8, 2), (16, 14)])
def test_no_room_for_a_paragraph_is_an_error(tokenizer: Any, length: int, stride: int) -> None:
    with pytest.raises(
        SettingError,
        match=rf"question q1 leaves room for {length - 11} tokens .* raise data\.max_length={length}",
    ):
        windows(tokenizer, QUESTIONS, length, stride)


def samples(tokenizer: Any) -> Windows:
    found = windows(tokenizer, QUESTIONS, 24, 6)
    return Windows(Path("encoder"), QUESTIONS, found, length=24, padding=tokenizer.pad_token_id)


def test_windows_are_padded_and_masked(tokenizer: Any) -> None:
    part = samples(tokenizer)
    tokens, targets = part[list(range(len(part)))]
    assert tokens.shape == (len(part), 3, 24)
    assert targets.shape == (len(part), 2)
    ids, mask, types = tokens.unbind(1)
    assert (ids[mask == 0] == tokenizer.pad_token_id).all()
    assert (types[mask == 0] == 0).all()
    for index in range(len(part)):
        assert int(mask[index].sum()) == len(part.spans(index))
        inside = part.spans(index)[:, 0] >= 0
        assert (types[index, : len(inside)][inside] == 1).all()
    assert part.example(2)[0].equal(tokens[:2])


def test_groups_are_the_questions_also_of_a_part(tokenizer: Any) -> None:
    whole = samples(tokenizer)
    counts = whole.groups
    assert list(counts) == ["q0", "q1", "q2"]
    assert sum(counts.values()) == len(whole)
    last = len(whole) - 1
    part = whole.subset(torch.tensor([last, 0, counts["q0"]]))
    assert part.groups == {"q0": 1, "q1": 1, "q2": 1}
    assert [part.question(index) for index in range(3)] == [0, 1, 2]
    assert part[[2]][0].equal(whole[[last]][0])
    assert part.spans(2).equal(whole.spans(last))
