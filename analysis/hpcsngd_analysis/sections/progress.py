"""Accuracy and loss against epochs, samples and charged time."""

from __future__ import annotations

from hpcsngd_analysis import figures
from hpcsngd_analysis.panels import Panel, Section
from hpcsngd_analysis.sections.context import POINTS_NOTE, Context

METRICS: tuple[figures.Metric, ...] = ("accuracy", "loss")
CLOCKS: tuple[tuple[figures.Clock, str], ...] = (
    ("epoch", "epoch"),
    ("samples", "samples"),
    ("train_s", "training time"),
    ("charged_s", "charged time"),
)
TIMES = (
    "Training time is training alone, over all attempts: without evaluation, checkpoints, queueing, start-up "
    "and work "
    "done twice. Charged time is what the site charges: all of that but the queue."
)


def curves(context: Context) -> Section | None:
    """Returns the curves of all runs; None with too many runs to draw one by one."""
    if context.is_crowded or not any(len(context.table(name)) for name in ("train", "eval")):
        return None
    panels = []
    for metric in METRICS:
        for clock, word in CLOCKS:
            drawing = figures.figure(figures.curves(context.runs, metric, clock), context.runs)
            panels.append(Panel(f"{metric}-{clock}", f"{metric.capitalize()} against {word}", drawing))
    note = f"Training values are means since the row before, over all ranks. {TIMES} {POINTS_NOTE}"
    return Section("curves", "Curves", panels=tuple(panels), note=note)


def scores(context: Context) -> Section | None:
    """Returns the curves of what else evaluations say: perplexity, BLEU; None without any."""
    table = context.table("scores")
    if context.is_crowded or table.empty:
        return None
    panels = []
    for metric in table["metric"].unique():
        drawing = figures.figure(figures.score_curves(context.runs, str(metric)), context.runs)
        panels.append(Panel(f"score-{metric}", f"{metric} against epoch", drawing))
    note = f"Of whole splits, each sample once. {POINTS_NOTE}"
    return Section("scores", "Scores", panels=tuple(panels), note=note)


def means(context: Context) -> Section | None:
    """Returns the means of groups with bootstrap intervals; None where no group has two runs."""
    if all(len(group.runs) < 2 for group in context.groups) and not context.is_crowded:
        return None
    panels = []
    for metric in METRICS:
        for clock, word in CLOCKS:
            found = figures.bands(context.runs, context.groups, metric, clock, generator=context.generator)
            drawing = figures.band_figure(found, metric, clock)
            panels.append(Panel(f"mean-{metric}-{clock}", f"Mean test {metric} against {word}", drawing))
    return Section("means", "Means over seeds", panels=tuple(panels), note=_note(context))


def _note(context: Context) -> str:
    smallest = min((len(group.runs) for group in context.groups if len(group.runs) > 1), default=0)
    few = (
        " With so few seeds a bootstrap interval is too narrow: it cannot reach beyond the runs there are."
        if smallest < 5
        else ""
    )
    many = " With so many runs, groups are drawn instead of runs." if context.is_crowded else ""
    return (
        "Lines are means over the runs of a setting that differ in seed, areas 95 % bootstrap intervals "
        "of the mean, of whole curves, with expanded percentiles (Hesterberg, 2015), as far as the shortest "
        f"run went. {few}{many}"
    ).strip()
