"""SQuAD v1.1 and v2: questions about paragraphs, in the published JSON.

Layout: ``{"version", "data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers":
[{"text", "answer_start"}], "is_impossible"}]}]}]}``; ``is_impossible`` and ``plausible_answers`` are v2's.

Source: Rajpurkar et al., EMNLP 2016 and ACL 2018.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcsngd.train.faults import MissingDataError


@dataclass(frozen=True)
class Question:
    """A question about a paragraph.

    Attributes:
        name: its id, unique in a file.
        text: the question.
        context: the paragraph.
        answers: texts that people marked, with the place of their first character; none if there is none.
    """

    name: str
    text: str
    context: str
    answers: Sequence[tuple[str, int]]


def read(file: Path, *, may_be_impossible: bool) -> list[Question]:
    """Returns the questions of a file, in its order.

    Args:
        file: JSON in the published layout.
        may_be_impossible: whether there may be questions without an answer: v2.

    Raises:
        MissingDataError: the file is not of this layout, an answer is not where it is said to be, a question
            has no answer in v1.1, or there are no questions; the message names file and question.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        questions = list(_questions(content))
    except (OSError, ValueError) as error:
        raise MissingDataError(f"cannot read {file}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise MissingDataError(f"{file} is not laid out as SQuAD: {type(error).__name__} {error}") from error
    for question in questions:
        _check(file, question, may_be_impossible)
    if not questions:
        raise MissingDataError(f"{file} has no questions")
    if len({question.name for question in questions}) != len(questions):
        raise MissingDataError(f"{file}: two questions have the same id")
    return questions


def _questions(content: dict[str, Any]) -> Iterator[Question]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for entry in paragraph["qas"]:
                is_impossible = entry.get("is_impossible", False)
                answers = [] if is_impossible else entry["answers"]
                marked = tuple((answer["text"], answer["answer_start"]) for answer in answers)
                # some questions begin with many blanks, which tokenizers drop but cut the text by
                yield Question(entry["id"], entry["question"].lstrip(), paragraph["context"], marked)


def _check(file: Path, question: Question, may_be_impossible: bool) -> None:
    if not question.answers and not may_be_impossible:
        raise MissingDataError(
            f"{file}: question {question.name} has no answer; is this SQuAD v2 (data.name: squadv2)?"
        )
    for text, start in question.answers:
        if question.context[start : start + len(text)] != text:
            raise MissingDataError(
                f"{file}: question {question.name}: answer {text!r} is not at character {start}"
            )
