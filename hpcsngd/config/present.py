"""What ``show``, ``sites`` and ``experiments`` print: plain data from the schemas and the files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from hpcsngd.config import expressions
from hpcsngd.config.experiment import Experiment
from hpcsngd.config.resolve import Override, Parts, load_experiment, load_site, resolve_parts, walk
from hpcsngd.config.site import Site
from hpcsngd.errors import ConfigError
from hpcsngd.resources import named_files


@dataclass(frozen=True)
class Leaf:
    """One value of a configuration: key path, value and where it was written."""

    path: str
    value: Any
    origin: str


def leaves(site: str | None, experiment: str | None, overrides: Sequence[Override]) -> list[Leaf]:
    """Returns every leaf of a site, an experiment or both, variables unexpanded.

    Raises:
        ConfigError: as `hpcsngd.config.resolve.resolve`.
    """
    parts = resolve_parts(site, experiment, overrides)
    tree = {name: part.model_dump(mode="json") for name, part in parts.models.items()}
    return [Leaf(path, value, _origin(parts, path)) for path, value in walk(tree)]


def _origin(parts: Parts, path: str) -> str:
    origin = parts.origins.get(path, "default")
    if path not in parts.expressions:
        return origin
    return f"{origin}: {parts.expressions[path]}, with {expressions.NAME} {parts.world_size}"


def text(found: Sequence[Leaf], *, with_origins: bool) -> str:
    """Returns one line per leaf: ``path: value``, with the origin in a second column when asked."""
    lines = [(f"{leaf.path}: {json.dumps(leaf.value, ensure_ascii=False)}", leaf.origin) for leaf in found]
    if not with_origins:
        return "\n".join(line for line, _ in lines)
    width = min(60, max(len(line) for line, _ in lines))
    return "\n".join(f"{line:<{width}}  # {origin}" for line, origin in lines)


def nested(found: Sequence[Leaf], *, with_origins: bool) -> dict[str, Any]:
    """Returns the leaves as nested mappings; with origins, each leaf is ``{value, origin}``."""
    tree: dict[str, Any] = {}
    for leaf in found:
        *parents, last = leaf.path.split(".")
        place = tree
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = {"value": leaf.value, "origin": leaf.origin} if with_origins else leaf.value
    return tree


def json_schema(which: str) -> dict[str, Any]:
    """Returns the JSON Schema of a site or experiment file."""
    models: dict[str, type[BaseModel]] = {"site": Site, "experiment": Experiment}
    schema = models[which].model_json_schema()
    if which == "experiment":
        schema["properties"]["extends"] = {"type": "string", "description": "An experiment to start from."}
        definitions = schema.pop("$defs")
        child = _without_required(schema)
        definitions |= {f"child{name}": _without_required(found) for name, found in definitions.items()}
        # a child file may leave to its parent whatever would otherwise be required
        schema = {"if": {"required": ["extends"]}, "then": child, "else": schema, "$defs": definitions}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _without_required(schema: Any) -> Any:
    """Returns a schema in which every key is optional; its definitions carry the prefix ``child``."""
    if isinstance(schema, list):
        return [_without_required(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    relaxed = {
        # without its name, a partial mapping may fit several alternatives
        "anyOf" if key == "oneOf" else key: _without_required(value)
        for key, value in schema.items()
        if key not in ("required", "discriminator")
    }
    if isinstance(relaxed.get("$ref"), str):
        relaxed["$ref"] = relaxed["$ref"].replace("#/$defs/", "#/$defs/child")
    return relaxed


def sites() -> list[dict[str, Any]]:
    """Returns name, file, description and facts of every known site; a broken file says why."""
    return [_row("site_configs", name) for name in named_files("site_configs")]


def experiments() -> list[dict[str, Any]]:
    """Returns name, file, description and facts of every known experiment; a broken file says why."""
    return [_row("jobs", name) for name in named_files("jobs")]


def _row(kind: str, name: str) -> dict[str, Any]:
    files = named_files("jobs") if kind == "jobs" else named_files("site_configs")
    row: dict[str, Any] = {"name": name, "file": str(files[name]), "error": None}
    try:
        description, facts = _experiment_facts(name) if kind == "jobs" else _site_facts(name)
    except ConfigError as error:
        return row | {"description": f"broken: {error}", "facts": "", "error": str(error)}
    return row | {"description": description, "facts": facts}


def _site_facts(name: str) -> tuple[str, str]:
    site = load_site(name)
    gpus = f"{site.gpus_per_node} GPUs per node" if site.gpus_per_node else "no GPUs"
    status = "" if site.status == "live" else f", {site.status}"
    return site.description, f"{site.scheduler.kind}, {site.arch}, {gpus}{status}"


def _experiment_facts(name: str) -> tuple[str, str]:
    experiment = load_experiment(name)
    method = experiment.preconditioner.name if experiment.preconditioner else "none"
    task = f"{experiment.model.name} on {experiment.data.name}"
    return experiment.description, f"{task}, {experiment.optimizer.name}, preconditioner {method}"
