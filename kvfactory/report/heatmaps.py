"""Needle heatmaps: where in the context, and at which length, a method still finds the needle.

    save_heatmaps(rows, folder)     # folder/plots/needle_all.png, and one figure per method and budget beside it

A figure has depth downwards (0 on top), context length to the right and the mean score as colour, 0..1, and is there as PNG
and as SVG. The lengths and depths are those of all rows, so a cell without rows shows as a hatched gap: it is missing, not
zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from kvfactory.errors import UserError, unknown
from kvfactory.folder_format import FULL, budget_name, budget_number
from kvfactory.report.figures import COLOUR_MAP, free_name, ink, new_figure, save_figure, wrapped
from kvfactory.report.tables import score_names

Configuration = tuple[str, int | str]  # method, budget
Inches = tuple[float, float]  # width, height


def save_heatmaps(rows: Sequence[Mapping[str, Any]], folder: str | Path, score: str = "score") -> list[Path]:
    """Draw a figure for each (method, budget) of needle `rows`, and one of them all; return the paths of the files.

    `score` names the field to draw. Raises UserError where the rows are no needle rows or the field is no score 0..1.
    """
    grids = score_grids(rows, score)
    figures = {"needle_all": overview(grids)}
    for (method, budget), grid in grids.items():
        figures[free_name(f"needle_{method}_{budget}", figures)] = heatmap(grid, f"{method}, budget {budget}")
    return [path for name, figure in figures.items() for path in save_figure(figure, Path(folder) / "plots", name)]


def score_grids(rows: Sequence[Mapping[str, Any]], score: str = "score") -> dict[Configuration, pd.DataFrame]:
    """For each configuration the mean score, depths down and lengths across; NaN where it has no rows.

    Every grid has the depths and lengths of all rows, both ascending.
    """
    rows = [row for row in rows if "context_length" in row and "depth_percent" in row]
    if not rows:
        raise UserError("no needle rows: a heatmap needs rows with context_length and depth_percent")
    if not all(isinstance(row.get(score), int | float) for row in rows):
        raise unknown("score", score, score_names(rows))
    frame = pd.DataFrame(
        {
            "method": [row["method"] for row in rows],
            "budget": pd.Series([budget_name(row) for row in rows], dtype=object),
            "length": [int(row["context_length"]) for row in rows],
            "depth": [float(row["depth_percent"]) for row in rows],
            "score": [float(row[score]) for row in rows],
        }
    )
    if not frame["score"].between(0, 1).all():
        raise UserError(f"'{score}' runs from {frame['score'].min():g} to {frame['score'].max():g}; heatmaps show 0..1")
    depths, lengths = sorted(frame["depth"].unique()), sorted(frame["length"].unique())
    return {
        (str(method), budget if isinstance(budget, int) else str(budget)): part.pivot_table(
            "score", "depth", "length"
        ).reindex(index=depths, columns=lengths)
        for (method, budget), part in frame.groupby(["method", "budget"], sort=False)
    }


def heatmap(grid: pd.DataFrame, title: str) -> Figure:
    """One grid of `score_grids` as a figure."""
    size = _panel(grid, cell=(0.7, 0.45), least=(3.5, 2.5), most=(17.5, 7.0))
    figure = new_figure(size[0] + 2.0, size[1] + 1.5)
    axes = figure.add_subplot()
    figure.colorbar(_draw(axes, grid, size, font=9.0), ax=axes, label="Score")
    axes.set_title(_title(title, grid, size, font=10.0), fontsize=10.0, parse_math=False)
    axes.set(xlabel="Token Limit", ylabel="Depth Percent")
    return figure


def overview(grids: Mapping[Configuration, pd.DataFrame]) -> Figure:
    """All grids in one figure, small: a line per method, a column per budget, one colour bar.

    A method without a budget stands in the first column.
    """
    lines = list(dict.fromkeys((method, budget == FULL) for method, budget in grids))
    budgets = sorted({budget for _, budget in grids} - {FULL}, key=budget_number)
    columns = max(1, len(budgets))
    size = _panel(next(iter(grids.values())), cell=(0.42, 0.24), least=(2.4, 1.4), most=(5.0, 3.0))
    figure = new_figure((size[0] + 0.6) * columns + 1.5, (size[1] + 0.8) * len(lines) + 0.6)
    panels = figure.subplots(len(lines), columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for (method, budget), grid in grids.items():
        line, column = lines.index((method, budget == FULL)), 0 if budget == FULL else budgets.index(budget)
        axes = panels[line, column]
        axes.set_axis_on()
        mesh = _draw(axes, grid, size, font=7.0)
        axes.set_title(_title(f"{method}, budget {budget}", grid, size, font=8.0), fontsize=8.0, parse_math=False)
    tall = min(1.0, 4.0 / figure.get_figheight())
    figure.colorbar(mesh, ax=panels, label="Score", shrink=tall, anchor=(0.0, 1.0))
    figure.supxlabel("Token Limit")
    figure.supylabel("Depth Percent")
    return figure


def _draw(axes: Axes, grid: pd.DataFrame, size: Inches, font: float) -> QuadMesh:
    """Fill the axes, about `size` inches large, with a grid; scores are written into cells that have the room."""
    values = grid.to_numpy()
    axes.patch.set(facecolor="white", edgecolor="lightgrey", hatch="////")  # seen through cells that are missing
    masked = np.ma.masked_invalid(values)
    mesh = axes.pcolormesh(masked, cmap=COLOUR_MAP, vmin=0, vmax=1, edgecolors="grey", linewidth=0.5)
    axes.invert_yaxis()
    line = font / 72  # inches
    width, height = size[0] / values.shape[1], size[1] / values.shape[0]
    across = _every(values.shape[1], 2 * line / width)
    down = _every(values.shape[0], 1.5 * line / height)
    axes.set_xticks(across + 0.5, [str(grid.columns[i]) for i in across], fontsize=font, rotation=45)
    axes.set_yticks(down + 0.5, [f"{grid.index[i]:g}" for i in down], fontsize=font)
    if width > 4 * line and height > 1.5 * line:
        for row, column in np.argwhere(~np.isnan(values)):
            text, colour = f"{values[row, column]:.2f}", ink(mesh.to_rgba(values[row, column])[:3])
            note = axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=font, color=colour)
            note.set_in_layout(False)  # it lies inside its cell; measuring hundreds of them is slow
    return mesh


def _panel(grid: pd.DataFrame, cell: Inches, least: Inches, most: Inches) -> Inches:
    """The size of a grid's axes: what its cells ask for, within bounds."""
    depths, lengths = grid.shape
    width, height = np.clip((lengths * cell[0], depths * cell[1]), least, most)
    return float(width), float(height)


def _every(count: int, apart: float) -> np.ndarray:
    """Which of `count` ticks to label so that labels which need `apart` cells each do not touch."""
    return np.arange(0, count, max(1, int(np.ceil(apart))))


def _title(label: str, grid: pd.DataFrame, size: Inches, font: float) -> str:
    """The label, broken to the width of the axes, and below it the mean over the cells that have rows."""
    there = int(grid.notna().to_numpy().sum())
    missing = f" ({there} of {grid.size} cells)" if there < grid.size else ""
    return f"{wrapped(label, int(size[0] * 72 / font * 1.5))}\nmean {np.nanmean(grid.to_numpy()):.2f}{missing}"
