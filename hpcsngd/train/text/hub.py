"""The libraries for text, imported late and kept off the network; encoders come from local folders."""

from __future__ import annotations

import contextlib
import importlib
import os
from pathlib import Path
from typing import Any

from hpcsngd.train import vision
from hpcsngd.train.faults import MissingDataError, SettingError

#: A tokenizer's vocabulary has one of these names: of the fast format, BERT's, RoBERTa's, SentencePiece's.
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


def transformers() -> Any:
    """Returns the module ``transformers``, which then asks no hub for anything.

    Raises:
        SettingError: it is not installed.
    """
    # read at its import; compute nodes have no network, and a run must not depend on what a hub says today
    os.environ["HF_HUB_OFFLINE"] = "1"
    # its threads and our forks (loaders, ranks) do not go together; it warns at each fork unless told
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    library = _load("transformers")
    library.utils.logging.disable_progress_bar()
    # a new head over known weights is no news, and weights that are missing are an error of ours
    library.utils.logging.set_verbosity_error()
    return library


def torchmetrics_text() -> Any:
    """Returns torchmetrics' functions for text.

    Raises:
        SettingError: it is not installed.
    """
    return _load("torchmetrics.functional.text")


def _load(module: str) -> Any:
    # both libraries import the torchvision that they find, which may be of another build than torch
    with contextlib.suppress(ImportError):
        vision.load()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingError(f"this needs the extra 'text': pip install 'hpcsngd[text]' ({error})") from error


def find_folder(name: str | None, root: Path | None) -> Path:
    """Returns the folder of an encoder and its tokenizer, as transformers saves them.

    Args:
        name: absolute, or below the data root.
        root: the data root.

    Raises:
        SettingError: no name.
        MissingDataError: no such folder, or files are missing; the message names them.
    """
    if name is None:
        raise SettingError(
            "data.tokenizer must name the folder of the encoder and its tokenizer, e.g. bert-base-uncased"
        )
    folder = (root or Path()) / Path(name).expanduser()
    if not folder.is_dir():
        raise MissingDataError(
            f"no folder {folder} (data.tokenizer): put the encoder's files there as transformers saves them, "
            "config.json, model.safetensors (unless its weights are drawn) and the tokenizer's"
        )
    absent = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / each).is_file() for each in _VOCABULARIES):
        absent.append(f"a vocabulary ({', '.join(_VOCABULARIES)})")
    if absent:
        raise MissingDataError(f"{folder} lacks {' and '.join(absent)}")
    return folder


def tokenizer(folder: Path) -> Any:
    """Returns the fast tokenizer of a folder.

    Raises:
        MissingDataError: its files are damaged.
        SettingError: it has no fast form, which alone tells where in a text its tokens are.
    """
    library = transformers()
    try:
        found = library.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        raise MissingDataError(f"cannot read the tokenizer in {folder}: {error}") from error
    if not found.is_fast:
        raise SettingError(f"the tokenizer in {folder} has no fast form")
    return found
