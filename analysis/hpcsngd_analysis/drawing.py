"""The look that all figures share: colors, axes, and text that plotly takes for text."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

Floats = npt.NDArray[np.float64]

# Okabe and Ito, "Color universal design" (2008), without yellow, which is hard to see on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# plotly's name of the marker, and the same shape as a character for the page's key.
SYMBOLS = (
    ("circle", "●"),
    ("square", "■"),
    ("diamond", "◆"),
    ("triangle-up", "▲"),
    ("x", "✖"),
    ("cross", "✚"),
    ("star", "★"),
    ("triangle-down", "▼"),
)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

TIME_UNITS = (("h", 3600.0), ("min", 60.0), ("s", 1.0))
SHORT_TIME_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
BYTE_UNITS = (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0))

_LOG_FROM = np.log10(50.0)
_AXIS: Mapping[str, Any] = {
    "showline": True,
    "linecolor": "#888",
    "gridcolor": "#e6e6e6",
    "ticks": "outside",
    "zeroline": False,
    "automargin": True,
}


@dataclass(frozen=True)
class Style:
    """How a run or a group looks: color, plotly marker and the marker's shape as a character."""

    color: str
    symbol: str
    glyph: str


def style(position: int) -> Style:
    """Returns the look of the run at a position among the runs loaded; 56 runs look different."""
    symbol, glyph = SYMBOLS[position // len(PALETTE) % len(SYMBOLS)]
    return Style(PALETTE[position % len(PALETTE)], symbol, glyph)


def color(position: int) -> str:
    """Returns the color at a position; seven differ."""
    return PALETTE[position % len(PALETTE)]


def color_of_many(position: int) -> str:
    """Returns the color at a position where there are more than seven: then paler, then darker; 21 differ."""
    target, share = ((0, 0.0), (255, 0.55), (0, 0.45))[position // len(PALETTE) % 3]
    red, green, blue = (round(part + (target - part) * share) for part in _rgb(position))
    return f"rgb({red},{green},{blue})"


def faint(position: int, opacity: float = 0.18) -> str:
    """Returns the color at a position as a fill that lets others shine through."""
    red, green, blue = _rgb(position)
    return f"rgba({red},{green},{blue},{opacity})"


def _rgb(position: int) -> tuple[int, int, int]:
    red, green, blue = (int(color(position)[start : start + 2], 16) for start in (1, 3, 5))
    return red, green, blue


def plain(name: object) -> str:
    """Returns a user's text so that plotly, which reads a small HTML dialect in names, shows it as it is."""
    return html.escape(str(name), quote=False)


def wrapped(name: object, width: int = 24) -> str:
    """Returns a text as `plain` does, in lines of about ``width`` characters, for the label of a bar."""
    return "<br>".join(plain(line) for line in textwrap.wrap(str(name), width, break_long_words=True))


def unit(longest: float, units: Sequence[tuple[str, float]] = TIME_UNITS) -> tuple[str, float]:
    """Returns the name and size of the largest unit of which ``longest`` is at least two; else the last."""
    return next(((name, size) for name, size in units if longest >= 2 * size), units[-1])


def decades(values: Floats) -> float:
    """Returns the powers of ten that a logarithmic axis should span; 0 where a linear one serves.

    Logarithmic is an axis whose finite values are all positive and span a factor above 50, so that one
    diverging run does not flatten the others.
    """
    values = values[np.isfinite(values)]
    span = float(np.log10(values.max() / values.min())) if len(values) and values.min() > 0 else 0.0
    return span if span > _LOG_FROM else 0.0


def axis(title: str, *, decades: float = 0.0, **more: Any) -> dict[str, Any]:
    """Returns a plotly axis, logarithmic where ``decades`` (see `decades`) is not zero."""
    scale = {"type": "log", "dtick": _log_tick(decades)} if decades else {"type": "linear"}
    return {**_AXIS, "title": {"text": title}, **scale, **more}


def _log_tick(decades: float) -> str | int:
    # Left alone, plotly labels all of 1 to 9 over two decades, and the labels overlap. Its words: "D2" labels
    # 1, 2 and 5 of each decade; a number n labels every n-th decade.
    return "D2" if decades < 4 else max(1, round(decades / 8))


def layout(x: Mapping[str, Any], y: Mapping[str, Any], *, has_legend: bool = True, **more: Any) -> go.Layout:
    """Returns the layout of a figure with these axes; its own legend, where it has one, lies on top."""
    return go.Layout(
        template=go.layout.Template(),
        colorway=list(PALETTE),
        xaxis=dict(x),
        yaxis=dict(y),
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#222"},
        margin={"l": 60, "r": 16, "t": 16, "b": 52},
        plot_bgcolor="white",
        paper_bgcolor="white",
        hovermode="closest",
        hoverlabel={"namelength": -1, "bgcolor": "white"},
        showlegend=has_legend,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        **more,
    )


def empty(text: str = "no rows") -> go.Figure:
    """Returns a figure that says that there is nothing to draw."""
    drawing = go.Figure(layout=layout(axis(""), axis(""), has_legend=False))
    drawing.add_annotation(text=text, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    return drawing
