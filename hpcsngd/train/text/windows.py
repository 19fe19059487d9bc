"""Questions with their paragraphs as an encoder takes them: in windows, where a paragraph is too long.

Windows of one paragraph overlap by `stride` tokens. A window's target is where its first answer begins and
ends, in tokens; if the answer is not all in it, or there is none, both are the place of the class token
(Devlin et al., 2019, sections 4.2 and 4.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from hpcsngd.train.faults import SettingError
from hpcsngd.train.text.encoded import CHUNK, Encoded, Tokens
from hpcsngd.train.text.squad import Question

_NOWHERE = (-1, -1)


@dataclass(frozen=True)
class Window:
    """One window.

    Attributes:
        question: which question it is of.
        ids: its tokens.
        types: which sentence they are of.
        spans: first character and end of each token in the context; (-1, -1) for tokens of anything else.
        null: place of the class token.
    """

    question: int
    ids: Sequence[int]
    types: Sequence[int]
    spans: Sequence[tuple[int, int]]
    null: int

    def target(self, question: Question) -> tuple[int, int]:
        """Returns the tokens in which the question's first answer begins and ends, or the class token."""
        if not question.answers:
            return self.null, self.null
        text, start = question.answers[0]
        end = start + len(text)
        inside = [place for place, span in enumerate(self.spans) if span != _NOWHERE]
        if not inside or self.spans[inside[0]][0] > start or self.spans[inside[-1]][1] < end:
            return self.null, self.null
        first = max(place for place in inside if self.spans[place][0] <= start)
        last = min(place for place in inside if self.spans[place][1] >= end)
        return first, last


def cut(tokenizer: Any, questions: Sequence[Question], max_length: int, stride: int) -> Iterator[Window]:
    """Yields the windows of questions, question by question.

    Args:
        tokenizer: of transformers, a fast one.
        questions: see `hpcsngd.train.text.squad`.
        max_length: of a window, in tokens, question and separators included.
        stride: tokens that neighboring windows share.

    Raises:
        SettingError: a question leaves no room for its paragraph.
    """
    for first in range(0, len(questions), CHUNK):
        some = questions[first : first + CHUNK]
        _check_room(tokenizer, some, max_length, stride)
        found = tokenizer(
            [question.text for question in some],
            [question.context for question in some],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        for row, index in enumerate(found["overflow_to_sample_mapping"]):
            ids = found["input_ids"][row]
            is_context = [part == 1 for part in found.sequence_ids(row)]
            spans = [
                span if inside else _NOWHERE
                for span, inside in zip(found["offset_mapping"][row], is_context, strict=True)
            ]
            yield Window(
                first + index, ids, found["token_type_ids"][row], spans, ids.index(tokenizer.cls_token_id)
            )


def _check_room(tokenizer: Any, questions: Sequence[Question], max_length: int, stride: int) -> None:
    """Raises SettingError where windows could not move on; the tokenizer itself would end the process."""
    found = tokenizer([question.text for question in questions], add_special_tokens=False)["input_ids"]
    longest = max(range(len(found)), key=lambda index: len(found[index]))
    room = max_length - len(found[longest]) - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= stride:
        raise SettingError(
            f"question {questions[longest].name} leaves room for {room} tokens of its paragraph: more than "
            f"data.doc_stride={stride} are needed; raise data.max_length={max_length}"
        )


class Windows(Encoded):
    """Windows of questions; targets are the tokens in which the answer begins and ends, ``(n, 2)``.

    Attributes:
        questions: all of the file's, by number.

    Args:
        encoder: folder of the encoder whose tokenizer made the tokens.
        questions: see above.
        windows: theirs, question by question.
        length: that all are padded to.
        padding: id of the token for that.
    """

    def __init__(
        self,
        encoder: Path,
        questions: Sequence[Question],
        windows: Iterable[Window],
        *,
        length: int,
        padding: int,
    ) -> None:
        facts: list[tuple[int, int, tuple[int, int], Tensor]] = []

        def parts() -> Iterator[tuple[Sequence[int], Sequence[int]]]:
            # one window at a time: as Python's numbers, all of SQuAD would take gigabytes on each rank
            for window in windows:
                target = window.target(questions[window.question])
                spans = torch.tensor(window.spans, dtype=torch.int32)
                facts.append((window.question, window.null, target, spans))
                yield window.ids, window.types

        tokens = Tokens.joined(parts())
        numbers, nulls, targets, spans = zip(*facts, strict=True)
        super().__init__(encoder, tokens, torch.tensor(targets), length=length, padding=padding)
        self.questions = questions
        self._question, self._nulls = torch.tensor(numbers), torch.tensor(nulls)
        self._spans = torch.cat(spans)

    @property
    def groups(self) -> dict[str, int]:
        """Returns how many windows each question has, in order: one rank scores all of them."""
        numbers = self._question[self._chosen].tolist()
        return {self.questions[number].name: len(list(group)) for number, group in groupby(numbers)}

    def subset(self, chosen: Tensor) -> Self:
        """Returns the windows with these indices, question by question."""
        return super().subset(chosen.sort().values)

    def question(self, index: int) -> int:
        """Returns the number of the question that a window is of."""
        return int(self._question[self._chosen[index]])

    def spans(self, index: int) -> Tensor:
        """Returns first character and end of each of a window's tokens, ``(tokens, 2)``; -1 outside."""
        start, end = self._tokens.starts[self._chosen[index] :][:2].tolist()
        return self._spans[start:end]

    def null(self, index: int) -> int:
        """Returns the place of a window's class token."""
        return int(self._nulls[self._chosen[index]])
