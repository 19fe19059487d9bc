"""Strict YAML: the YAML 1.2 core schema, duplicate keys refused, the line of every leaf remembered.

YAML 1.1, which PyYAML speaks by default, reads ``12:00:00`` as 43200, ``010`` as 8 and ``no`` as false. Here
plain scalars are null, true/false, decimal numbers (``1e-3`` too) or text. A number with a leading zero stays
text (``007`` is somebody's account), and every number keeps how it was written: where the schema wants text,
``1.10`` is "1.10".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hpcsngd.errors import ConfigError

_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")
}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_CONSTANTS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf"), float("inf")),
    "-.inf": float("-inf"),
}


class WrittenInt(int):
    """An integer that knows how it was written."""

    text: str


class WrittenFloat(float):
    """A number that knows how it was written."""

    text: str


@dataclass(frozen=True)
class Document:
    """A parsed file: its data and where each key path was written.

    Attributes:
        file: the file, as shown to people.
        data: nested dicts, lists and scalars.
        lines: dotted key path -> line number from 1, for every mapping key and list item.
    """

    file: str
    data: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)

    def where(self, path: str) -> str:
        """Returns ``file:line`` of the key path, or of its nearest written parent."""
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return f"{self.file}:{self.lines.get(path, 1)}"


def scalar(text: str) -> Any:
    """Returns the value of a plain scalar in the YAML 1.2 core schema (decimal numbers only)."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    number: WrittenInt | WrittenFloat
    if _INT.match(text):
        number = WrittenInt(text)
    elif _FLOAT.match(text):
        number = WrittenFloat(text)
    else:
        return text
    number.text = text
    return number


def load(path: Path, *, shown_as: str | None = None) -> Document:
    """Returns a YAML file as a `Document`.

    Args:
        path: the file.
        shown_as: its name in messages; default: the path.

    Raises:
        ConfigError: unreadable, not YAML, not a mapping, or a key twice; with file and line.
    """
    name = shown_as or str(path)
    try:
        return loads(path.read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: cannot be read: {error}") from error


def loads(text: str, name: str) -> Document:
    """Returns YAML text as a `Document`; see `load`."""
    try:
        # compose only builds the node tree: nothing is constructed, so no tag can run code
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{name}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from error
    if node is None:
        return Document(name, {})
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{name}:1: expected keys and values, found a {type(node).__name__}")
    document = Document(name, {})
    document.data.update(_build(node, "", document))
    return document


def _build(node: yaml.Node, path: str, document: Document) -> Any:
    if node.tag not in _TAGS:
        raise ConfigError(f"{document.file}:{node.start_mark.line + 1}: the tag {node.tag} is not allowed")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode):
        return _sequence(node, path, document)
    text = str(node.value)
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return scalar(text) if is_plain else text


def _mapping(node: yaml.MappingNode, path: str, document: Document) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{document.file}:{line}: a key must be plain text")
        key = str(key_node.value)
        child = f"{path}.{key}" if path else key
        if key in result:
            first = document.lines[child]
            raise ConfigError(
                f"{document.file}:{line}: the key {child!r} is written twice (first in line {first})"
            )
        document.lines[child] = line
        result[key] = _build(value_node, child, document)
    return result


def _sequence(node: yaml.SequenceNode, path: str, document: Document) -> list[Any]:
    items = []
    for index, item in enumerate(node.value):
        child = f"{path}.{index}"
        document.lines[child] = item.start_mark.line + 1
        items.append(_build(item, child, document))
    return items
