"""Models: layers and sizes, classification, loss landscape."""

from __future__ import annotations

import pandas as pd

from hpcsngd_analysis import model_figures as figures
from hpcsngd_analysis.panels import Column, Grid, Panel, Section, grid_rows
from hpcsngd_analysis.sections.context import Context
from hpcsngd_analysis.tables import flatten

SHOWN = 6
"""Of more groups than this the classification of the first is shown."""

_SIZE_COLUMNS = (
    Column("model", "model", "name"),
    Column("layers", "layers with parameters", "whole"),
    Column("parameters", "parameters", "whole"),
    Column("largest", "largest layer", "name"),
    Column("largest_parameters", "its parameters", "whole"),
)
_CLASS_COLUMNS = (
    Column("label", "class", "whole"),
    Column("precision", "precision", "share"),
    Column("recall", "recall", "share"),
    Column("f1", "F1", "share"),
    Column("support", "samples", "whole"),
)


def layers(context: Context) -> Section | None:
    """Returns the dimensions of layers, and models with their sizes as torchinfo tells them."""
    table = context.table("layers")
    model_of = {run.name: _model(run.config["experiment"].get("model") or {}) for run in context.runs.records}
    texts = {model_of[run.name]: run.summary for run in reversed(context.runs.records) if run.summary}
    if table.empty and not texts:
        return None
    sizes = []
    for model, run in {model_of[str(run)]: str(run) for run in reversed(table["run"].unique())}.items():
        rows = table[table["run"] == run]
        largest = rows.loc[rows["parameters"].idxmax()]
        sizes.append(
            {
                "model": model,
                "layers": len(rows),
                "parameters": int(rows["parameters"].sum()),
                "largest": str(largest["layer"]),
                "largest_parameters": int(largest["parameters"]),
            }
        )
    drawing = figures.dimension_figure(figures.dimension_boxes(table, model_of))
    panel = Panel(
        "layer-dimensions", "Dimensions of layers", drawing, "Whiskers reach the smallest and the largest."
    )
    note = (
        "A layer's weight as a matrix: inputs per group times kernel size, with a bias one more, and "
        "outputs, as in "
        "figure 2 of HyLo."
    )
    grids = (Grid("model-sizes", "", _SIZE_COLUMNS, tuple(sizes)),) if sizes else ()
    panels = () if panel.is_empty else (panel,)
    return Section("layers", "Models", (), grids, panels, note if panels else "", tuple(texts.items()))


def _model(config: dict[str, object]) -> str:
    more = [
        f"{key.removeprefix('args.')} {value}"
        for key, value in flatten(config)
        if key != "name" and value not in (None, {}, False)
    ]
    return ", ".join([str(config.get("name")), *more])


def classification(context: Context) -> Section | None:
    """Returns the confusion matrix and per-class numbers of each group, at the end of training."""
    table = context.table("confusion")
    if table.empty:
        return None
    grids, panels = [], []
    found = [group for group in context.groups if table["run"].isin(group.runs).any()]
    for place, group in enumerate(found[:SHOWN]):
        own = table[table["run"].isin(group.runs)]
        for split, rows in own.groupby("split", sort=False):
            matrix = figures.confusion_matrix(rows)
            title = f"{group.name}, {split}"
            grid = grid_rows(figures.class_report(matrix))
            grids.append(Grid(f"classes-{place}-{split}", title, _CLASS_COLUMNS, grid))
            panels.append(
                Panel(f"confusion-{place}-{split}", title, figures.confusion_figure(matrix), height_rem=26)
            )
    left = len(found) - SHOWN
    note = (
        "At the end of training, summed over the runs of a setting. Colors are shares of the true class. – "
        "means that the "
        "class was never predicted or has no samples."
        + (f" {left} more settings are not shown." if left > 0 else "")
    )
    return Section("classification", "Classification", (), tuple(grids), tuple(panels), note)


def landscape(context: Context) -> Section | None:
    """Returns the loss on planes in the space of the weights, with the runs' trajectories."""
    table, paths = context.table("landscape"), context.table("landscape_path")
    if table.empty:
        return None
    panels, words = [], []
    for place, ((plane, split), rows) in enumerate(table.groupby(["plane", "split"], sort=False)):
        own = paths[(paths["plane"] == plane) & (paths["split"] == split)]
        contour, surface = figures.contour_figure(rows, own), figures.surface_figure(rows, own)
        panels += [
            Panel(f"landscape-contour-{place}", f"Loss on the plane, {split} data", contour, height_rem=28),
            Panel(
                f"landscape-surface-{place}",
                f"Loss as a surface, {split} data",
                surface,
                "Drag to turn it.",
                28,
            ),
        ]
        words.append(_plane_words(rows, len(own["run"].unique())))
    note = (
        "Trajectories are drawn at the loss of the checkpoints themselves, which lie beside the plane, so "
        "they may float "
        "above or below the surface."
    )
    return Section("landscape", "Loss landscape", tuple(words), (), tuple(panels), note)


def _plane_words(rows: pd.DataFrame, runs: int) -> str:
    first = rows.iloc[0]
    way = (
        f"the first two principal components of the checkpoints, {first['share_a'] + first['share_b']:.1%} "
        "of their variance"
        if first["kind"] == "pca"
        else "two random directions with the scale of each filter (Li et al., 2018)"
    )
    count = f"{runs} run{'s' if runs != 1 else ''}"
    return f"Plane through {way}; {count}; statistics of batch norm: {first['buffers']}."
