"""The matrix of an experiment: keys with lists of values, and the cells that they make.

The cells are all combinations, the last axis varying fastest. ``include`` is a list of mappings: one more
axis, whose keys change together. A cell is an ordinary configuration without a matrix. Its id is a hash of
what its results depend on, so the same cell has the same id whenever and wherever it is asked for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcsngd.config import strict
from hpcsngd.config.resolve import Layers, Override, Resolved, full_path, read_layers, walk
from hpcsngd.errors import ConfigError

INCLUDE = "include"
MAX_CELLS = 100_000
"""More are a mistake in the matrix; making the combinations alone would take minutes."""

NO_EFFECT = frozenset(
    {
        "description",
        "paper",
        "reference",
        "corrections",
        "published",
        "checkpoint",
        "diagnostics",
        "resources",
        "restart",
        "eval_batch_size",
        "matrix",
    }
)
"""Keys of an experiment that results do not depend on; the number of ranks counts apart from resources."""
NO_EFFECT_DATA = frozenset({"root", "download", "workers"})

_ID_DIGITS = 10
_SHOWN_CELLS = 3

Choice = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """One axis: each choice maps key paths, as they were written, to values; ``origin`` says where."""

    choices: tuple[Choice, ...]
    origin: str

    @property
    def keys(self) -> tuple[str, ...]:
        """Returns the keys of all choices, in the order first met."""
        return tuple(dict.fromkeys(key for choice in self.choices for key in choice))


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        id: hash of what the results depend on.
        axes: key path as written -> value, plain data.
        resolved: the checked configuration, without a matrix.
    """

    id: str
    axes: dict[str, Any]
    resolved: Resolved

    def __str__(self) -> str:
        return words(self.axes)


@dataclass(frozen=True)
class Matrix:
    """All cells of an experiment on a site.

    Attributes:
        axes: in the order written; those from the command line last.
        cells: in order, the last axis varying fastest.
        base_id: hash of what the cells have in common and of the names of the axes. It stays the same when an
            axis gets more values.
    """

    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]
    base_id: str


def words(axes: Mapping[str, Any]) -> str:
    """Returns a cell's values for people: ``seed=1, optimizer.lr=0.1``."""
    return ", ".join(f"{key}={shown(value)}" for key, value in axes.items())


def shown(value: Any) -> str:
    """Returns a value as one would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def parse(text: str) -> tuple[str, list[Any]]:
    """Returns key path and values of ``a.b=1,2,3``; the values are read as a YAML list.

    Raises:
        ConfigError: no ``=``, no value, or values that are not YAML.
    """
    path, equals, values = text.partition("=")
    path = path.strip()
    if not equals or not path or not values.strip():
        raise ConfigError(f"--matrix {text}: expected KEY=VALUE,VALUE,..., such as optimizer.lr=0.1,0.2")
    if path == INCLUDE:
        raise ConfigError("--matrix include: linked values can be given in the experiment's file only")
    found = strict.loads(f"values: [{values}]", f"--matrix {path}").data["values"]
    return path, list(found)


def count(written: Mapping[str, Sequence[Any]]) -> int:
    """Returns how many cells a matrix makes, as an experiment has it; 1 for none."""
    return math.prod(len(values) for values in written.values())


def resolve(
    site: str,
    experiment: str,
    overrides: Sequence[Override] = (),
    given: Sequence[tuple[str, list[Any]]] = (),
    *,
    environment: Mapping[str, str] | None = None,
) -> Matrix | None:
    """Returns the checked cells of an experiment's matrix; None if it has no axis.

    Args:
        site: name or path of a site file.
        experiment: name or path of an experiment file.
        overrides: from the command line; one that sets the key of an axis takes that axis' place.
        given: axes from the command line, see `parse`; each is added or replaces one of the same key.
        environment: the submitter's; default: ``os.environ``.

    Raises:
        ConfigError: whatever is wrong with the axes or, cell by cell, with their values; all at once.
    """
    layers = read_layers(site, experiment, overrides, environment=environment)
    written = layers.trees["experiment"].get("matrix", {})
    axes = _axes(written, layers, given)
    if not axes:
        return None
    if (size := math.prod(len(axis.choices) for axis in axes)) > MAX_CELLS:
        raise ConfigError(f"the matrix has {size:,} cells; at most {MAX_CELLS:,} are allowed")
    cells = _cells(layers, axes)
    _refuse_twins(cells)
    return Matrix(axes, cells, _base_id(layers, axes, cells[0].resolved))


def _axes(
    written: Mapping[str, Any], layers: Layers, given: Sequence[tuple[str, list[Any]]]
) -> tuple[Axis, ...]:
    """Returns the axes in force, in order.

    Raises:
        ConfigError: not a list of values, or a key in two places.
    """
    fixed = {override.path for override in layers.overrides}
    axes: dict[str, Axis] = {}
    for key, values in written.items():
        origin = layers.origins.get(f"experiment.matrix.{key}", "matrix")
        if key == INCLUDE:
            axes[INCLUDE] = _linked(values, origin, fixed)
        elif (path := full_path(key, origin)) not in fixed:
            axes[path] = _plain_axis(key, values, origin)
    for key, values in given:
        origin = f"--matrix {key}"
        axes[full_path(key, origin)] = _plain_axis(key, values, origin)
    _refuse_overlaps(tuple(axes.values()))
    return tuple(axes.values())


def _plain_axis(key: str, values: Any, origin: str) -> Axis:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{origin}: matrix.{key}: expected a list of values, found {values!r}")
    return Axis(tuple({key: _plain(value)} for value in values), origin)


def _linked(values: Any, origin: str, fixed: set[str]) -> Axis:
    if not isinstance(values, list) or not values or not all(isinstance(item, dict) for item in values):
        raise ConfigError(f"{origin}: matrix.{INCLUDE}: expected a list of mappings, key path to value")
    choices = tuple({path: _plain(value) for path, value in walk(item)} for item in values)
    for key in Axis(choices, origin).keys:
        if full_path(key, origin) in fixed:
            raise ConfigError(f"{origin}: {key} is set from outside, but matrix.{INCLUDE} links its values")
    return Axis(choices, origin)


def _plain(value: Any) -> Any:
    """Returns a value without the memory of how it was written, which YAML's writer does not know."""
    return json.loads(json.dumps(value))


def _refuse_overlaps(axes: Sequence[Axis]) -> None:
    """Refuses keys of which one would undo the other in some cell; a cell takes one choice of each axis."""
    within = [[(key, axis.origin) for key in choice] for axis in axes for choice in axis.choices]
    among = [
        [(key, axis.origin), (other, later.origin)]
        for axis, later in itertools.combinations(axes, 2)
        for key in axis.keys
        for other in later.keys
    ]
    for keys in [*within, *among]:
        paths = sorted((full_path(key, origin), key, origin) for key, origin in keys)
        for (path, key, origin), (other, other_key, _) in itertools.combinations(paths, 2):
            if other == path or (other.startswith(f"{path}.") and not path.endswith(".name")):
                raise ConfigError(
                    f"{origin}: the matrix has both {key} and {other_key}; one would undo the other"
                )


def _cells(layers: Layers, axes: Sequence[Axis]) -> tuple[Cell, ...]:
    cells: list[Cell] = []
    problems: dict[str, list[str]] = {}
    for choices in itertools.product(*(axis.choices for axis in axes)):
        values = {key: value for choice in choices for key, value in choice.items()}
        try:
            cells.append(_cell(layers, axes, values))
        except ConfigError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(words(values))
    if problems:
        raise ConfigError(listed(problems))
    return tuple(cells)


def listed(problems: Mapping[str, Sequence[str]]) -> str:
    """Returns one line per problem with the cells that have it, the first few by name."""
    lines = []
    for problem, cells in problems.items():
        rest = len(cells) - _SHOWN_CELLS
        names = "; ".join(cells[:_SHOWN_CELLS]) + (f"; and {rest:,} more" if rest > 0 else "")
        lines.append(f"{problem}\n    in {'cell' if len(cells) == 1 else f'{len(cells):,} cells'}: {names}")
    return "\n".join(lines)


def _cell(layers: Layers, axes: Sequence[Axis], values: Mapping[str, Any]) -> Cell:
    origins = {key: axis.origin for axis in axes for key in axis.keys}
    changes = [Override(full_path(key, origins[key]), value, origins[key]) for key, value in values.items()]
    resolved = layers.resolved(changes)
    return Cell(_cell_id(resolved, values), dict(values), resolved)


def _cell_id(resolved: Resolved, values: Mapping[str, Any]) -> str:
    # what a matrix varies tells its cells apart even if results should not depend on it
    own = {full_path(key, ""): value for key, value in values.items()}
    return _digest({**dict(_effective(resolved)), "axes": {k: v for k, v in own.items() if not _counts(k)}})


def _effective(resolved: Resolved) -> Iterator[tuple[str, Any]]:
    """Yields the leaves that results depend on.

    Those with the schema's default are left out, so that a key which a later version adds changes no id.
    """
    tree = resolved.experiment.model_dump(mode="json", exclude_defaults=True)
    for path, value in walk(tree):
        if _counts(f"experiment.{path}"):
            yield path, value
    yield "ranks", resolved.nodes * resolved.ranks_per_node


def _counts(path: str) -> bool:
    part, first, *rest = [*path.split("."), ""]
    is_data = first == "data" and rest[0] in NO_EFFECT_DATA
    return part == "experiment" and first not in NO_EFFECT and not is_data


def _digest(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_DIGITS]


def _base_id(layers: Layers, axes: Sequence[Axis], first: Resolved) -> str:
    keys = sorted(full_path(key, axis.origin) for axis in axes for key in axis.keys)
    trees, _ = layers.applied()
    common = {
        f"experiment.{path}": value
        for path, value in walk(trees["experiment"])
        if _counts(f"experiment.{path}")
    }
    kept = {path: value for path, value in common.items() if not f"{path}.".startswith(_below(keys))}
    if not any(key.startswith(("site.", "experiment.resources.")) for key in keys):
        kept["ranks"] = first.nodes * first.ranks_per_node
    names = {"site": first.site_name, "experiment": first.exp_name}
    return _digest({**names, "common": kept, "axes": keys})


def _below(keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{key}." for key in keys)


def _refuse_twins(cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        twin = seen.setdefault(cell.id, cell)
        if twin is not cell:
            raise ConfigError(f"the matrix has the same cell twice: {twin} and {cell}")
