"""Models: sizes of layers, what is confused with what, and the loss around the trained weights."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hpcsngd_analysis.drawing import Floats, axis, color, decades, empty, layout, plain
from hpcsngd_analysis.series import Box, box, boxes

_SCALE = "Viridis"  # light to dark in print, and for the color-blind


def dimension_boxes(layers: pd.DataFrame, model_of: dict[str, str]) -> dict[str, dict[str, Box]]:
    """Returns how the layers' dimensions are distributed (HyLo, figure 2).

    Args:
        layers: the table; the layers that have a weight count, with the column of a bias in ``d_in``.
        model_of: run -> model; of several runs of a model the first counts.

    Returns:
        ``inputs`` and ``outputs`` -> model -> distribution.
    """
    found: dict[str, dict[str, Box]] = {"inputs": {}, "outputs": {}}
    for run, rows in layers[layers["d_out"] > 0].groupby("run", sort=False):
        model = model_of[str(run)]
        if model not in found["inputs"]:
            found["inputs"][model] = box((rows["d_in"] + rows["has_bias"]).to_numpy(float))
            found["outputs"][model] = box(rows["d_out"].to_numpy(float))
    return found if found["inputs"] else {}


def dimension_figure(data: dict[str, dict[str, Box]]) -> go.Figure:
    """Returns the drawing of `dimension_boxes`."""
    return boxes(data, "dimension (log scale)", x_title="model", is_log=True)


def confusion_matrix(confusion: pd.DataFrame) -> pd.DataFrame:
    """Returns how many samples of each class (index) were taken for each class (columns)."""
    classes = sorted({*confusion["label"], *confusion["predicted"]})
    found = confusion.pivot_table(
        index="label", columns="predicted", values="count", aggfunc="sum", fill_value=0
    )
    return found.reindex(index=classes, columns=classes, fill_value=0)


def class_report(matrix: pd.DataFrame) -> pd.DataFrame:
    """Returns precision, recall and F1 of each class, and how many samples it has.

    Args:
        matrix: of `confusion_matrix`.

    Returns:
        Columns ``label, precision, recall, f1, support``. Precision is NaN for a class that was never
        predicted, recall for one without samples, and F1 where both are needed and one is not there.
    """
    right = np.diag(matrix.to_numpy(float))
    predicted, support = matrix.to_numpy(float).sum(axis=0), matrix.to_numpy(float).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = right / predicted, right / support
        f1 = 2 * right / (predicted + support)
    f1 = np.where(np.isnan(precision) | np.isnan(recall), np.nan, f1)
    return pd.DataFrame(
        {
            "label": matrix.index,
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "support": support.astype(int),
        }
    )


def confusion_figure(matrix: pd.DataFrame) -> go.Figure:
    """Returns the confusion matrix as shares of each class, with the counts on hover."""
    counts = matrix.to_numpy(float)
    with np.errstate(invalid="ignore"):
        shares = counts / counts.sum(axis=1, keepdims=True)
    names = [str(name) for name in matrix.index]
    drawing = go.Figure(
        layout=layout(
            axis("predicted class", type="category", showgrid=False),
            axis("true class", type="category", autorange="reversed", showgrid=False),
            has_legend=False,
        )
    )
    drawing.add_trace(
        go.Heatmap(
            x=names,
            y=names,
            z=shares,
            text=[[f"{count:.0f}" for count in row] for row in counts],
            zmin=0,
            zmax=1,
            colorscale=[[0, "white"], [1, color(0)]],
            colorbar={"tickformat": ".0%", "thickness": 12},
            name="share of the class",
            texttemplate="%{text}" if len(names) <= 12 else None,
            hovertemplate="%{y} taken for %{x}: %{text} (%{z:.1%})<extra></extra>",
        )
    )
    return drawing


def loss_grid(landscape: pd.DataFrame) -> tuple[Floats, Floats, Floats]:
    """Returns both coordinates and the loss of one plane, NaN where it has not been evaluated yet.

    Args:
        landscape: rows of one plane and split.

    Returns:
        ``a`` of shape (columns,), ``b`` of shape (rows,), loss of shape (rows, columns).
    """
    grid = landscape.pivot_table(index="row", columns="column", values="loss", aggfunc="last", dropna=False)
    a = landscape.groupby("column")["a"].first().reindex(grid.columns)
    b = landscape.groupby("row")["b"].first().reindex(grid.index)
    return a.to_numpy(float), b.to_numpy(float), grid.to_numpy(float)


def _height(loss: Floats, *, is_log: bool) -> Floats:
    return np.log10(loss) if is_log else loss


def contour_figure(landscape: pd.DataFrame, paths: pd.DataFrame) -> go.Figure:
    """Returns the loss of a plane as contours, with each run's way over it.

    Args:
        landscape: rows of one plane and split.
        paths: rows of ``landscape_path`` on it, of any number of runs.
    """
    if landscape.empty:
        return empty()
    a, b, loss = loss_grid(landscape)
    is_log = decades(loss.ravel()) > 0
    drawing = go.Figure(layout=layout(axis(_axis_title(landscape, "a")), axis(_axis_title(landscape, "b"))))
    drawing.add_trace(
        go.Contour(
            x=a,
            y=b,
            z=_height(loss, is_log=is_log),
            colorscale=_SCALE,
            ncontours=25,
            line={"width": 0.5, "color": "white"},
            colorbar={"title": {"text": _loss_title(is_log)}, "thickness": 12},
            name=_loss_title(is_log),
            showlegend=False,
            hovertemplate=f"{_loss_title(is_log)} %{{z:.4~g}}<extra></extra>",
        )
    )
    for place, (run, rows) in enumerate(paths.groupby("run", sort=False)):
        drawing.add_trace(
            go.Scatter(
                x=rows["a"].to_numpy(float),
                y=rows["b"].to_numpy(float),
                name=plain(run),
                mode="lines+markers",
                line={"color": color(place + 1), "width": 2},
                marker={"size": 6, "line": {"color": "white", "width": 1}},
                text=[f"step {step}" for step in rows["step"]],
                hovertemplate="<b>%{fullData.name}</b><br>%{text}<extra></extra>",
            )
        )
    return drawing


def surface_figure(landscape: pd.DataFrame, paths: pd.DataFrame) -> go.Figure:
    """Returns the loss of a plane as a surface that can be turned, with each run's way at its own loss."""
    if landscape.empty:
        return empty()
    a, b, loss = loss_grid(landscape)
    is_log = decades(loss.ravel()) > 0
    drawing = go.Figure(layout=layout(axis(""), axis("")))
    drawing.update_layout(
        scene={
            "xaxis": {"title": {"text": "first axis"}},
            "yaxis": {"title": {"text": "second axis"}},
            "zaxis": {"title": {"text": _loss_title(is_log)}},
        },
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
    )
    drawing.add_trace(
        go.Surface(
            x=a,
            y=b,
            z=_height(loss, is_log=is_log),
            colorscale=_SCALE,
            opacity=0.9,
            showscale=False,
            name=_loss_title(is_log),
            showlegend=False,
        )
    )
    for place, (run, rows) in enumerate(paths.groupby("run", sort=False)):
        drawing.add_trace(
            go.Scatter3d(
                x=rows["a"].to_numpy(float),
                y=rows["b"].to_numpy(float),
                z=_height(rows["loss"].to_numpy(float), is_log=is_log),
                name=plain(run),
                mode="lines+markers",
                line={"color": color(place + 1), "width": 5},
                marker={"size": 3, "color": color(place + 1)},
            )
        )
    return drawing


def _loss_title(is_log: bool) -> str:
    return "log₁₀ loss" if is_log else "loss"


def _axis_title(landscape: pd.DataFrame, name: str) -> str:
    share = float(landscape[f"share_{name}"].iloc[0])
    words = {"a": "first axis", "b": "second axis"}[name]
    return words if math.isnan(share) else f"{words} ({share:.1%} of the variance)"
