"""One offline HTML page about runs, and the same numbers as plain data.

The page is one file: style, script, plotly.js and data are inside, and its content security policy forbids
the browser to load anything else or to run a script that is not ours. Names and settings come from users;
they are text everywhere (jinja2 escapes, JSON inside the page has its ``<`` escaped).
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from hpcsngd import __version__
from hpcsngd.errors import HpcsngdError
from hpcsngd.rundir import utc_now
from hpcsngd_analysis import figures, sweeps, tables, text, thin
from hpcsngd_analysis.load import Run, Runs, load

SCHEMA = 1
"""Version of `to_json`; a change of meaning raises it."""

TABLES = ("train", "eval")
FIGURES: tuple[tuple[figures.Metric, figures.Clock, str], ...] = (
    ("accuracy", "epoch", "Accuracy against epoch"),
    ("accuracy", "train_s", "Accuracy against training time"),
    ("loss", "epoch", "Loss against epoch"),
    ("loss", "train_s", "Loss against training time"),
)
_RESULTS = ("final_accuracy", "final_loss", "best_accuracy", "best_epoch")


def to_json(paths: Iterable[str | Path]) -> dict[str, Any]:
    """Returns every number on the page as plain data for JSON.

    None means that there is no such number; a number that was measured as NaN or infinite is the text
    ``nan``, ``inf`` or ``-inf``, because JSON has no word for it.

    Args:
        paths: run directories, or folders of them.

    Returns:
        ``schema``, ``summary`` (``runs``, ``states``, ``best``, ``best_final``, ``revisions``, ``notes``),
        ``runs`` (one mapping per run), ``sweeps`` (settings ranked, see `sweeps.Sweep`), ``figures``
        (per curve ``run, split, x, y``), ``config_differences``
        and ``details`` (provenance and evidence of failure per run).

    Raises:
        RunDirError: see `hpcsngd_analysis.load.load`.
    """
    runs = load(paths, TABLES)
    return _content(runs, _drawn(runs))


def write_report(paths: Iterable[str | Path], out: Path) -> Path:
    """Writes the page and returns its path.

    Args:
        paths: run directories, or folders of them.
        out: the HTML file; its folder is made, an older file is replaced.

    Raises:
        RunDirError: see `hpcsngd_analysis.load.load`.
        HpcsngdError: the file cannot be written.
    """
    page = render(load(paths, TABLES))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise HpcsngdError(f"cannot write {out}: {error.strerror}") from error
    return out


def sweep_lines(paths: Iterable[str | Path]) -> list[str]:
    """Returns what the sweeps among the runs show: for each its best setting, or why there is none.

    Raises:
        RunDirError: see `hpcsngd_analysis.load.load`.
    """
    return [line for sweep in sweeps.sweeps(load(paths, ("eval",))) for line in sweep.lines()]


def render(runs: Runs) -> str:
    """Returns the page as text."""
    drawn = _drawn(runs)
    content = _content(runs, drawn)
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
    )
    return environment.get_template("report.html").render(
        content=content,
        figures=[
            {"id": _figure_id(data), "title": title, "is_empty": not data.lines}
            for data, (_, _, title) in zip(drawn, FIGURES, strict=True)
        ],
        drawings=_script_json(runs, drawn),
        styles={run.name: figures.style(position) for position, run in enumerate(runs.records)},
        splits=list(dict.fromkeys(line.split for data in drawn for line in data.lines)),
        differences=_differences_grid(tables.config_differences(runs)),
        hides_training=len(runs.records) > figures.MANY,
        plotly_js=Markup(get_plotlyjs()),  # noqa: S704 - our own dependency's script, not user text
        points=thin.POINTS,
        version=__version__,
        written=utc_now(),
        nonce=secrets.token_urlsafe(16),
    )


def _drawn(runs: Runs) -> list[figures.Curves]:
    return [figures.curves(runs, metric, clock) for metric, clock, _ in FIGURES]


def _figure_id(data: figures.Curves) -> str:
    return f"{data.metric}-{data.clock}"


def _script_json(runs: Runs, drawn: Sequence[figures.Curves]) -> Markup:
    """Returns all drawings as one JSON object for a script element, which no text in it can end."""
    drawings = []
    for data in drawn:
        drawing = figures.figure(data, runs)
        drawing.update_layout(showlegend=False)  # the page has one key for all figures
        drawings.append(f'"{_figure_id(data)}": {drawing.to_json()}')
    joined = "{" + ", ".join(drawings) + "}"
    # plotly's to_json escapes as well, but does not promise it.
    return Markup(joined.replace("<", "\\u003c"))  # noqa: S704 - escaped for a script element on this line


def _content(runs: Runs, drawn: Sequence[figures.Curves]) -> dict[str, Any]:
    rows = _rows(tables.runs_table(runs))
    notes = tables.notes(runs)
    differences = tables.config_differences(runs)
    return {
        "schema": SCHEMA,
        "summary": {
            "runs": len(rows),
            "states": dict(Counter(row["state"] for row in rows)),
            "best": _leader(rows, "best_accuracy"),
            # The last value of a run that has not completed is not a result to compare with.
            "best_final": _leader([row for row in rows if row["state"] == "completed"], "final_accuracy"),
            "revisions": sorted({run.revision for run in runs.records if run.revision}),
            "notes": [{"run": name, "note": note} for name, found in notes.items() for note in found],
        },
        "runs": rows,
        "sweeps": [sweep.to_json() for sweep in sweeps.sweeps(runs)],
        "figures": [_figure_record(data) for data in drawn],
        "config_differences": {
            str(run): {str(key): value for key, value in row.items()} for run, row in differences.iterrows()
        },
        "details": [_details(run) for run in runs.records],
    }


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for cells in table.to_dict("records"):
        measured = _RESULTS if cells["evaluations"] else ()
        rows.append({str(key): _plain(value, is_measured=key in measured) for key, value in cells.items()})
    return rows


def _plain(value: Any, *, is_measured: bool) -> int | float | str | None:
    """Returns a cell as plain data; NaN is a value where something was measured, else a missing cell."""
    if isinstance(value, str):
        return value
    if pd.isna(value) and not is_measured:
        return None
    if not math.isfinite(value):
        return str(float(value))
    plain: int | float = value.item() if hasattr(value, "item") else value
    return plain


def _read(write: Callable[[float | None], str]) -> Callable[[float | str | None], str]:
    """Returns a formatter that also takes the words by which `_plain` stands for NaN and infinity."""
    return lambda value: write(None if value is None else float(value))


def _leader(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, Any] | None:
    """Returns the run with the largest finite value of a column, the first of equal ones."""
    valid = [row for row in rows if isinstance(row[column], float)]
    if not valid:
        return None
    row = max(valid, key=lambda row: row[column])
    names = ("run", "experiment", "state", "best_epoch", "epochs")
    return {"accuracy": row[column], **{name: row[name] for name in names}}


def _figure_record(data: figures.Curves) -> dict[str, Any]:
    return {
        "id": _figure_id(data),
        "x": data.x_title,
        "y": data.y_title,
        "curves": [
            {"run": line.run, "split": line.split, "x": _numbers(line.x), "y": _numbers(line.y)}
            for line in data.lines
        ],
    }


def _numbers(values: thin.Floats) -> list[float | str]:
    return [value if math.isfinite(value) else str(value) for value in values.tolist()]


def _details(run: Run) -> dict[str, Any]:
    fault = (run.status.fault if run.status else None) or {}
    return {
        "run": run.name,
        "path": str(run.path),
        "ended": run.status.utc if run.status else None,
        "evidence": [str(line) for line in fault.get("evidence") or []],
        "provenance": {key: _as_text(value) for key, value in tables.flatten(run.provenance)},
    }


def _as_text(value: Any) -> str:
    if value is None:
        return tables.NOT_SET
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _differences_grid(differences: pd.DataFrame) -> dict[str, Any]:
    """Returns head and body of the table, turned so that it grows downwards rather than to the right."""
    has_many_keys = len(differences.columns) > len(differences)
    grid = differences.T if has_many_keys else differences
    return {
        "head": ["key" if has_many_keys else "run", *map(str, grid.columns)],
        "body": [[str(name), *map(str, row)] for name, row in zip(grid.index, grid.to_numpy(), strict=True)],
        "is_empty": differences.empty,
    }
