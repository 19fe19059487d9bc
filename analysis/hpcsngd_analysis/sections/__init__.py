"""The sections of the page, in order.

A section is a function from `Context` to a `Section`, or to None where the runs have nothing to show. Each
names the tables that it reads and what makes a run write them, so that the page can say what is not on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hpcsngd_analysis.panels import Section
from hpcsngd_analysis.sections import budget, comparison, cost, curvature, model, progress
from hpcsngd_analysis.sections.context import Context


@dataclass(frozen=True)
class Builder:
    """One section: its id, how it is made, and what it takes to have it."""

    id: str
    title: str
    build: Callable[[Context], Section | None]
    tables: tuple[str, ...]
    source: str


BUILDERS: tuple[Builder, ...] = (
    Builder("curves", "Curves", progress.curves, ("train", "eval"), "training"),
    Builder("scores", "Scores", progress.scores, ("scores",), "tasks on text"),
    Builder("means", "Means over seeds", progress.means, ("train", "eval"), "two runs that differ in seed"),
    Builder("target", "Time to target", comparison.target, ("eval",), "--target ACCURACY"),
    Builder(
        "profiles", "Performance profiles", comparison.profiles, ("eval",), "--target ACCURACY, two methods "
        "on the same seeds",
    ),
    Builder("verdicts", "Against a baseline", comparison.verdicts, ("eval",), "--baseline EXP"),
    Builder(
        "budgets", "Equal samples, equal time", budget.budgets, ("train", "eval"), "two settings, completed",
    ),
    Builder("clocks", "Where time went", cost.clocks, ("train", "eval"), "attempts that have started"),
    Builder("phases", "Phases of a step", cost.phases, ("profiling",), "--profiling"),
    Builder("ranks", "Timing against ranks", cost.ranks, ("profiling",), "--profiling on 1, 2, 4 ... ranks"),
    Builder("scaling", "Scaling", cost.scaling, ("train",), "runs on 1, 2, 4 ... ranks"),
    Builder("stragglers", "Stragglers", cost.stragglers, ("profiling",), "--profiling on several ranks"),
    Builder("bytes", "Bytes and memory", cost.sizes, ("communication", "memory"), "--profiling"),
    Builder("low-rank", "Matrix rank", curvature.low_rank, ("rank_analysis", "kept"), "--rank-analysis"),
    Builder(
        "gradient-norm", "Gradient norm and critical periods", curvature.gradient_norm,
        ("grad_norm", "switches", "train"), "--grad-norm",
    ),
    Builder("gradient-error", "Gradient error", curvature.gradient_error, ("grad_error",), "--grad-error"),
    Builder("damping", "Damping", curvature.damping, ("rank_analysis",), "--rank-analysis"),
    Builder("staleness", "Staleness", curvature.staleness, ("staleness",), "the strategy parameter_server"),
    Builder("lbfgs", "L-BFGS", curvature.lbfgs, ("lbfgs",), "the optimizer lbfgs"),
    Builder(
        "preconditioning", "Scale and rotation", curvature.preconditioning, ("quantify",),
        "diagnostics.quantify_every",
    ),
    Builder("layers", "Models", model.layers, ("layers",), "training"),
    Builder("classification", "Classification", model.classification, ("confusion",), "training, at its end"),
    Builder(
        "landscape", "Loss landscape", model.landscape, ("landscape", "landscape_path"),
        "hpcsngd landscape RUN",
    ),
)  # fmt: skip


def build(context: Context, only: Sequence[str] = ()) -> tuple[list[Section], list[Builder]]:
    """Returns the sections that the runs support, and those that they do not.

    Args:
        context: runs and options.
        only: ids of the sections wanted, in this order; default: all.
    """
    known = {builder.id: builder for builder in BUILDERS}
    wanted = [known[name] for name in only] or list(BUILDERS)
    made = [(builder, _with_content(builder.build(context))) for builder in wanted]
    return [section for _, section in made if section], [builder for builder, section in made if not section]


def _with_content(section: Section | None) -> Section | None:
    """Returns a section without the figures that have nothing to draw; None where nothing is left."""
    if section is None:
        return None
    panels = tuple(panel for panel in section.panels if not panel.is_empty)
    has_content = any((section.words, section.grids, panels, section.texts))
    return replace(section, panels=panels) if has_content else None
