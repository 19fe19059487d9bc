"""GLUE and SQuAD as data sets: found, read and turned into tokens, on every rank by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcsngd.config import experiment as schema
from hpcsngd.train.data import folders
from hpcsngd.train.data.samples import Splits
from hpcsngd.train.text import glue, hub, squad
from hpcsngd.train.text.encoded import Encoded, tokenized
from hpcsngd.train.text.windows import Windows, cut

#: Tokens of a sample, and tokens that windows share, as in the published fine-tuning scripts.
GLUE_LENGTH, SQUAD_LENGTH, SQUAD_STRIDE = 128, 384, 128

#: What files are called after.
VERSIONS = {"squad": "v1.1", "squadv2": "v2.0"}


def load_glue(root: Path | None, config: schema.Data) -> Splits:
    """Returns the examples of a GLUE task; its development set is what is evaluated.

    Of MNLI that is the matched set; the mismatched one is evaluated besides.

    Args:
        root: the data root, which holds the folder that the archive unpacks to.
        config: the experiment's ``data``, by whose name the task goes; ``max_length`` is 128 by default.

    Raises:
        MissingDataError: files of the task or of the tokenizer are missing or damaged; they are named.
        SettingError: no tokenizer is named, or a library is not installed.
    """
    folder, layout = folders.find(config.name, root), glue.LAYOUTS[config.name]
    encoder = hub.find_folder(config.tokenizer, root)
    tokenizer, length = hub.tokenizer(encoder), config.max_length or GLUE_LENGTH

    def part(file: str) -> Encoded:
        texts = glue.read(folder / file, layout)
        tokens = tokenized(tokenizer, texts.sentences, length)
        return Encoded(encoder, tokens, texts.targets, length=length, padding=tokenizer.pad_token_id)

    train = part("train.tsv")
    (_, main), *others = layout.evaluated
    return Splits(
        train,
        part(main),
        max(1, len(layout.classes)),
        "validation",
        extra={f"validation_{kind}": part(file) for kind, file in others},
    )


def load_squad(root: Path | None, config: schema.Data) -> Splits:
    """Returns the windows of SQuAD; its development set is what is evaluated.

    Args:
        root: the data root.
        config: the experiment's ``data``, by whose name the version goes; ``max_length`` is 384 and
            ``doc_stride`` 128 by default.

    Raises:
        MissingDataError: files of the data or of the tokenizer are missing or damaged; they are named.
        SettingError: no tokenizer is named, or a library is not installed, or no room for paragraphs.
    """
    folder, version = folders.find(config.name, root), VERSIONS[config.name]
    encoder = hub.find_folder(config.tokenizer, root)
    tokenizer = hub.tokenizer(encoder)

    def part(name: str) -> Windows:
        questions = squad.read(folder / f"{name}-{version}.json", may_be_impossible=version != "v1.1")
        return _windows(encoder, tokenizer, questions, config)

    return Splits(part("train"), part("dev"), 2, "validation")


def _windows(encoder: Path, tokenizer: Any, questions: list[squad.Question], config: schema.Data) -> Windows:
    length = config.max_length or SQUAD_LENGTH
    stride = SQUAD_STRIDE if config.doc_stride is None else config.doc_stride
    windows = cut(tokenizer, questions, length, stride)
    return Windows(encoder, questions, windows, length=length, padding=tokenizer.pad_token_id)
