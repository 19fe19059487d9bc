"""The lines of texts."""

from __future__ import annotations

from pathlib import Path

from hpcsngd.train.faults import MissingDataError


def present(folder: Path, choice: str) -> Path:
    """Returns the file of a folder that has one of the names of a catalogue's ``a|b``."""
    return next(folder / name for name in choice.split("|") if (folder / name).is_file())


def read_lines(file: Path) -> list[str]:
    """Returns the lines of a text in UTF-8, at least one, without their ends.

    Only a newline ends a line: texts contain what Unicode also takes for line ends.

    Raises:
        MissingDataError: the file cannot be read, is not UTF-8, or is empty.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise MissingDataError(f"cannot read {file}: {error}") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise MissingDataError(f"{file}, line {line}: not UTF-8 ({error.reason})") from error
    if not text.strip():
        raise MissingDataError(f"{file} is empty")
    return text.removesuffix("\n").replace("\r\n", "\n").split("\n")
