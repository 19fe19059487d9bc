"""Sweeps: which setting is best, and whether the runs can tell.

The runs of a sweep that differ in seed or fold alone are replicates of one setting. A setting is ranked by
the mean of its replicates' final accuracy, on the held-out folds of a cross-validation and else on test data,
and only when all replicates have completed: those that failed did not fail by chance.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hpcsngd_analysis import stats, text
from hpcsngd_analysis.load import Run, Runs
from hpcsngd_analysis.stats import Interval

REPLICATES = ("seed", "data.folds.index", "data.folds.seed")
CONFIDENCE = 0.95
NOT_THERE = "not there"
NO_ACCURACY = "without an accuracy"

_FOLD = "data.folds.index"
_SHOWN = 3

Split = Literal["test", "validation"]


@dataclass(frozen=True)
class Setting:
    """One setting and its replicates.

    Attributes:
        values: key path -> value, of the keys that tell settings apart.
        interval: of the final accuracy over the replicates that have one; None if none has.
        missing: why replicates have no result -> how many: a state, `NOT_THERE` or `NO_ACCURACY`.
    """

    values: Mapping[str, Any]
    interval: Interval | None
    missing: Mapping[str, int]

    @property
    def is_complete(self) -> bool:
        """Returns whether all replicates have a result."""
        return self.interval is not None and not self.missing

    @property
    def mean(self) -> float:
        """Returns the mean accuracy; minus infinity where there is none."""
        return self.interval.mean if self.interval else -math.inf

    def __str__(self) -> str:
        words = [f"{key}={_word(value)}" for key, value in self.values.items()]
        return ", ".join(words) or "the one setting"


@dataclass(frozen=True)
class Sweep:
    """A sweep's settings, ranked.

    Attributes:
        name: the sweep directory's name.
        split: what the accuracies were measured on.
        replicates: the keys in which replicates of a setting differ.
        settings: complete ones first, by falling mean; then the others.
    """

    name: str
    split: Split
    replicates: tuple[str, ...]
    settings: tuple[Setting, ...]

    @property
    def best(self) -> tuple[Setting, ...]:
        """Returns the complete settings with the highest mean: several if they are equal, none if none is."""
        complete = [setting for setting in self.settings if setting.is_complete]
        return tuple(each for each in complete if each.mean == complete[0].mean)

    @property
    def close(self) -> tuple[Setting, ...]:
        """Returns the other complete settings whose mean lies inside the best one's interval.

        Without an interval, which takes two replicates, that is all of them.
        """
        best = self.best
        if not best or best[0].interval is None:
            return ()
        low = best[0].interval.low
        others = [each for each in self.settings if each.is_complete and each not in best]
        return tuple(each for each in others if math.isnan(low) or each.mean >= low)

    @property
    def incomplete(self) -> tuple[Setting, ...]:
        """Returns the settings that lack results."""
        return tuple(each for each in self.settings if not each.is_complete)

    def lines(self) -> list[str]:
        """Returns what the sweep shows, for people."""
        over = f" over {', '.join(self.replicates)}" if self.replicates else ""
        count = "1 setting" if len(self.settings) == 1 else f"{len(self.settings)} settings"
        head = f"sweep {self.name}: {count}, final {self.split} accuracy{over}"
        return [head, *self._best_lines(), *self._incomplete_lines()]

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; None stands for a number that does not exist."""
        return {
            "name": self.name,
            "split": self.split,
            "confidence": CONFIDENCE,
            "replicates": list(self.replicates),
            "settings": [_plain(setting) for setting in self.settings],
            "best": [str(setting) for setting in self.best],
            "close": [str(setting) for setting in self.close],
            "lines": self.lines(),
        }

    def _best_lines(self) -> Iterator[str]:
        best, close = self.best, self.close
        if not best:
            yield "best: cannot tell, because no setting is complete"
            return
        word = "best" if len(best) == 1 else f"best, {len(best)} equal"
        for setting in best[:_SHOWN]:
            yield f"{word}: {setting}: {measured(setting)}"
        if len(best) > _SHOWN:
            yield f"  and {len(best) - _SHOWN} more"
        if close:
            names = "; ".join(f"{each} ({text.share(each.mean)})" for each in close[:_SHOWN])
            rest = f"; and {len(close) - _SHOWN} more" if len(close) > _SHOWN else ""
            yield f"cannot tell it from: {names}{rest}"

    def _incomplete_lines(self) -> Iterator[str]:
        leader = self.best[0].mean if self.best else math.inf
        for setting in self.incomplete[:_SHOWN]:
            why = ", ".join(f"{count} {word}" for word, count in setting.missing.items())
            higher = "; its mean so far is higher" if setting.mean > leader else ""
            yield f"incomplete, not ranked: {setting} ({why}): {measured(setting)}{higher}"
        if len(self.incomplete) > _SHOWN:
            yield f"incomplete, not ranked: {len(self.incomplete) - _SHOWN} more"


def measured(setting: Setting) -> str:
    """Returns mean, interval and number of replicates for people."""
    found = setting.interval
    if found is None:
        return "no result"
    if math.isnan(found.low):
        return f"{text.share(found.mean)}, one run: no interval"
    low, high = text.share(found.low), text.share(found.high)
    return (
        f"{text.share(found.mean)} [{low}, {high}], {CONFIDENCE:.0%} interval of the mean of {found.n} runs"
    )


def sweeps(runs: Runs) -> list[Sweep]:
    """Returns the sweeps among the runs, in the order first met.

    Args:
        runs: with the table ``eval``.
    """
    groups: dict[tuple[Path, Split], list[Run]] = {}
    for run in runs.records:
        if run.cell:
            groups.setdefault((run.path.parent, _split(run)), []).append(run)
    results = {split: stats.split_results(runs.tables["eval"], split) for split in ("test", "validation")}
    accuracies = {
        split: {str(name): float(value) for name, value in found["final_accuracy"].items()}
        for split, found in results.items()
    }
    return [_sweep(path.name, split, members, accuracies[split]) for (path, split), members in groups.items()]


def _split(run: Run) -> Split:
    return "validation" if _folds(run) else "test"


def _folds(run: Run) -> Mapping[str, Any]:
    data = run.config["experiment"].get("data") or {}
    return data.get("folds") or {}


def _sweep(name: str, split: Split, runs: Sequence[Run], accuracies: Mapping[str, float]) -> Sweep:
    cells = {run.name: {_short(key): value for key, value in run.cell.items()} for run in runs}
    keys = list(dict.fromkeys(key for cell in cells.values() for key in cell))
    # replicates exist only where a key of theirs takes several values
    replicates = tuple(
        key
        for key in keys
        if key in REPLICATES and len({_word(cell.get(key)) for cell in cells.values()}) > 1
    )
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(_key(cells[run.name], replicates, inside=False), []).append(run)
    expected = len({_key(cell, replicates, inside=True) for cell in cells.values()})
    settings = [
        _setting(cells[found[0].name], replicates, found, expected, accuracies) for found in members.values()
    ]
    ranked = sorted(settings, key=lambda setting: (not setting.is_complete, -setting.mean))
    return Sweep(name, split, replicates, tuple(ranked))


def _setting(
    cell: Mapping[str, Any],
    replicates: Sequence[str],
    runs: Sequence[Run],
    expected: int,
    accuracies: Mapping[str, float],
) -> Setting:
    missing: Counter[str] = Counter()
    values: list[float] = []
    for run in runs:
        accuracy = accuracies.get(run.name, math.nan)
        if run.state != "completed":
            missing[run.state] += 1
        elif math.isnan(accuracy):
            missing[NO_ACCURACY] += 1
        else:
            values.append(accuracy)
    if len(runs) < expected:
        missing[NOT_THERE] += expected - len(runs)
    folds = int(_folds(runs[0])["count"]) if _FOLD in replicates else None
    interval = _as_share(stats.mean_interval(values, confidence=CONFIDENCE, folds=folds)) if values else None
    own = {key: value for key, value in cell.items() if key not in replicates}
    return Setting(own, interval, dict(missing))


def _as_share(found: Interval) -> Interval:
    """Returns the interval without what no accuracy can be; NaN stays, as min and max keep their first."""
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def _short(key: str) -> str:
    return key.removeprefix("experiment.").removeprefix("exp.")


def _key(cell: Mapping[str, Any], replicates: Sequence[str], *, inside: bool) -> str:
    chosen = {key: value for key, value in cell.items() if (key in replicates) is inside}
    return json.dumps(chosen, sort_keys=True)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(setting: Setting) -> dict[str, Any]:
    found = setting.interval
    has_interval = found is not None and not math.isnan(found.low)
    return {
        "setting": str(setting),
        "values": dict(setting.values),
        "mean": found.mean if found else None,
        "low": found.low if found and has_interval else None,
        "high": found.high if found and has_interval else None,
        "n": found.n if found else 0,
        "missing": dict(setting.missing),
        "is_complete": setting.is_complete,
    }
