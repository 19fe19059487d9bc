"""Writes tiny files of GLUE and SQuAD in their true formats, and a tiny encoder that can read them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpcsngd.config.catalogue import SMALL_ENCODER
from hpcsngd.train.text import hub

_THINGS = ("cat", "dog", "house", "river", "train", "garden", "letter", "window")
_COLORS = ("red", "green", "blue", "white")
_WORDS = (
    *_THINGS,
    *_COLORS,
    *("the", "a", "is", "was", "not", "and", "which", "what", "color", "of", "near", "old", "good", "bad"),
)
_MARKS = ".,?!\"'-"


def encoder(root: Path) -> None:
    """Writes a BERT of two narrow layers with drawn weights and a WordPiece vocabulary, unless it is there.

    Args:
        root: the data root.
    """
    import torch

    library, folder = hub.transformers(), root / SMALL_ENCODER
    if folder.exists():
        return
    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_MARKS, *letters]
    vocabulary += [f"##{letter}" for letter in letters] + [word for word in _WORDS if len(word) > 1]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64})
    )
    config = library.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        library.BertModel(config).save_pretrained(folder)


def glue(name: str, root: Path, counts: tuple[int, int]) -> None:
    """Writes the files of a GLUE task, and the encoder.

    Args:
        name: of the data set.
        root: the data root.
        counts: examples to train and to evaluate.
    """
    encoder(root)
    folder, columns, files, labels = GLUE[name]
    (root / folder).mkdir(parents=True, exist_ok=True)
    for file, count in zip(files, (counts[0], *[counts[1]] * (len(files) - 1)), strict=True):
        names = [column.format(file=file) for column in columns]
        if name == "mnli" and file != "train.tsv":
            names[-2:] = [f"label{number}" for number in range(1, 6)] + ["gold_label"]
        lines = ["\t".join(names)] if name != "cola" else []
        for index in range(count):
            label = labels[index % len(labels)]
            lines.append("\t".join(_cell(column, index, label, index % len(labels)) for column in names))
        (root / folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _cell(column: str, index: int, label: str, number: int) -> str:
    """Returns what a column of the line ``index`` says; its text fits the label, which is a color in it."""
    thing, color = _THINGS[index % len(_THINGS)], _COLORS[number % len(_COLORS)]
    if column in ("sentence1", "question", "question1", "#1 String"):
        # an open quotation mark, as real lines have
        return f'the {thing} is "{color}' if column != "question" else f"what color is the {thing}?"
    if column in ("sentence2", "sentence", "question2", "#2 String"):
        return f"the old {thing} was {color}, not {_COLORS[(number + 1) % len(_COLORS)]}."
    if column.startswith(("label", "gold")) or column in ("Quality", "score", "is_duplicate"):
        return label
    return str(index)


_MNLI = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
    "sentence2_parse sentence1 sentence2 label1 gold_label"
)
_STSB = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
_MEANT = ("entailment", "not_entailment")
_Facts = tuple[str, Sequence[str], Sequence[str], Sequence[str]]

#: Folder, columns, files and labels.
GLUE: dict[str, _Facts] = {
    "cola": ("CoLA", ["source", "label", "mark", "sentence"], ["train.tsv", "dev.tsv"], ["0", "1"]),
    "sst2": ("SST-2", ["sentence", "label"], ["train.tsv", "dev.tsv"], ["0", "1"]),
    "mrpc": (
        "MRPC",
        ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        ["train.tsv", "dev.tsv"],
        ["0", "1"],
    ),
    "qqp": (
        "QQP",
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        ["train.tsv", "dev.tsv"],
        ["0", "1"],
    ),
    "stsb": (
        "STS-B",
        _STSB.split(),
        ["train.tsv", "dev.tsv"],
        ["0.000", "1.600", "3.250", "5.000"],
    ),
    "mnli": (
        "MNLI",
        _MNLI.split(),
        ["train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"],
        ["entailment", "neutral", "contradiction"],
    ),
    "qnli": ("QNLI", ["index", "question", "sentence", "label"], ["train.tsv", "dev.tsv"], _MEANT),
    "rte": ("RTE", ["index", "sentence1", "sentence2", "label"], ["train.tsv", "dev.tsv"], _MEANT),
    "wnli": ("WNLI", ["index", "sentence1", "sentence2", "label"], ["train.tsv", "dev.tsv"], ["0", "1"]),
}


def squad(version: str, root: Path, counts: tuple[int, int]) -> None:
    """Writes the files of SQuAD, and the encoder.

    Args:
        version: ``v1.1`` or ``v2.0``, of whose questions every third has no answer.
        root: the data root.
        counts: questions to train and to evaluate.
    """
    encoder(root)
    folder = root / f"squad-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in zip(("train", "dev"), counts, strict=True):
        paragraphs = list(_paragraphs(part, count, has_impossible=version == "v2.0"))
        content = {"version": version.removesuffix(".0") + ".0" * (version == "v2.0")}
        articles = {"data": [{"title": "Colors", "paragraphs": paragraphs}]}
        (folder / f"{part}-{version}.json").write_text(json.dumps(articles | content), encoding="utf-8")


def _paragraphs(part: str, count: int, *, has_impossible: bool) -> Iterator[dict[str, Any]]:
    """Yields paragraphs of four questions."""
    for first in range(0, count, 4):
        shown = [(_THINGS[(first + place) % 8], _COLORS[(first // 4 + place) % 4]) for place in range(4)]
        context = " ".join(f"The old {thing} near the river is {color}." for thing, color in shown)
        questions = []
        for place, (thing, color) in enumerate(shown[: count - first]):
            start = context.index(f"old {thing} near the river is {color}") + len(
                f"old {thing} near the river is "
            )
            answer = {"text": color, "answer_start": start}
            entry: dict[str, Any] = {
                "id": f"{part}{first + place:04d}",
                "question": f"What color is the {thing}?",
            }
            is_impossible = has_impossible and (first + place) % 3 == 2
            # people mark each question of the development set several times
            entry["answers"] = [] if is_impossible else [answer] * (3 if part == "dev" else 1)
            if has_impossible:
                entry["is_impossible"] = is_impossible
            if is_impossible:
                entry["plausible_answers"] = [answer]
            questions.append(entry)
        yield {"context": context, "qas": questions}
