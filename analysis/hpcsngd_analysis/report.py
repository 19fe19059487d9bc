"""One offline HTML page about runs, and the same numbers as plain data.

The page is one file: style, script, plotly.js and data are inside, and its content security policy forbids
the browser to load anything else or to run a script that is not ours. Names and settings come from users;
they are text everywhere (jinja2 escapes, JSON inside the page has its ``<`` escaped).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from hpcsngd import __version__
from hpcsngd.errors import HpcsngdError
from hpcsngd.rundir import utc_now
from hpcsngd_analysis import drawing, figures, sections, sweeps, tables, text, thin
from hpcsngd_analysis.load import Run, Runs, load
from hpcsngd_analysis.panels import Column, Grid, Panel, Section, grid_rows
from hpcsngd_analysis.sections import Builder
from hpcsngd_analysis.sections.context import Context, Options, context

SCHEMA = 2
"""Version of `to_json`; a change of meaning raises it."""

_RESULTS = ("final_accuracy", "final_loss", "best_accuracy", "best_epoch")
_COLUMNS = (
    Column("run", "run", "run"),
    Column("experiment", "experiment"),
    Column("site", "site"),
    Column("state", "state", "state"),
    Column("epochs", "epochs", "number"),
    Column("epochs_planned", "of", "number"),
    Column("final_accuracy", "final test accuracy", "share"),
    Column("best_accuracy", "best test accuracy", "share"),
    Column("final_loss", "final test loss", "number"),
    Column("train_s", "training time", "seconds"),
    Column("wall_s", "wall time", "seconds"),
    Column("world_size", "ranks", "whole"),
    Column("seed", "seed", "whole"),
    Column("attempts", "attempts", "whole"),
    Column("dropped_rows", "dropped rows", "whole"),
)
_RUNS_NOTE = (
    "Training time leaves out evaluation, checkpoints, queueing and work done twice after a resume. Wall "
    "time is what the "
    "workers of all attempts ran, up to the last row of each. The best accuracy is chosen with the test "
    "labels, so it "
    "flatters: compare methods by the final one, which is the last so far. Dropped rows were written again "
    "by a later "
    "attempt. – means that nothing was measured."
)


@dataclass(frozen=True)
class Report:
    """Runs, what was asked for, and what the page says about them."""

    context: Context
    content: Content

    @property
    def panels(self) -> list[Panel]:
        """All figures, in order."""
        return [panel for section in self.content.sections for panel in section.panels]

    @property
    def lines(self) -> list[str]:
        """What the sweeps among the runs show: for each its best setting, or why there is none."""
        return [line for sweep in self.content.sweeps for line in sweep["lines"]]


@dataclass(frozen=True)
class Content:
    """Everything on the page but its looks: summary, runs, sweeps, sections, settings, provenance."""

    summary: Mapping[str, Any]
    runs: Grid
    sweeps: Sequence[Mapping[str, Any]]
    sections: Sequence[Section]
    absent: Sequence[Builder]
    differences: Grid
    common: Mapping[str, str]
    details: Sequence[Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Returns the content as plain data."""
        return {
            "schema": SCHEMA,
            "summary": dict(self.summary),
            "runs": list(self.runs.rows),
            "sweeps": list(self.sweeps),
            "sections": [section.to_json() for section in self.sections],
            "absent": [{"section": each.id, "written_by": each.source} for each in self.absent],
            "config_differences": list(self.differences.rows),
            "provenance": dict(self.common),
            "details": list(self.details),
        }


def to_json(paths: Iterable[str | Path], options: Options | None = None) -> dict[str, Any]:
    """Returns every number on the page as plain data for JSON.

    None means that there is no such number; a number that was measured as NaN or infinite is the text
    ``nan``, ``inf`` or ``-inf``, because JSON has no word for it.

    Args:
        paths: run directories, or folders of them.
        options: what is asked for; default: everything.

    Returns:
        ``schema``, ``summary`` (``runs``, ``states``, ``best``, ``best_final``, ``revisions``, ``notes``),
        ``runs`` (one mapping per run), ``sweeps`` (settings ranked, see `sweeps.Sweep`), ``sections`` (each
        with ``words``, ``grids`` and ``figures``; a figure has its ``series`` with all numbers drawn),
        ``absent`` (sections for which no run has rows), ``config_differences``, ``provenance`` (what all runs
        share) and ``details`` (the rest of it, and evidence of failure, per run).

    Raises:
        RunDirError: see `hpcsngd_analysis.load.load`.
        HpcsngdError: an option that does not fit the runs.
    """
    return make(paths, options).content.to_json()


def write_report(paths: Iterable[str | Path], out: Path, options: Options | None = None) -> Path:
    """Writes the page and returns its path.

    Args:
        paths: run directories, or folders of them.
        out: the HTML file; its folder is made, an older file is replaced.
        options: what is asked for; default: everything.

    Raises:
        RunDirError: see `hpcsngd_analysis.load.load`.
        HpcsngdError: the file cannot be written, or an option does not fit the runs.
    """
    write_page(render(make(paths, options)), out)
    return out


def make(paths: Iterable[str | Path], options: Options | None = None) -> Report:
    """Returns the report on runs: everything but the page's text.

    Args:
        paths: run directories, or folders of them.
        options: what is asked for; default: everything.

    Raises:
        RunDirError: see `hpcsngd_analysis.load.load`.
        HpcsngdError: an option that does not fit the runs, or nothing that was asked for is in them.
    """
    which = context(load(paths, train_rows=thin.POINTS), options)
    return Report(which, content(which))


def write_page(page: str, out: Path) -> None:
    """Writes a text file by way of a temporary one.

    Raises:
        HpcsngdError: the file cannot be written.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise HpcsngdError(f"cannot write {out}: {error.strerror}") from error


def sweep_lines(paths: Iterable[str | Path]) -> list[str]:
    """Returns what the sweeps among the runs show: for each its best setting, or why there is none.

    Raises:
        RunDirError: see `hpcsngd_analysis.load.load`.
    """
    return [line for sweep in sweeps.sweeps(load(paths, ("eval",))) for line in sweep.lines()]


def render(report: Report) -> str:
    """Returns the page as text."""
    environment = Environment(
        loader=PackageLoader("hpcsngd_analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        share=_read(text.share),
        number=_read(text.number),
        seconds=_read(text.seconds),
        whole=text.whole,
        bytes=_read(text.size),
        hours=_read(text.hours),
    )
    which, page, runs = report.context, report.content, report.context.runs
    keyed = _keyed(report.panels)
    return environment.get_template("report.html").render(
        content=page,
        summary=page.summary,
        options=which.options,
        drawings={panel.id: _script_json(panel) for panel in report.panels},
        styles={run.name: drawing.style(position) for position, run in enumerate(runs.records)},
        splits=_splits(runs) if "split" in keyed else [],
        hides_training=len(runs.records) > figures.MANY,
        has_key=not which.is_crowded and "run" in keyed,
        groups=[(group.name, drawing.style(place)) for place, group in enumerate(which.groups)]
        if "group" in keyed
        else [],
        plotly_js=Markup(get_plotlyjs()),  # noqa: S704 - our own dependency's script, not user text
        version=__version__,
        written=utc_now(),
        nonce=secrets.token_urlsafe(16),
    )


def _splits(runs: Runs) -> list[str]:
    found = ["train"] if len(runs.tables["train"]) else []
    return [*found, *dict.fromkeys(map(str, runs.tables["eval"]["split"]))]


def _keyed(panels: Sequence[Panel]) -> set[str]:
    """Returns what traces of the figures belong to: ``run``, ``group``, ``split``."""
    return {key for panel in panels for trace in panel.figure.data for key in trace.meta or {}}


def _script_json(panel: Panel) -> Markup:
    """Returns a drawing as JSON for a script element, which no text in it can end."""
    # plotly's to_json escapes as well, but does not promise it.
    return Markup(str(panel.figure.to_json()).replace("<", "\\u003c"))  # noqa: S704 - escaped on this line


def content(which: Context) -> Content:
    """Returns everything that the page says about runs.

    Raises:
        HpcsngdError: an option that does not fit the runs.
    """
    runs = which.runs
    table = tables.runs_table(runs)
    rows = _rows(table)
    made, absent = sections.build(which, which.options.sections)
    if which.options.sections and not made:
        missing = "; ".join(f"{each.title} ({each.source})" for each in absent)
        raise HpcsngdError(f"the runs have nothing that the spec shows: {missing}")
    common, details = _details(runs.records)
    return Content(
        summary=_summary(runs, rows),
        runs=Grid("runs", "", _COLUMNS, rows, note=_RUNS_NOTE, is_filterable=True),
        sweeps=[sweep.to_json() for sweep in sweeps.sweeps(runs)],
        sections=made,
        absent=absent,
        differences=_differences(runs),
        common=common,
        details=details,
    )


def _rows(table: Any) -> tuple[dict[str, Any], ...]:
    measured = table["evaluations"] > 0
    with_results = iter(grid_rows(table[measured], _RESULTS))
    without = iter(grid_rows(table[~measured]))
    return tuple(next(with_results if is_measured else without) for is_measured in measured)


def _summary(runs: Runs, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    notes = tables.notes(runs)
    return {
        "runs": len(rows),
        "states": dict(Counter(row["state"] for row in rows)),
        "best": _leader(rows, "best_accuracy"),
        # The last value of a run that has not completed is not a result to compare with.
        "best_final": _leader([row for row in rows if row["state"] == "completed"], "final_accuracy"),
        "revisions": sorted({run.revision for run in runs.records if run.revision}),
        "notes": [{"run": name, "note": note} for name, found in notes.items() for note in found],
    }


def _read(write: Callable[[float | None], str]) -> Callable[[float | str | None], str]:
    """Returns a formatter that also takes the words that stand for NaN and infinity."""
    return lambda value: write(None if value is None else float(value))


def _leader(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, Any] | None:
    """Returns the run with the largest finite value of a column, the first of equal ones."""
    valid = [row for row in rows if isinstance(row[column], float)]
    if not valid:
        return None
    row = max(valid, key=lambda row: row[column])
    names = ("run", "experiment", "state", "best_epoch", "epochs")
    return {"accuracy": row[column], **{name: row[name] for name in names}}


def _differences(runs: Runs) -> Grid:
    """Returns the settings that differ, turned so that the table grows downwards rather than to the right."""
    found = tables.config_differences(runs)
    has_many_keys = len(found.columns) > len(found)
    grid = found.T if has_many_keys else found
    first = "key" if has_many_keys else "run"
    columns = (
        Column(first, first, "name" if has_many_keys else "run"),
        *(Column(str(name), str(name), "name") for name in grid.columns),
    )
    rows = tuple(
        {first: str(name), **dict(zip(map(str, grid.columns), map(str, row), strict=True))}
        for name, row in zip(grid.index, grid.to_numpy(), strict=True)
    )
    return Grid("settings", "", columns, () if found.empty else rows)


def _details(records: Sequence[Run]) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Returns the provenance that all runs share, and per run the rest and what else is to know."""
    leaves = [{key: _as_text(value) for key, value in tables.flatten(run.provenance)} for run in records]
    shared = set.intersection(*(set(each.items()) for each in leaves)) if len(leaves) > 1 else set()
    common = {key: value for key, value in leaves[0].items() if (key, value) in shared}
    return common, [
        _detail(run, {key: value for key, value in own.items() if key not in common})
        for run, own in zip(records, leaves, strict=True)
    ]


def _detail(run: Run, provenance: Mapping[str, str]) -> dict[str, Any]:
    fault = (run.status.fault if run.status else None) or {}
    return {
        "run": run.name,
        "path": str(run.path),
        "ended": run.status.utc if run.status else None,
        "evidence": [str(line) for line in fault.get("evidence") or []],
        "has_provenance": bool(run.provenance),
        "provenance": dict(provenance),
    }


def _as_text(value: Any) -> str:
    if value is None:
        return tables.NOT_SET
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
