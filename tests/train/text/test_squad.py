from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hpcsngd.train.faults import MissingDataError
from hpcsngd.train.text.squad import read

CONTEXT = "Ada wrote the note G in 1843. It has \u201cquotes\u201d."


def v2() -> dict[str, Any]:
    """Returns a file of version 2 with one question that has answers and one that has none."""
    answers = [{"text": "1843", "answer_start": 24}, {"text": "in 1843", "answer_start": 21}]
    return {
        "version": "v2.0",
        "data": [
            {
                "title": "Note",
                "paragraphs": [
                    {
                        "context": CONTEXT,
                        "qas": [
                            {
                                "id": "56be85543aeaaa14008c9063",
                                "question": "  When was it written?",
                                "answers": answers,
                                "is_impossible": False,
                            },
                            {
                                "id": "5ad39d53604f3c001a3fe8d1",
                                "question": "Who read it?",
                                "answers": [],
                                "is_impossible": True,
                                "plausible_answers": [{"text": "Ada", "answer_start": 0}],
                            },
                        ],
                    }
                ],
            }
        ],
    }


def write(folder: Path, content: Any) -> Path:
    file = folder / "dev.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def test_questions_with_and_without_answers_are_read(tmp_path: Path) -> None:
    first, second = read(write(tmp_path, v2()), may_be_impossible=True)
    assert (first.name, first.text, first.context) == (
        "56be85543aeaaa14008c9063",
        "When was it written?",
        CONTEXT,
    )
    assert first.answers == (("1843", 24), ("in 1843", 21))
    assert (second.name, second.answers) == ("5ad39d53604f3c001a3fe8d1", ())


def test_version_1_has_no_word_on_impossible(tmp_path: Path) -> None:
    content = v2()
    entries = content["data"][0]["paragraphs"][0]["qas"]
    del entries[1], entries[0]["is_impossible"]
    (only,) = read(write(tmp_path, content), may_be_impossible=False)
    assert only.answers[0] == ("1843", 24)


def changed(change: str) -> Any:
    content = copy.deepcopy(v2())
    paragraph = content["data"][0]["paragraphs"][0]
    entry = paragraph["qas"][0]
    match change:
        case "place":
            entry["answers"][0]["answer_start"] = 23
        case "key":
            del paragraph["context"]
        case "twice":
            paragraph["qas"][1]["id"] = entry["id"]
        case "empty":
            content["data"] = []
        case "list":
            return [content]
    return content


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("place", "question 56be85543aeaaa14008c9063: answer '1843' is not at character 23"),
        ("key", "is not laid out as SQuAD: KeyError 'context'"),
        ("list", "is not laid out as SQuAD: TypeError"),
        ("twice", "two questions have the same id"),
        ("empty", "has no questions"),
    ],
)
def test_what_is_wrong_is_named(change: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=problem):
        read(write(tmp_path, changed(change)), may_be_impossible=True)


def test_version_2_as_version_1_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MissingDataError, match=r"question 5ad39d53604f3c001a3fe8d1 has no answer; is this SQuAD v2"
    ):
        read(write(tmp_path, v2()), may_be_impossible=False)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text('{"data": [')
    for name in ("dev.json", "absent.json"):
        with pytest.raises(MissingDataError, match=f"cannot read .*{name}"):
            read(tmp_path / name, may_be_impossible=True)
