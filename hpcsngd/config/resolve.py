"""A site, an experiment and the overrides become one checked configuration; each leaf knows its origin.

A number may be written as an expression of the world size (`hpcsngd.config.expressions`); it is resolved with
the ranks that this very configuration has.

Precedence: defaults < site file < experiment file (``extends`` one parent) < environment < command line.
Site and experiment stay two trees; ``experiment.resources`` wins over the site's own numbers. When a mapping
with a ``name`` (optimizer, preconditioner, model, data) changes its name, it is replaced as a whole: the old
one's arguments mean nothing to the new.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hpcsngd import resources
from hpcsngd.config import expressions, strict
from hpcsngd.config.experiment import Experiment, Resources
from hpcsngd.config.fields import expand, walltime_minutes
from hpcsngd.config.messages import explain
from hpcsngd.config.site import Site
from hpcsngd.errors import ConfigError, did_you_mean

Tree = dict[str, Any]
M = TypeVar("M", bound=BaseModel)

ENV_PREFIX = "HPCSNGD_SET_"
"""``HPCSNGD_SET_optimizer__lr=0.1`` overrides ``optimizer.lr``."""
ENV_NAMES = {"HPCSNGD_DATA_ROOT": "site.data_root", "HPCSNGD_RUN_ROOT": "site.run_root"}
RESOURCE_KEYS = ("nodes", "gpus_per_node", "ranks_per_node", "walltime")


@dataclass(frozen=True)
class Override:
    """One value from outside the files: a full key path, the value, and where it was given."""

    path: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Resolved:
    """A checked configuration.

    Attributes:
        site_name: name or file stem of the site.
        exp_name: name or file stem of the experiment.
        site: the site.
        experiment: the experiment.
        origins: key path (``site.nodes``, ``experiment.optimizer.lr``) -> ``file:line``, ``--set ...``, a
            variable or ``default``.
        expressions: key path -> the expression of the world size that its number comes from.
    """

    site_name: str
    exp_name: str
    site: Site
    experiment: Experiment
    origins: dict[str, str] = field(default_factory=dict)
    expressions: dict[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        """Returns the number of nodes."""
        return _nodes(self.site, self.experiment.resources)

    @property
    def gpus_per_node(self) -> int:
        """Returns the GPUs used on each node."""
        return _gpus_per_node(self.site, self.experiment.resources)

    @property
    def ranks_per_node(self) -> int:
        """Returns the workers on each node: as asked, else one per GPU, else the site's, else one."""
        return _ranks_per_node(self.site, self.experiment.resources)

    @property
    def world_size(self) -> int:
        """Returns the number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def walltime_min(self) -> int:
        """Returns the wall time of one attempt in minutes."""
        return walltime_minutes(self.experiment.resources.walltime or self.site.walltime)

    def to_record(self) -> Tree:
        """Returns plain data for ``run.yaml``; `from_record` reads it back."""
        return {
            "site_name": self.site_name,
            "exp_name": self.exp_name,
            "site": self.site.model_dump(mode="json"),
            "experiment": self.experiment.model_dump(mode="json"),
            "origins": dict(self.origins),
            "expressions": dict(self.expressions),
        }


def _nodes(site: Site, wanted: Resources) -> int:
    return wanted.nodes or site.nodes


def _gpus_per_node(site: Site, wanted: Resources) -> int:
    return site.gpus_per_node if wanted.gpus_per_node is None else wanted.gpus_per_node


def _ranks_per_node(site: Site, wanted: Resources) -> int:
    asked = wanted.ranks_per_node
    if asked is None and wanted.gpus_per_node is None:
        asked = site.ranks_per_node
    return asked or _gpus_per_node(site, wanted) or site.ranks_per_node or 1


def from_record(record: Mapping[str, Any]) -> Resolved:
    """Returns the configuration stored in a ``run.yaml``.

    Raises:
        ConfigError: it does not fit this version's schema.
    """
    try:
        return Resolved(
            str(record["site_name"]),
            str(record["exp_name"]),
            Site.model_validate(record["site"]),
            Experiment.model_validate(record["experiment"]),
            dict(record.get("origins", {})),
            dict(record.get("expressions", {})),
        )
    except (KeyError, ValidationError) as error:
        raise ConfigError(f"run.yaml does not fit this version of hpcsngd: {error}") from error


def amend(resolved: Resolved, overrides: Sequence[Override], *, anew: bool = False) -> Resolved:
    """Returns a configuration with some values replaced.

    Args:
        resolved: the configuration.
        overrides: what to replace.
        anew: evaluate expressions again, for the ranks that there are now; otherwise numbers stay.

    Raises:
        ConfigError: what does not fit the schema; all errors in one message.
    """
    record = resolved.to_record()
    trees = {"site": record["site"], "experiment": record["experiment"]}
    origins = dict(resolved.origins)
    if anew:
        for path, text in resolved.expressions.items():
            _put(trees, origins, path, text, origins[path])
    for layer in _names_first(overrides):
        _apply(trees, origins, layer)
    found = _finished(resolved.site_name, resolved.exp_name, trees, origins)
    stayed = {
        path: text
        for path, text in resolved.expressions.items()
        if found.origins.get(path) == resolved.origins[path]
    }
    return replace(found, expressions=stayed | found.expressions)


def _finished(site_name: str, exp_name: str, trees: Tree, origins: Mapping[str, str]) -> Resolved:
    """Returns trees checked, with an origin for every leaf.

    Raises:
        ConfigError: what does not fit the schema; all errors in one message.
    """
    parts = _validate(trees, origins)
    dumped = {name: part.model_dump() for name, part in parts.items()}
    leaves = {path: origins.get(path, "default") for path, _ in walk(dumped)}
    found = _expressions_in(trees, dumped)
    return Resolved(site_name, exp_name, parts["site"], parts["experiment"], leaves, found)


def _expressions_in(trees: Tree, dumped: Tree) -> dict[str, str]:
    """Returns key path -> expression of all leaves of the trees that became numbers."""
    numbers = {path for path, value in walk(dumped) if isinstance(value, int | float)}
    return {
        path: value for path, value in walk(trees) if path in numbers and expressions.is_expression(value)
    }


def parse_set(text: str) -> Override:
    """Returns the override in ``a.b=value``; the value is read as YAML.

    Raises:
        ConfigError: no ``=``, or a value that is not YAML.
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set {text}: expected KEY=VALUE, such as optimizer.lr=0.1")
    return override(path.strip(), value, f"--set {path.strip()}")


def override(path: str, value: str, origin: str) -> Override:
    """Returns an override of a full or short key path with a value written as YAML."""
    document = strict.loads(f"value: {value}", origin)
    return Override(full_path(path, origin), document.data["value"], origin)


def full_path(path: str, origin: str) -> str:
    """Returns a key path that begins with ``site.`` or ``experiment.``.

    Short paths are looked up by their first key; ``nodes``, ``gpus_per_node``, ``ranks_per_node`` and
    ``walltime`` mean the experiment's resources.

    Raises:
        ConfigError: the first key is unknown or in both trees.
    """
    first = path.partition(".")[0]
    if first in ("site", "experiment"):
        return path
    if first == "exp":
        return "experiment" + path[3:]
    if first in RESOURCE_KEYS:
        return f"experiment.resources.{path}"
    in_site, in_experiment = first in Site.model_fields, first in Experiment.model_fields
    if in_site and in_experiment:
        raise ConfigError(f"{origin}: {first!r} is in both: write site.{path} or experiment.{path}")
    if not in_site and not in_experiment:
        names = [*Site.model_fields, *Experiment.model_fields, *RESOURCE_KEYS]
        raise ConfigError(f"{origin}: unknown key {first!r}{did_you_mean(first, names)}")
    return f"site.{path}" if in_site else f"experiment.{path}"


def environment_overrides(environment: Mapping[str, str]) -> list[Override]:
    """Returns the overrides in ``HPCSNGD_DATA_ROOT``, ``HPCSNGD_RUN_ROOT`` and ``HPCSNGD_SET_*``."""
    found = [
        Override(path, environment[name], f"${name}")
        for name, path in ENV_NAMES.items()
        if environment.get(name)
    ]
    for name in sorted(environment):
        if name.startswith(ENV_PREFIX):
            path = name[len(ENV_PREFIX) :].replace("__", ".").lower()
            found.append(override(path, environment[name], f"${name}"))
    return found


def resolve(
    site: str,
    experiment: str,
    overrides: Sequence[Override] = (),
    *,
    environment: Mapping[str, str] | None = None,
) -> Resolved:
    """Returns the checked configuration of a site and an experiment, one run's: without its matrix.

    Args:
        site: name or path of a site file.
        experiment: name or path of an experiment file.
        overrides: from the command line, in order; they win over everything.
        environment: the submitter's; default: ``os.environ``.

    Raises:
        ConfigError: anything unknown, misspelt or of the wrong type; all errors in one message.
    """
    return read_layers(site, experiment, overrides, environment=environment).resolved()


@dataclass(frozen=True)
class Layers:
    """A site and an experiment as their files have them, with the overrides to apply; nothing is checked yet.

    Attributes:
        site_name: name or file stem of the site.
        exp_name: name or file stem of the experiment.
        trees: ``site`` and ``experiment``, each nested plain data.
        origins: key path -> ``file:line``.
        overrides: from the environment and the command line, in order.
        environment: the submitter's.
    """

    site_name: str
    exp_name: str
    trees: Tree
    origins: Mapping[str, str]
    overrides: tuple[Override, ...]
    environment: Mapping[str, str]

    def resolved(self, more: Sequence[Override] = ()) -> Resolved:
        """Returns the checked configuration with further overrides, which win over everything.

        Raises:
            ConfigError: anything unknown, misspelt or of the wrong type; all errors in one message.
        """
        trees, origins = self.applied(more)
        trees = {name: _expand(tree, name, origins, self.environment) for name, tree in trees.items()}
        return _finished(self.site_name, self.exp_name, trees, origins)

    def applied(self, more: Sequence[Override] = ()) -> tuple[Tree, dict[str, str]]:
        """Returns trees and origins after all overrides, unchecked and without the matrix: of one cell."""
        trees, origins = copy.deepcopy(self.trees), dict(self.origins)
        trees["experiment"].pop("matrix", None)
        for item in _names_first([*self.overrides, *more]):
            _apply(trees, origins, item)
        return trees, origins


def read_layers(
    site: str,
    experiment: str,
    overrides: Sequence[Override] = (),
    *,
    environment: Mapping[str, str] | None = None,
) -> Layers:
    """Returns what `resolve` checks, read from the files once: a matrix checks it many times.

    Raises:
        ConfigError: an unknown name, or a file that is not strict YAML.
    """
    environment = os.environ if environment is None else environment
    trees, origins = _read(site, experiment)
    return Layers(
        resources.find_named("site_configs", site).stem,
        resources.find_named("jobs", experiment).stem,
        trees,
        origins,
        (*environment_overrides(environment), *overrides),
        environment,
    )


@dataclass(frozen=True)
class Parts:
    """A site, an experiment or both, checked for being looked at.

    Attributes:
        models: ``site`` and ``experiment``, as far as they were asked for.
        origins: as in `Resolved`, without those of defaults.
        expressions: as in `Resolved`.
        world_size: what they were evaluated with.
    """

    models: dict[str, Site | Experiment]
    origins: dict[str, str]
    expressions: dict[str, str]
    world_size: int


def resolve_parts(site: str | None, experiment: str | None, overrides: Sequence[Override] = ()) -> Parts:
    """Returns a site, an experiment or both; ``${NAME}`` stays, as this is for looking.

    Without a site, the number of ranks is what the experiment's resources say, one where they say nothing.

    Raises:
        ConfigError: as `resolve`; also an override of the part that is not there.
    """
    trees, origins = _read(site, experiment)
    from_environment = [
        item for item in environment_overrides(os.environ) if item.path.partition(".")[0] in trees
    ]
    for item in _names_first([*from_environment, *overrides]):
        _apply(trees, origins, item)
    models = _validate(trees, origins)
    dumped = {name: part.model_dump() for name, part in models.items()}
    return Parts(models, origins, _expressions_in(trees, dumped), _world_size(models.get("site"), trees))


def load_site(name: str) -> Site:
    """Returns one site as its file has it, ``${NAME}`` unexpanded.

    Raises:
        ConfigError: as `resolve`.
    """
    trees, origins = _read(name, None)
    site: Site = _validate(trees, origins)["site"]
    return site


def load_experiment(name: str) -> Experiment:
    """Returns one experiment as its file has it.

    Raises:
        ConfigError: as `resolve`.
    """
    trees, origins = _read(None, name)
    experiment: Experiment = _validate(trees, origins)["experiment"]
    return experiment


def _read(site: str | None, experiment: str | None) -> tuple[Tree, dict[str, str]]:
    trees: Tree = {}
    origins: dict[str, str] = {}
    if site is not None:
        trees["site"], found = _load_tree(resources.find_named("site_configs", site))
        origins |= _prefixed("site", found)
    if experiment is not None:
        trees["experiment"], found = _load_experiment(resources.find_named("jobs", experiment))
        origins |= _prefixed("experiment", found)
    return trees, origins


def _names_first(layers: Sequence[Override]) -> list[Override]:
    """Returns the layers with each ``x.name`` before the first ``x.*``: it would drop its own arguments."""

    def place(item: tuple[int, Override]) -> tuple[int, bool]:
        index, layer = item
        parent, _, last = layer.path.rpartition(".")
        if last != "name":
            return index, True
        return min(i for i, other in enumerate(layers) if other.path.startswith(f"{parent}.")), False

    return [layer for _, layer in sorted(enumerate(layers), key=place)]


def walk(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested mappings as (key path, value); lists are leaves."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from walk(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _load_tree(file: Path) -> tuple[Tree, dict[str, str]]:
    document = strict.load(file, shown_as=_shown(file))
    return document.data, {path: f"{document.file}:{line}" for path, line in document.lines.items()}


def _load_experiment(file: Path, seen: tuple[Path, ...] = ()) -> tuple[Tree, dict[str, str]]:
    tree, origins = _load_tree(file)
    matrix = _flat_matrix(tree, origins)
    parent_name = tree.pop("extends", None)
    if parent_name is None:
        return tree | matrix, origins
    where = origins.pop("extends")
    if not isinstance(parent_name, str):
        raise ConfigError(f"{where}: extends: expected the name of one experiment")
    try:
        parent_file = _find_parent(parent_name, file)
    except ConfigError as error:
        raise ConfigError(f"{where}: extends: {error}") from error
    if parent_file in (*seen, file):
        raise ConfigError(f"{where}: extends: {parent_name!r} leads back to itself")
    parent, parent_origins = _load_experiment(parent_file, (*seen, file))
    axes = parent.pop("matrix", {}) | matrix.get("matrix", {})
    for path, value in walk(tree) if tree else ():
        _put(parent, parent_origins, path, value, origins.get(path, where))
    # null takes an axis of the parent away
    kept = {path: values for path, values in axes.items() if values is not None}
    own_axes = {path: at for path, at in origins.items() if path.startswith("matrix.")}
    return parent | ({"matrix": kept} if kept else {}), origins | parent_origins | own_axes


def _flat_matrix(tree: Tree, origins: Mapping[str, str]) -> Tree:
    """Takes ``matrix`` out of a file's tree; returns it alone, with one dotted key path per axis."""
    if "matrix" not in tree:
        return {}
    matrix = tree.pop("matrix")
    if not isinstance(matrix, dict) or not matrix:
        raise ConfigError(
            f"{origins['matrix']}: matrix: expected keys with lists of values, found {matrix!r}"
        )
    return {"matrix": dict(walk(matrix))}


def _find_parent(name: str, child: Path) -> Path:
    beside = child.parent / f"{name}.yaml"
    return beside.resolve() if beside.is_file() else resources.find_named("jobs", name)


def _shown(file: Path) -> str:
    relative = os.path.relpath(file)
    return str(file) if relative.startswith("..") else relative


def _prefixed(prefix: str, origins: Mapping[str, str]) -> dict[str, str]:
    return {f"{prefix}.{path}": origin for path, origin in origins.items()}


def _apply(trees: Tree, origins: dict[str, str], layer: Override) -> None:
    part, dot, _ = layer.path.partition(".")
    if not dot:
        raise ConfigError(f"{layer.origin}: give a key inside {part}, such as {part}.description")
    if part not in trees:
        raise ConfigError(f"{layer.origin}: {layer.path} belongs to the {part}, and none was named")
    if layer.path.startswith("experiment.matrix"):
        raise ConfigError(f"{layer.origin}: an axis of the matrix is set with --matrix KEY=VALUE,VALUE,...")
    _put(trees, origins, layer.path, copy.deepcopy(layer.value), layer.origin)


def _put(tree: Tree, origins: dict[str, str], path: str, value: Any, origin: str) -> None:
    *parents, last = path.split(".")
    place, done = tree, ""
    for part in parents:
        done = f"{done}.{part}" if done else part
        if not isinstance(place.get(part), dict):
            _forget(origins, done)
            place[part] = {}
        place = place[part]
    if last == "name" and place.get("name") not in (None, value):
        place.clear()
        _forget(origins, done)
    _forget(origins, path)
    place[last] = value
    origins[path] = origin


def _forget(origins: dict[str, str], path: str) -> None:
    for key in [key for key in origins if key == path or key.startswith(path + ".")]:
        del origins[key]


def _expand(tree: Any, path: str, origins: Mapping[str, str], environment: Mapping[str, str]) -> Any:
    if isinstance(tree, dict):
        return {key: _expand(value, f"{path}.{key}", origins, environment) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_expand(item, f"{path}.{index}", origins, environment) for index, item in enumerate(tree)]
    if not isinstance(tree, str):
        return tree
    where = f"{_nearest(path, origins)}: {path.partition('.')[2]}"
    return expand(tree, environment, where)


def _nearest(path: str, origins: Mapping[str, str]) -> str:
    while path and path not in origins:
        path = path.rpartition(".")[0]
    return origins.get(path, "default")


def _validate(trees: Tree, origins: Mapping[str, str]) -> dict[str, Any]:
    models: dict[str, type[BaseModel]] = {"site": Site, "experiment": Experiment}
    parts: dict[str, Any] = {}
    problems: list[str] = []
    for name in sorted(trees, reverse=True):  # the site first: the number of ranks depends on it
        context = {expressions.NAME: _world_size(parts.get("site"), trees)}
        try:
            parts[name] = _checked(models[name], name, trees[name], origins, context)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return parts


def _world_size(site: Site | None, trees: Tree) -> int:
    """Returns the number of ranks of a site and an experiment that is not checked yet.

    Whatever is missing counts as one. Errors in the resources are left to the check that follows.
    """
    tree = trees.get("experiment", {}).get("resources")
    try:
        wanted = Resources.model_validate(tree or {})
    except ValidationError:
        return 1
    if site is None:
        return (wanted.nodes or 1) * (wanted.ranks_per_node or wanted.gpus_per_node or 1)
    return _nodes(site, wanted) * _ranks_per_node(site, wanted)


def _checked(
    model: type[M], prefix: str, tree: Tree, origins: Mapping[str, str], context: Mapping[str, int]
) -> M:
    try:
        return model.model_validate(tree, context=context)
    except ValidationError as error:
        lines = explain(error, model, tree, lambda path: _nearest(f"{prefix}.{path}", origins))
        raise ConfigError("\n".join(lines)) from error
