"""What differs between two runs: configuration, code, environment, hardware, and how they ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcsngd import rundir
from hpcsngd.config.resolve import walk
from hpcsngd.launch import status
from hpcsngd.rundir import RunDir
from hpcsngd.tables import TABLES

SECTIONS = ("config", "code", "environment", "hardware", "outcome")
"""The parts of a comparison, in the order of print; of the last, everything is told, not only differences."""

Pair = tuple[Any, Any]
_CODE = ("hpcsngd", "git.sha", "git.dirty", "git.untracked", "git.diff", "image.sha256", "image.path")
_ENVIRONMENT = ("python", "executable", "platform", "host")
_HARDWARE = ("hosts", "nodes", "ranks_per_node", "world_size", "mode")


def compare(first: RunDir, second: RunDir) -> dict[str, dict[str, Pair]]:
    """Returns section -> key -> (value of the first run, value of the second); None where a run has none.

    Raises:
        RunDirError: a run directory is damaged.
    """
    facts = [_facts(run) for run in (first, second)]
    found = {}
    for section in SECTIONS:
        one, other = (each[section] for each in facts)
        keys = dict.fromkeys([*one, *other])
        pairs = {key: (one.get(key), other.get(key)) for key in keys}
        is_all = section == "outcome"
        found[section] = {key: pair for key, pair in pairs.items() if is_all or pair[0] != pair[1]}
    return found


def _facts(run: RunDir) -> dict[str, dict[str, Any]]:
    record = run.record()
    config = {part: record["config"][part] for part in ("site", "experiment")}
    provenance = dict(walk(record.get("provenance", {})))
    return {
        "config": dict(walk(config)),
        "code": _chosen(provenance, _CODE, ()),
        "environment": _chosen(provenance, _ENVIRONMENT, ("versions.", "environment.")),
        "hardware": _hardware(run),
        "outcome": _outcome(run),
    }


def _chosen(facts: Mapping[str, Any], names: tuple[str, ...], prefixes: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key in names or key.startswith(prefixes)}


def _hardware(run: RunDir) -> dict[str, Any]:
    """Returns hosts, ranks and machine of the newest attempt that began."""
    for attempt in reversed(run.attempts()):
        if attempt.attempt_yaml.exists():
            facts = rundir.read_yaml(attempt.attempt_yaml)
            chosen = {key: facts[key] for key in _HARDWARE if key in facts}
            return chosen | dict(walk(facts.get("hardware", {}), "hardware"))
    return {}


def _outcome(run: RunDir) -> dict[str, Any]:
    """Returns state, result and newest figures."""
    ended = status.current(run)
    facts: dict[str, Any] = {"state": ended.state if ended else None, "attempts": len(run.attempts())}
    for table, names in (("train", ("epoch", "step", "loss", "train_s")), ("eval", ("loss", "accuracy"))):
        row = rundir.last_row(run.metrics(table), TABLES[table]) or {}
        facts |= {f"{table}.{name}": row[name] for name in names if name in row}
    return facts | dict(walk((ended.result if ended else None) or {}, "result"))
