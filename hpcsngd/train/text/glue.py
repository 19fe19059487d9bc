"""The tasks of GLUE, as their archives unpack: tab-separated files, one example a line.

Nothing is quoted in these files: a quotation mark is a character like others, and a tab or a line feed always
ends a cell. Columns are found by the names in the first line, except for CoLA, which has none. The test sets
come without labels, so the development sets are what is evaluated.

Source: Wang et al., "GLUE", ICLR 2019; labels in the order of its published loaders.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hpcsngd.train.faults import MissingDataError

log = logging.getLogger(__name__)

_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")
_BINARY = ("0", "1")


@dataclass(frozen=True)
class Layout:
    """What one task's files look like.

    Attributes:
        sentences: columns of the text, one or two.
        label: column of the label.
        classes: what the label may be; nothing for a number.
        metrics: what the task is scored by, names in `hpcsngd.train.text.scores.METRICS`; the first is the
            main one.
        evaluated: part -> file; the first is the main one.
        columns: names of the columns, where the file does not tell them.
        drops_broken: whether lines of another shape are left out, as the published files have some.
    """

    sentences: Sequence[str]
    label: str
    classes: Sequence[str]
    metrics: Sequence[str] = ("accuracy",)
    evaluated: tuple[tuple[str, str], ...] = (("", "dev.tsv"),)
    columns: Sequence[str] | None = None
    drops_broken: bool = False


#: By ``data.name``. Names of columns are those of the files.
LAYOUTS: dict[str, Layout] = {
    "cola": Layout(
        ("sentence",), "label", _BINARY, ("matthews",), columns=("source", "label", "mark", "sentence")
    ),
    "sst2": Layout(("sentence",), "label", _BINARY),
    "mrpc": Layout(("#1 String", "#2 String"), "Quality", _BINARY, ("accuracy", "f1")),
    "qqp": Layout(("question1", "question2"), "is_duplicate", _BINARY, ("accuracy", "f1"), drops_broken=True),
    "stsb": Layout(_PAIR, "score", (), ("spearman", "pearson")),
    "mnli": Layout(
        _PAIR,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        evaluated=(("", "dev_matched.tsv"), ("mismatched", "dev_mismatched.tsv")),
    ),
    "qnli": Layout(("question", "sentence"), "label", _ENTAILED),
    "rte": Layout(_PAIR, "label", _ENTAILED),
    "wnli": Layout(_PAIR, "label", _BINARY),
}


@dataclass(frozen=True)
class Texts:
    """The examples of one file.

    Attributes:
        sentences: one or two lists of as many texts.
        targets: ``(n,)``: classes, int64, or numbers, float32.
    """

    sentences: Sequence[Sequence[str]]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


def read(file: Path, layout: Layout) -> Texts:
    """Returns the examples of a file, in its order.

    Args:
        file: tab-separated, UTF-8.
        layout: of the task.

    Raises:
        MissingDataError: the file cannot be read, lacks columns or examples, or has a line of another shape;
            the message names file, line and column.
    """
    lines = _lines(file)
    columns = list(layout.columns or (lines[0].split("\t") if lines else []))
    wanted = [*layout.sentences, layout.label]
    if absent := [name for name in wanted if name not in columns]:
        raise MissingDataError(f"{file} lacks the columns {', '.join(absent)}; it has {', '.join(columns)}")
    places, parse = [columns.index(name) for name in wanted], _parser(layout)
    rows: list[tuple[list[str], float]] = []
    broken: list[str] = []
    for number, line in enumerate(lines[layout.columns is None :], start=1 + (layout.columns is None)):
        cells = line.split("\t")
        try:
            if len(cells) != len(columns):
                raise ValueError(f"{len(cells)} cells, not {len(columns)}")  # noqa: TRY301 - told like the others
            *texts, label = (cells[place] for place in places)
            rows.append((texts, parse(label)))
        except ValueError as error:
            broken.append(f"{file}:{number}: {error}")
    _judge(file, rows, broken, layout)
    targets = torch.tensor([target for _, target in rows])
    sentences = [list(texts) for texts in zip(*(texts for texts, _ in rows), strict=True)]
    return Texts(sentences, targets.long() if layout.classes else targets)


def _lines(file: Path) -> list[str]:
    try:
        # some copies of MRPC begin with a mark of the byte order; other line ends are part of the text
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingDataError(f"cannot read {file}: {error}") from error
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _parser(layout: Layout) -> Callable[[str], float]:
    if not layout.classes:
        return float

    def number_of(label: str) -> float:
        if label not in layout.classes:
            raise ValueError(f"{layout.label} {label!r}, not one of {', '.join(layout.classes)}")
        return layout.classes.index(label)

    return number_of


def _judge(file: Path, rows: Sequence[object], broken: Sequence[str], layout: Layout) -> None:
    if broken and not layout.drops_broken:
        raise MissingDataError(broken[0] + (f" (and {len(broken) - 1} more lines)" if broken[1:] else ""))
    if broken:
        log.warning("%s: %d lines of another shape are left out, the first %s", file, len(broken), broken[0])
    if not rows:
        raise MissingDataError(f"{file} has no examples")
