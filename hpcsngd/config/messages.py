"""From pydantic's errors to lines for people: where, which key, what is wrong, what is allowed."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from hpcsngd.errors import did_you_mean


def explain(
    error: ValidationError, model: type[BaseModel], tree: Any, where: Callable[[str], str]
) -> list[str]:
    """Returns one line per error: ``file:line: key path: what is wrong, what is allowed``.

    Args:
        error: from validating ``tree`` against ``model``.
        model: the schema class.
        tree: the data as it was written.
        where: gives the place of a key path.
    """
    lines = []
    for item in error.errors():
        path, at = _written_path(item["loc"], model, tree)
        if str(item["type"]).startswith("union_tag"):
            path = f"{path}.name"
        lines.append(f"{where(path)}: {path or 'file'}: {_text(dict(item), path, at)}")
    return list(dict.fromkeys(lines))


def _text(item: dict[str, Any], path: str, at: list[type[BaseModel]]) -> str:
    kind, given = item["type"], item.get("input")
    if kind == "extra_forbidden":
        allowed = sorted({name for model in at for name in model.model_fields})
        return f"unknown key{did_you_mean(path.rpartition('.')[2], allowed)} Allowed: {', '.join(allowed)}"
    if kind == "missing":
        return "this key is required"
    if kind == "union_tag_invalid":
        name = given.get("name") if isinstance(given, dict) else given
        allowed = [word.strip("' ") for word in str(item["ctx"]["expected_tags"]).split(",")]
        return f"unknown name {name!r}{did_you_mean(str(name), allowed)} Allowed: {', '.join(allowed)}"
    if kind == "union_tag_not_found":
        return "the key 'name' is required"
    text = str(item["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return text
    return f"{text[:1].lower()}{text[1:]}; found {given!r}"


def _written_path(
    loc: tuple[int | str, ...], model: type[BaseModel], tree: Any
) -> tuple[str, list[type[BaseModel]]]:
    """Returns the key path as the user wrote it (without union tags) and the schema classes of its parent."""
    parts: list[str] = []
    at: list[type[BaseModel]] = [model]
    parent = at
    for part in loc:
        # What is neither a key of the schema nor one that was written is the name of a union's member.
        is_written = not isinstance(part, str) or (isinstance(tree, dict) and part in tree)
        if not is_written and part not in _fields(at):
            at = [each for each in at if part in _names(each)] or at
            continue
        parts.append(str(part))
        parent = at
        at = [found for each in at for found in _models_below(each, part)]
        tree = _child(tree, part)
    return ".".join(parts), parent


def _child(tree: Any, part: int | str) -> Any:
    if isinstance(tree, dict):
        return tree.get(part)
    return tree[part] if isinstance(tree, list) and isinstance(part, int) and part < len(tree) else None


def _fields(models: list[type[BaseModel]]) -> set[str]:
    return {name for model in models for name in model.model_fields}


def _names(model: type[BaseModel]) -> tuple[Any, ...]:
    name = model.model_fields.get("name")
    return typing.get_args(name.annotation) if name else ()


def _models_below(model: type[BaseModel], part: int | str) -> Iterator[type[BaseModel]]:
    found = model.model_fields.get(str(part))
    if found is not None:
        yield from _models_in(found.annotation)
    elif isinstance(part, int):
        yield model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
