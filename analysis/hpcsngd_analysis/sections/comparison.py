"""Time to target, performance profiles, and verdicts on "better than the baseline"."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import pandas as pd

from hpcsngd_analysis import comparison_figures as figures
from hpcsngd_analysis import stats, text
from hpcsngd_analysis.compare import Verdict, compare_runs
from hpcsngd_analysis.groups import named
from hpcsngd_analysis.panels import Column, Grid, Panel, Section, bars_panel, plain
from hpcsngd_analysis.profiles import LARGEST_RATIO, performance_profiles
from hpcsngd_analysis.sections.context import Context

_TARGET_COLUMNS = (
    Column("group", "setting", "name"),
    Column("runs", "runs", "whole"),
    Column("reached", "reached it", "whole"),
    Column("censored", "ended without", "whole"),
    Column("epochs", "median epochs", "number"),
    Column("train_s", "median training time", "seconds"),
)
_VERDICT_COLUMNS = (
    Column("method", "setting", "name"),
    Column("question", "better by"),
    Column("verdict", "verdict"),
    Column("n", "pairs", "whole"),
    Column("estimate", "estimate", "number"),
    Column("low", "from", "number"),
    Column("high", "to", "number"),
    Column("censored", "censored pairs", "whole"),
    Column("more_seeds", "more seeds would decide", "whole"),
    Column("reason", "why"),
)


def target(context: Context) -> Section | None:
    """Returns when runs reached the target; None without one, or without a run that was evaluated."""
    wanted = context.options.target
    if wanted is None or context.table("eval").empty:
        return None
    reached = _reached(context, wanted)
    rows = figures.target_rows(reached, context.groups)
    found = [figures.arrivals(reached, group) for group in context.groups]
    grid = Grid("target", "", _TARGET_COLUMNS, tuple(rows))
    panel = Panel("arrivals", f"Runs that reached {text.share(wanted)}", figures.arrivals_figure(found))
    note = (
        "Times are training time, interpolated between evaluations. A run that ended without reaching the "
        "target is "
        "censored, not left out: in the medians it counts as infinitely late, and the curve is Kaplan's and "
        "Meier's, "
        "with a cross where such a run ended."
    )
    return Section(
        "target",
        f"Time to {text.share(wanted)} test accuracy",
        tuple(_target_words(rows)),
        (grid,),
        (panel,),
        note,
    )


def _reached(context: Context, wanted: float) -> pd.DataFrame:
    """Returns `stats.time_to_target` of all runs: one never evaluated has not reached it."""
    found = stats.time_to_target(context.table("eval"), wanted)
    missing = [run.name for run in context.runs.records if run.name not in found.index]
    never = pd.DataFrame({"reached": False, "epochs": 0.0, "train_s": 0.0}, index=missing)
    return pd.concat([found, never]) if missing else found


def _target_words(rows: list[dict[str, object]]) -> Iterator[str]:
    runs, reached = (sum(int(str(row[name])) for row in rows) for name in ("runs", "reached"))
    yield f"{reached} of {runs} runs reached the target; {runs - reached} ended without."
    timed = [row for row in rows if row["train_s"] is not None]
    if timed:
        fastest = min(timed, key=lambda row: float(str(row["train_s"])))
        seconds = text.seconds(float(str(fastest["train_s"])))
        yield (
            f"The shortest median training time to it is {seconds}, of {fastest['group']}; the verdicts say "
            "what may be chance."
        )


def profiles(context: Context) -> Section | None:
    """Returns performance profiles; None without a target or with a single method."""
    wanted = context.options.target
    if wanted is None:
        return None
    reached = _reached(context, wanted)
    times = figures.problem_times(context.runs, context.groups, reached)
    found, problems = performance_profiles(times)
    if len(found) < 2 or not problems:
        return None
    panel = Panel("profiles", "Problems solved within a factor of the fastest", figures.profile_figure(found))
    columns = (Column("method", "method", "name"), Column("score", "score", "number"))
    rows = tuple({"method": each.method, "score": plain(each.score)} for each in found)
    note = (
        f"Over {problems} problem{'s' if problems > 1 else ''} (data, model and seed) that every method "
        "tried and at "
        "least one solved (Dolan and Moré, 2002). The score is the mean height up to a factor of "
        f"{LARGEST_RATIO:g}, as "
        "AlgoPerf takes it: 1 would be the fastest on every problem."
    )
    return Section(
        "profiles", "Performance profiles", (), (Grid("profiles", "", columns, rows),), (panel,), note
    )


def verdicts(context: Context) -> Section | None:
    """Returns for each group whether it is better than the baseline; None without one."""
    if not context.options.baseline:
        return None
    baseline = named(context.groups, context.runs, context.options.baseline)
    wanted = context.options.target
    questions: dict[str, float | None] = {"final test accuracy": None}
    if wanted is not None:
        questions[f"training time to {text.share(wanted)}"] = wanted
    found = {
        (question, group.name): compare_runs(context.runs, group.runs, baseline.runs, target=aim)
        for question, aim in questions.items()
        for group in context.groups
        if group is not baseline
    }
    if not found:
        return None
    rows = tuple(
        {"method": method, "question": question, **_cells(verdict)}
        for (question, method), verdict in found.items()
    )
    panels = (
        bars_panel(
            "verdict-accuracy",
            f"Final accuracy minus that of {baseline.name}",
            figures.verdict_figure(_of(found, "final test accuracy"), "difference of shares", 0.0),
        ),
        *(
            bars_panel(
                "verdict-time",
                f"Training time over that of {baseline.name}",
                figures.verdict_figure(_of(found, question), "ratio", 1.0),
            )
            for question, aim in questions.items()
            if aim is not None
        ),
    )
    words = tuple(_words(found, baseline.name))
    grid = Grid("verdicts", "", _VERDICT_COLUMNS, rows)
    return Section("verdicts", f"Against {baseline.name}", words, (grid,), panels, _VERDICT_NOTE)


_VERDICT_NOTE = (
    "Runs of one seed are pairs. Supported: the 95 % interval of the paired differences (Student's t; of "
    "times, of the "
    "ratio) lies on the better side. Not supported: it lies on the other. Cannot tell: it holds both. Where "
    "runs ended "
    "without reaching the target, the exact sign test decides. Refused: too few pairs, or times from "
    "hardware that is "
    "unknown or differs. No correction is made for the number of comparisons."
)


def _of(found: Mapping[tuple[str, str], Verdict], question: str) -> dict[str, Verdict]:
    return {method: verdict for (asked, method), verdict in found.items() if asked == question}


def _cells(verdict: Verdict) -> dict[str, object]:
    numbers = {name: getattr(verdict, name) for name in ("estimate", "low", "high")}
    return {
        "verdict": verdict.word,
        "n": verdict.n,
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "censored": verdict.censored,
        "more_seeds": verdict.more_seeds,
        "reason": verdict.reason,
    }


def _words(found: Mapping[tuple[str, str], Verdict], baseline: str) -> Iterator[str]:
    for (question, method), verdict in found.items():
        if verdict.word != "refused":
            yield _sentence(method, baseline, question, verdict)
    refused = sum(verdict.word == "refused" for verdict in found.values())
    if refused:
        yield f"{refused} comparison{'s are' if refused > 1 else ' is'} refused; the table says why."


def _sentence(method: str, baseline: str, question: str, verdict: Verdict) -> str:
    """Returns a verdict as one sentence with its evidence."""
    claim = f"{method} is better than {baseline} by {question}"
    evidence = [f"n = {verdict.n}"]
    if math.isfinite(verdict.low):
        evidence.append(f"{verdict.estimate:.4g} [{verdict.low:.4g}, {verdict.high:.4g}]")
    if verdict.more_seeds:
        seeds = "seed" if verdict.more_seeds == 1 else "seeds"
        evidence.append(f"about {verdict.more_seeds} more {seeds} would decide")
    return f"{verdict.word.capitalize()}: {claim} ({', '.join(evidence)}; {verdict.reason})."
