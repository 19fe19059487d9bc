"""The page's figures as files for papers and slides. Needs kaleido and a Chrome or Chromium."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import plotly.graph_objects as go
import plotly.io

from hpcsngd.errors import HpcsngdError
from hpcsngd_analysis.drawing import plain
from hpcsngd_analysis.panels import Panel

Format = Literal["png", "svg", "pdf"]

WIDTH, HEIGHT = 900, 560
"""Size of a figure in CSS pixels; PNG has twice as many."""

_REM = 16


def standalone(panel: Panel) -> go.Figure:
    """Returns a panel's figure with the title and the legend that on the page stand beside it."""
    figure = go.Figure(panel.figure)
    names = {trace.name for trace in figure.data if trace.showlegend is not False}
    figure.update_layout(
        title={"text": plain(panel.title), "x": 0.01, "yanchor": "top", "font": {"size": 16}},
        margin={"t": 60},
        showlegend=len(names) > 1,
        legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"},
        width=WIDTH,
        height=max(HEIGHT, round(panel.height_rem * _REM)),
    )
    # On the page the key shows and hides these; here all that is drawn stays.
    figure.for_each_trace(
        lambda trace: trace.update(showlegend=trace.showlegend is not False and bool(trace.name))
    )
    return figure


def export(panels: Sequence[Panel], folder: Path, form: Format) -> list[Path]:
    """Writes each panel as ``<id>.<form>``.

    Args:
        panels: figures of a page.
        folder: where to; made if it is missing.
        form: the file format.

    Returns:
        The files, in order.

    Raises:
        HpcsngdError: kaleido or a browser is missing, or a file cannot be written.
    """
    files = [folder / f"{panel.id}.{form}" for panel in panels]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plotly.io.write_images(
            [standalone(panel) for panel in panels], files, format=form, scale=2 if form == "png" else 1
        )
    except (ImportError, ValueError, RuntimeError) as error:
        raise HpcsngdError(
            f"figures cannot be written as {form}: they need kaleido (pip install 'hpcsngd[export]') and "
            "Chrome or Chromium "
            f"(on Debian: apt-get install chromium); {error}"
        ) from error
    except OSError as error:
        raise HpcsngdError(f"cannot write figures to {folder}: {error.strerror}") from error
    return files
