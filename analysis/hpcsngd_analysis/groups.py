"""Runs that belong together: those that differ in seed or fold alone are replicates of one setting."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcsngd.errors import HpcsngdError
from hpcsngd_analysis.load import Run, Runs
from hpcsngd_analysis.sweeps import REPLICATES
from hpcsngd_analysis.tables import flatten

GROUPS = 24
"""Figures of groups draw at most this many; more could not be told apart."""

# What tells people about a run, or when it stops, and changes no result.
_NO_RESULT = ("description", "reference", "tags", "resources.", "checkpoint.", "restart.", "matrix")
_WORD = 40


@dataclass(frozen=True)
class Group:
    """Runs of one setting: its name, unique among the groups, and the names of the runs."""

    name: str
    runs: tuple[str, ...]


def groups(runs: Runs, by: Sequence[str] = (), *, without: Sequence[str] = ()) -> tuple[Group, ...]:
    """Returns the runs grouped by what their results depend on, replicates together.

    Without ``by`` the key is the experiment with its settings, the site and the number of ranks; a name says
    the experiment and, where experiments of one name differ, in what. With more than `GROUPS` such groups the
    experiment's name alone groups.

    Args:
        runs: loaded runs.
        without: settings that do not part runs, ``ranks`` and ``site`` among them.
        by: instead, keys of the configuration such as ``experiment.optimizer.lr``, or ``exp_name``,
            ``site_name``, ``world_size``; a run without the key is a group of its own kind.
    """
    if by:
        return _gather(runs, [_chosen(run, by) for run in runs.records])
    found = _gather(runs, _labels(runs.records, without))
    return found if len(found) <= GROUPS else _gather(runs, [run.experiment for run in runs.records])


def named(found: Sequence[Group], runs: Runs, name: str) -> Group:
    """Returns the group of a name: a group's own, or that of an experiment that makes one group alone.

    Raises:
        HpcsngdError: there is none, or several; the message lists the groups.
    """
    for group in found:
        if group.name == name:
            return group
    members = {run.name for run in runs.records if run.experiment == name}
    fitting = [group for group in found if members & set(group.runs)]
    if len(fitting) == 1:
        return fitting[0]
    problem = f"there are {len(fitting)} groups of it" if fitting else "no run is of it"
    names = "; ".join(group.name for group in found)
    raise HpcsngdError(f"baseline {name!r}: {problem}; give one of: {names}")


def _gather(runs: Runs, labels: Sequence[str]) -> tuple[Group, ...]:
    members: dict[str, list[str]] = {}
    for run, label in zip(runs.records, labels, strict=True):
        members.setdefault(label, []).append(run.name)
    return tuple(Group(name, tuple(found)) for name, found in members.items())


def _chosen(run: Run, by: Sequence[str]) -> str:
    names = {"exp_name": run.experiment, "site_name": run.site, "world_size": run.world_size}
    leaves = dict(flatten(run.config)) | names
    return ", ".join(
        f"{key.rpartition('.')[2]} {_word(leaves.get(key))}"
        if key not in ("exp_name", "site_name")
        else str(names[key])
        for key in by
    )


def _labels(records: Sequence[Run], without: Sequence[str]) -> list[str]:
    """Returns for each run its experiment, and the settings in which those of this experiment differ."""
    settings = _with_ranks(
        [{key: value for key, value in _settings(run).items() if key not in without} for run in records]
    )
    members: dict[str, list[int]] = {}
    for position, run in enumerate(records):
        members.setdefault(run.experiment, []).append(position)
    labels = [""] * len(records)
    for experiment, positions in members.items():
        differing = _telling([settings[position] for position in positions])
        for position in positions:
            words = [f"{_short(key)} {_word(settings[position].get(key))}" for key in differing]
            labels[position] = ", ".join([experiment, *words])
    return labels


def _with_ranks(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the settings; a run that never started has the ranks of the runs like it, if they agree."""
    started: dict[str, set[int]] = {}
    for each in settings:
        if each.get("ranks") is not None:
            started.setdefault(_without_ranks(each), set()).add(each["ranks"])
    for each in settings:
        known = started.get(_without_ranks(each), set())
        if "ranks" in each and each["ranks"] is None and len(known) == 1:
            each["ranks"] = next(iter(known))
    return settings


def _without_ranks(settings: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in settings.items() if key != "ranks"}, default=str)


def _settings(run: Run) -> dict[str, Any]:
    experiment = {
        key: value
        for key, value in flatten(run.config["experiment"])
        if key not in REPLICATES and not key.startswith(_NO_RESULT)
    }
    return {**experiment, "site": run.site, "ranks": run.world_size}


def _telling(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns few keys that tell all different settings apart: each time the one that splits most."""
    cells = [{key: json.dumps(value, default=str) for key, value in each.items()} for each in settings]
    keys = sorted(dict.fromkeys(key for each in cells for key in each), key=_importance)
    wanted = len({json.dumps(each, sort_keys=True) for each in cells})
    chosen: list[str] = []
    while _kinds(cells, chosen) < wanted:
        chosen.append(max(keys, key=lambda key: _kinds(cells, [*chosen, key])))  # the first of equal ones
    return chosen


def _kinds(cells: Sequence[Mapping[str, str]], keys: Sequence[str]) -> int:
    return len({tuple(each.get(key) for key in keys) for each in cells})


def _importance(key: str) -> bool:
    return key.startswith("diagnostics.")  # what is measured besides says least about a setting


def _short(key: str) -> str:
    return key.removeprefix("preconditioner.").removeprefix("optimizer.").removeprefix("diagnostics.")


def _word(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _WORD else f"{text[: _WORD - 1]}…"
