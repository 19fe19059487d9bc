"""What ``show``, ``sites`` and ``experiments`` print: plain data from the schemas and the files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from hpcsngd.config import expressions
from hpcsngd.config.catalogue import DATASETS
from hpcsngd.config.experiment import Experiment
from hpcsngd.config.matrix import count
from hpcsngd.config.resolve import Override, Parts, load_experiment, load_site, resolve_parts, walk
from hpcsngd.config.site import Site
from hpcsngd.errors import ConfigError
from hpcsngd.resources import named_files

EXPLAINED = frozenset(f"experiment.{key}" for key in ("paper", "reference", "corrections", "published"))
"""Keys that `explanation` tells in words."""


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
    return [_row(name, file, _site_row) for name, file in named_files("site_configs").items()]


def experiments() -> list[dict[str, Any]]:
    """Returns what every known experiment is; a broken file says why.

    The keys: name, file, description, paper, reference, model, data (with ``data_facts`` in words), method,
    epochs, batch_size, ranks, global_batch, runs, nodes, gpus_per_node, walltime, error. What is left to the
    site is null; ranks count as one where the experiment does not say.
    """
    return [_row(name, file, _experiment_row) for name, file in named_files("jobs").items()]


def _row(name: str, file: Path, describe: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "file": str(file), "error": None}
    try:
        return row | describe(name)
    except ConfigError as error:
        return row | {"description": f"broken: {error}", "error": str(error)}


def _site_row(name: str) -> dict[str, Any]:
    site = load_site(name)
    gpus = f"{site.gpus_per_node} GPUs per node" if site.gpus_per_node else "no GPUs"
    status = "" if site.status == "live" else f", {site.status}"
    facts = f"{site.scheduler.kind}, {site.arch}, {gpus}{status}"
    return {"description": site.description, "facts": facts}


def _experiment_row(name: str) -> dict[str, Any]:
    parts = resolve_parts(None, name)
    experiment = load_experiment(name)
    wanted, method = experiment.resources, experiment.preconditioner
    return {
        "description": experiment.description,
        "paper": experiment.paper,
        "reference": experiment.reference,
        "model": experiment.model.name,
        "data": experiment.data.name,
        "data_facts": DATASETS[experiment.data.name].description,
        "method": " + ".join([experiment.optimizer.name, *([method.name] if method else [])]),
        "epochs": experiment.epochs,
        "batch_size": experiment.batch_size,
        "ranks": parts.world_size,
        "global_batch": experiment.batch_size * experiment.accumulate * parts.world_size,
        "runs": count(experiment.matrix),
        "nodes": wanted.nodes,
        "gpus_per_node": wanted.gpus_per_node,
        "walltime": wanted.walltime,
    }


def experiment_lines(row: Mapping[str, Any]) -> list[str]:
    """Returns one experiment of `experiments` for people: what, from where, how large, on what."""
    lines = [f"{row['name']}: {row['description']}"]
    if row["error"]:
        return lines
    runs = f", {row['runs']} runs" if row["runs"] > 1 else ""
    batch = f"batch {row['global_batch']:,} ({row['ranks']} x {row['batch_size']})"
    nodes = f"{row['nodes']} node{'s' if row['nodes'] > 1 else ''}" if row["nodes"] else "the site's nodes"
    gpus = f" x {row['gpus_per_node']} GPUs" if row["gpus_per_node"] else ""
    walltime = row["walltime"] or "the site's wall time"
    facts = {
        "paper": row["paper"],
        "data": f"{row['data']}: {row['data_facts']}",
        "size": f"{row['model']}, {row['method']}, {row['epochs']} epochs, {batch}{runs}",
        "resources": f"{nodes}{gpus}, {walltime}",
    }
    return lines + [f"    {name:<10} {value}" for name, value in facts.items() if value]


def explanation(name: str) -> list[str]:
    """Returns what an experiment is, where its settings come from and where they depart from that.

    Raises:
        ConfigError: as `hpcsngd.config.resolve.resolve`.
    """
    experiment = load_experiment(name)
    lines = [f"{name}: {experiment.description}"]
    lines += [f"paper: {experiment.paper}"] if experiment.paper else []
    lines += [f"source: {experiment.reference}"] if experiment.reference else []
    if experiment.corrections:
        lines += ["departs from it:", *(f"  - {' '.join(each.split())}" for each in experiment.corrections)]
    if experiment.published:
        lines += ["published:", *(f"  - {p.what}: {p.value} ({p.source})" for p in experiment.published)]
    return [*lines, f"to see that it runs: hpcsngd submit --exp {name} --smoke --wait"]
