"""Is a method better than a baseline? Supported, not supported, cannot tell, or refused.

Runs are compared in pairs of one seed, which takes out what a seed does to both. A verdict is reached by an
interval, never by a mean alone, and not at all where the runs cannot carry one: too few pairs, or times from
different hardware.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from hpcsngd_analysis import stats
from hpcsngd_analysis.load import Run, Runs

Word = Literal["supported", "not supported", "cannot tell", "refused"]

CONFIDENCE = 0.95
FEWEST = 3
"""Pairs below which no verdict is given."""

_MOST = 1000  # more seeds than this are not worth naming


@dataclass(frozen=True)
class Verdict:
    """What the runs say about "the method is better than the baseline".

    Attributes:
        word: the verdict.
        reason: in one sentence, for people.
        n: pairs that count.
        estimate: mean of method minus baseline; of times the geometric mean of method over baseline. NaN
            where there is none.
        low: lower end of its interval; NaN where there is none.
        high: upper end.
        more_seeds: further pairs that would decide if they are like those there are; None where no number up
            to 1,000 would, or the word is no open question.
        censored: pairs in which one or both never reached the target.
    """

    word: Word
    reason: str
    n: int = 0
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    more_seeds: int | None = None
    censored: int = 0


def compare_values(
    method: Mapping[int, float], baseline: Mapping[int, float], *, is_less_better: bool = False
) -> Verdict:
    """Returns whether the method's values are better, by Student's interval of the paired differences.

    Args:
        method: seed -> final value, such as an accuracy; NaN counts as no value.
        baseline: the same of the baseline.
        is_less_better: whether a lower value is better, as of a loss.
    """
    pairs = _pairs(method, baseline)
    if len(pairs) < FEWEST:
        return _too_few(len(pairs))
    return _judge([mine - other for mine, other in pairs], sign=-1 if is_less_better else 1)


@dataclass(frozen=True)
class Arrival:
    """When a run reached the target; if it did not, until when that is known: infinity if it never will."""

    seconds: float
    is_reached: bool


def compare_times(method: Mapping[int, Arrival], baseline: Mapping[int, Arrival]) -> Verdict:
    """Returns whether the method reaches the target sooner.

    Where all runs reached it: Student's interval of the paired logarithms, so the estimate is a ratio. With
    runs that did not, the exact sign test (two-sided) over the pairs in which it is known who came first:
    somebody did, no later than the other one was watched.

    Args:
        method: seed -> arrival.
        baseline: the same of the baseline.
    """
    pairs = [(method[seed], baseline[seed]) for seed in method if seed in baseline]
    if len(pairs) < FEWEST:
        return _too_few(len(pairs))
    if not all(mine.is_reached and other.is_reached for mine, other in pairs):
        return _judge_signs(pairs)
    found = _judge([math.log(mine.seconds / other.seconds) for mine, other in pairs], sign=-1)
    low, high = math.exp(found.low), math.exp(found.high)
    return Verdict(found.word, found.reason, found.n, math.exp(found.estimate), low, high, found.more_seeds)


def compare_runs(
    runs: Runs,
    method: Sequence[str],
    baseline: Sequence[str],
    *,
    target: float | None = None,
    split: str = "test",
) -> Verdict:
    """Returns whether a method's runs are better than a baseline's.

    Without a target by the final accuracy of completed runs. With one by the training time until the accuracy
    was reached; a run that failed counts as never arriving, one that has not ended or was cancelled does not
    count. Times are compared only where the hardware is known and the same.

    Args:
        runs: with the table ``eval``.
        method: names of the method's runs, each with another seed.
        baseline: names of the baseline's runs.
        target: accuracy, a share.
        split: which data: ``test`` or ``validation``.
    """
    records = {run.name: run for run in runs.records}
    sides = [[records[name] for name in names] for names in (method, baseline)]
    refusal = next(filter(None, map(repeated_seed, sides)), "") or (
        unlike_hardware([*sides[0], *sides[1]]) if target is not None else ""
    )
    if refusal:
        return Verdict("refused", refusal)
    if target is None:
        final = stats.split_results(runs.tables["eval"], split)["final_accuracy"]
        return compare_values(
            *(
                {seed_of(run): float(final.get(run.name, math.nan)) for run in _completed(side)}
                for side in sides
            )
        )
    reached = stats.time_to_target(runs.tables["eval"], target, split)
    arrivals = [
        {seed_of(run): _arrival(run, reached) for run in side if run.status and run.state != "cancelled"}
        for side in sides
    ]
    return compare_times(*arrivals)


def _arrival(run: Run, reached: pd.DataFrame) -> Arrival:
    found = reached[reached.index == run.name]
    seconds = float(found["train_s"].iloc[0]) if len(found) else 0.0
    if len(found) and bool(found["reached"].iloc[0]):
        return Arrival(seconds, is_reached=True)
    return Arrival(math.inf if run.state == "failed" else seconds, is_reached=False)


def _pairs(method: Mapping[int, float], baseline: Mapping[int, float]) -> list[tuple[float, float]]:
    found = [(method[seed], baseline[seed]) for seed in method if seed in baseline]
    return [pair for pair in found if not any(map(math.isnan, pair))]


def _too_few(pairs: int) -> Verdict:
    words = "no pair of runs has" if not pairs else "1 pair has" if pairs == 1 else f"{pairs} pairs have"
    reason = f"{words} a seed in common and a result; no verdict from fewer than {FEWEST}"
    return Verdict("refused", reason, pairs, more_seeds=FEWEST - pairs)


def _judge(differences: Sequence[float], *, sign: int) -> Verdict:
    """Returns the verdict by the interval of differences; ``sign`` says which direction is better."""
    found = stats.mean_interval(differences, confidence=CONFIDENCE)
    best, worst = (found.low, found.high)[::-sign]
    percent = f"{CONFIDENCE:.0%}"
    more: int | None = None
    word: Word
    if sign * worst > 0:
        word, reason = "supported", f"the whole {percent} interval is on the better side"
    elif sign * best <= 0:
        word, reason = "not supported", f"the whole {percent} interval is on the side of the baseline"
    else:
        word, reason = "cannot tell", f"the {percent} interval holds both better and worse"
        more = _more_for_interval(differences)
    return Verdict(word, reason, found.n, found.mean, found.low, found.high, more)


def _more_for_interval(differences: Sequence[float]) -> int | None:
    """Returns the fewest further pairs that shrink the interval off zero, mean and spread staying."""
    n, mean = len(differences), abs(statistics.fmean(differences))
    spread = statistics.stdev(differences)

    def decides(size: int) -> bool:
        return mean > stats.student_quantile(CONFIDENCE, size - 1) * spread / math.sqrt(size)

    if not decides(n + _MOST):
        return None
    fewest, enough = n, n + _MOST  # more pairs never decide less
    while enough - fewest > 1:
        middle = (fewest + enough) // 2
        fewest, enough = (fewest, middle) if decides(middle) else (middle, enough)
    return enough - n


def _judge_signs(pairs: Sequence[tuple[Arrival, Arrival]]) -> Verdict:
    wins = sum(_is_first(mine, other) for mine, other in pairs)
    losses = sum(_is_first(other, mine) for mine, other in pairs)
    censored = sum(not (mine.is_reached and other.is_reached) for mine, other in pairs)
    word, more = _sign_word(wins, losses), None
    if word == "cannot tell":
        more = next((extra for extra in range(1, _MOST + 1) if _would_decide(wins, losses, extra)), None)
    reason = f"sooner in {wins}, later in {losses} of {len(pairs)} pairs: sign test, as not all runs arrived"
    return Verdict(word, reason, len(pairs), more_seeds=more, censored=censored)


def _is_first(one: Arrival, other: Arrival) -> bool:
    """Returns whether one is known to have arrived before the other."""
    if not one.is_reached:
        return False
    return one.seconds < other.seconds if other.is_reached else one.seconds <= other.seconds


def _would_decide(wins: int, losses: int, extra: int) -> bool:
    """Returns whether further pairs decide, if they are won as often as those that there are."""
    if wins == losses:
        return False
    share = wins / (wins + losses)
    more_wins = round(share * extra)
    return _sign_word(wins + more_wins, losses + extra - more_wins) != "cannot tell"


def _sign_word(wins: int, losses: int) -> Word:
    """Returns the verdict of the two-sided exact sign test."""
    decided = wins + losses
    extreme = max(wins, losses)
    tail = sum(math.comb(decided, count) for count in range(extreme, decided + 1)) / 2**decided
    if min(1.0, 2 * tail) > 1 - CONFIDENCE:
        return "cannot tell"
    return "supported" if wins > losses else "not supported"


def _completed(side: Sequence[Run]) -> list[Run]:
    return [run for run in side if run.state == "completed"]


def seed_of(run: Run) -> int:
    """Returns what runs are paired by."""
    return int(run.config["experiment"].get("seed") or 0)


def repeated_seed(side: Sequence[Run]) -> str:
    """Returns why runs of one side cannot be paired; empty where they can."""
    seeds = [seed_of(run) for run in side]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if not twice:
        return ""
    shown = ", ".join(map(str, twice[:3]))
    return f"several runs of {side[0].experiment} have the same seed ({shown}): leave out all but one"


def unlike_hardware(records: Sequence[Run], *, ranks_differ: bool = False) -> str:
    """Returns why times of these runs cannot be compared; empty where they can.

    Args:
        records: the runs.
        ranks_differ: whether they may have other numbers of ranks, where these are what is compared.
    """
    unknown = [run.name for run in records if not run.hardware]
    if unknown:
        return f"the hardware of {unknown[0]} is not recorded, so its times cannot be compared"
    kinds = {_machine(run, ranks_differ): run.name for run in records}
    if len(kinds) > 1:
        (first, run), (second, other) = list(kinds.items())[:2]
        return f"times from different hardware cannot be compared: {first} ({run}), {second} ({other})"
    return ""


def _machine(run: Run, ranks_differ: bool) -> str:
    """Returns in words what decides how fast a run can be."""
    cards = [str(card.get("name")) for card in run.hardware.get("gpus") or []]
    cores = f"{run.hardware.get('cpu') or 'unknown processor'} x {run.hardware.get('cpus')}"
    place = ", ".join([cores, *cards])
    return place if ranks_differ else f"{run.world_size} ranks on {place}"
