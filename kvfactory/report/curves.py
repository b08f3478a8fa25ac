"""Curves: score against budget, score against memory, latency against the prompt's length.

    rows = load_rows("results/needle")
    save_figure(budget_curves(rows, "needle"), folder, "budget_needle")
    save_figure(trade_off(rows, "needle"), folder, "memory_needle")
    save_figure(latency_curves(load_rows("results/latency")), folder, "latency")

Several groups (datasets, lengths) are averaged, each counting the same; a configuration that lacks one is left out, and the
title says so. Benchmarks that have no scores are drawn by their perplexity, where less is better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from kvfactory.errors import require
from kvfactory.folder_format import FULL, budget_name, budget_number
from kvfactory.report.figures import BLACK, Style, ink, label_points, legend_below, new_figure, plain, styles
from kvfactory.report.intervals import baseline
from kvfactory.report.tables import overall, summarise

WHOLE = Style(BLACK, "*", "--")
"""Of the configuration that others are compared with."""
GREY = "#404040"
MARKS: dict[str, dict[str, Any]] = {
    "front: nothing else is as small and as good": {"color": "grey"},
    "hollow: masked and still held": Style(GREY, "o", "none").points(hollow=True),
    "crossed: never evicted": {"color": GREY, "marker": "x", "linestyle": "none"},
    "crossed, on top: out of memory": {"color": GREY, "marker": "x", "linestyle": "none"},
}
"""What a legend explains that belongs to no method."""
FRONT, HOLLOW, CROSSED, OUT_OF_MEMORY = MARKS
LABELS = {"score": "Mean score (0 to 100)", "perplexity": "Perplexity (lower is better)"}
LARGE_SPAN = 20
"""Perplexities that lie further apart than by this factor are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Measured:
    """What the rows of a benchmark come to."""

    name: str
    """A key of `LABELS`."""
    lines: pd.DataFrame
    """A line of `summarise` or `overall` for each configuration, with `value`, `low` and `high` of what is drawn.

    `untouched` says that it has a budget which was never reached, so that nothing became smaller.
    """
    groups: str
    """What is averaged, in words."""
    looks: dict[str, Style]
    """A style for each method."""

    def title(self, benchmark: str, against: str, interval: str) -> str:
        """Two lines; `interval` says how intervals are drawn."""
        known = f"; {interval}: 95 % bootstrap interval" if self.lines["low"].notna().any() else ""
        return f"{benchmark}: {self.name} by {against}\n{self.groups}{known}"


def budget_curves(rows: Sequence[Mapping[str, Any]], benchmark: str) -> Figure:
    """Mean score of a benchmark against budget, a line a method, with 95 % intervals where rows have them.

    Budgets in entries and shares of the prompt have a panel each; what has no budget is a dashed line across. Raises
    UserError where nothing has a score, or nothing has a budget.
    """
    measured = _measured(rows, benchmark)
    across = measured.lines[measured.lines["budget"] == FULL]
    asked = measured.lines.drop(across.index)
    asked = asked.assign(x=[budget_number(budget)[1] for budget in asked["budget"]])
    asked = asked[np.isfinite(asked["x"])]  # one that nobody told has no place on an axis
    shares = np.array([budget_number(budget)[0] for budget in asked["budget"]], bool)
    panels = {"Budget (entries per head and layer)": asked[~shares], "Budget (% of the prompt)": asked[shares]}
    panels = {label: part for label, part in panels.items() if len(part)}
    require(bool(panels), f"{benchmark}: no configuration has a budget, so there is nothing to draw against it")
    figure = new_figure(8.0 if len(panels) == 1 else 10.5, 5.0)
    side_by_side = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, part) in zip(side_by_side, panels.items(), strict=True):
        faint = 0.2 / (1 + part["method"].nunique() / 3)
        for method, points in part.sort_values("x").groupby("method", sort=False):
            _draw_line(axes, points, measured.looks[str(method)], faint)
        for line in across.to_dict("records"):
            _draw_across(axes, line, measured.looks[line["method"]])
        _cross(axes, part[part["untouched"]], measured.looks)
        _ticks_at(axes, part["x"])
        axes.grid(alpha=0.3)
        axes.set_xlabel(label)
    _value_axis(side_by_side[0], measured)
    entries = {
        f"{method} (no budget)" if dashed else method: look.line() | ({"linestyle": "--"} if dashed else {})
        for method, look in measured.looks.items()
        for dashed in [method in set(across["method"])]
    }
    _legend(figure, entries, [CROSSED] if asked["untouched"].any() else [])
    figure.suptitle(measured.title(benchmark, "budget", "shaded"), fontsize=11)
    return plain(figure)


def trade_off(rows: Sequence[Mapping[str, Any]], benchmark: str) -> Figure:
    """Mean score of a benchmark against true bytes of the cache after the prompt, as a share of the full cache's.

    A point a configuration; those that nothing else beats in both are joined and named. Raises UserError where nothing has
    a score, or no row says what its cache took.
    """
    measured = _measured(rows, benchmark)
    lines = measured.lines[measured.lines["ratio"] > 0]
    lines = lines.assign(x=100 * lines["ratio"])
    require(len(lines) > 0, f"{benchmark}: no row has a ratio of its cache to the full one, so memory cannot be drawn")
    figure = new_figure(8.0, 5.5)
    axes = figure.add_subplot()
    for line in lines.to_dict("records"):
        look, nominal = measured.looks[line["method"]], line["memory"] == "nominal"
        axes.vlines(line["x"], line["low"], line["high"], color=look.colour, alpha=0.3, linewidth=1)
        name = _name(line["method"], line["budget"])
        axes.plot(line["x"], line["value"], label=name, markersize=8, zorder=3, **look.points(hollow=nominal))
    _cross(axes, lines[lines["untouched"]], measured.looks)
    axes.set_xscale("log")
    _round_ticks(axes.xaxis, "{:g}%")
    axes.grid(alpha=0.3)
    axes.set_xlabel("Cache after the prompt (bytes, share of the full cache)")
    _value_axis(axes, measured)
    front = _front(lines[~lines["untouched"]], measured.name == "perplexity")
    steps = _steps(front, right=axes.get_xlim()[1])
    axes.plot(*steps.T, zorder=1, label="front", linewidth=1.2, scalex=False, **MARKS[FRONT])
    shown = {FRONT: True, HOLLOW: (lines["memory"] == "nominal").any(), CROSSED: lines["untouched"].any()}
    methods = [method for method in measured.looks if method in set(lines["method"])]
    entries = {method: measured.looks[method].points() for method in methods}
    _legend(figure, entries, [mark for mark, there in shown.items() if there])
    figure.suptitle(measured.title(benchmark, "memory", "bars"), fontsize=11)
    names = [_name(*each) for each in zip(front["method"], front["budget"], strict=True)]
    label_points(axes, front[["x", "value"]].to_numpy(float), names, lines[["x", "value"]].to_numpy(float), steps)
    return figure


def latency_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Time to the first token and time per token against the prompt's length, a line a configuration.

    A pair of panels for each batch size; where memory did not suffice there is a crossed mark on top. Raises UserError where
    no row has such times.
    """
    timed = [row for row in rows if "length" in row and ("ttft_seconds" in row or row.get("oom"))]
    require(bool(timed), "no row has times by prompt length: latency curves need rows of a latency run")
    times = {
        "ttft_seconds": "Time to the first token (seconds)",
        "tpot_seconds": "Time per further token (seconds)",
    }
    frame = pd.DataFrame(
        {
            "method": [_name(row["method"], budget_name(row)) for row in timed],
            "batch": [int(row.get("batch_size", 1)) for row in timed],
            "length": [int(row["length"]) for row in timed],
            "oom": [bool(row.get("oom")) for row in timed],
            **{time: pd.Series([row.get(time) for row in timed], dtype=float) for time in times},
        }
    )
    looks = _looks(frame["method"], {_name(*each) for each in baseline(timed).values()})
    batches = sorted(frame["batch"].unique())
    figure = new_figure(10.0, 0.5 + 3.6 * len(batches))
    for panels, batch in zip(figure.subplots(len(batches), 2, squeeze=False), batches, strict=True):
        part = frame[frame["batch"] == batch]
        for axes, (time, label) in zip(panels, times.items(), strict=True):
            for name, points in part.groupby("method", sort=False):
                means = points.groupby("length")[time].mean().dropna()
                axes.plot(means.index, means, label=name, markersize=5, **looks[str(name)].line())
            axes.set_yscale("log")
            _draw_out_of_memory(axes, part[part["oom"]], looks)
            _round_ticks(axes.yaxis, "{:g}")
            _ticks_at(axes, part["length"])
            axes.grid(alpha=0.3)
            axes.set(xlabel="Prompt (tokens)", ylabel=label)
            axes.set_title("one sequence" if batch == 1 else f"batch of {batch}", fontsize=10)
    entries = {name: look.line() for name, look in looks.items()}
    _legend(figure, entries, [OUT_OF_MEMORY] if frame["oom"].any() else [])
    figure.suptitle("Latency by prompt length", fontsize=11)
    return plain(figure)


def _measured(rows: Sequence[Mapping[str, Any]], benchmark: str) -> Measured:
    mine = [row for row in rows if row["benchmark"] == benchmark]
    frame = summarise(mine)
    if frame["group"].nunique() > 1:
        frame = overall(mine)
    name = next((name for name in LABELS if name in frame and frame[name].notna().any()), None)
    require(name is not None, f"{benchmark}: no row has a score or a perplexity, so there is nothing to draw")
    unknown = pd.Series(np.nan, frame.index)
    frame = frame.assign(
        value=frame[name],
        low=frame.get(f"{name}_low", unknown),
        high=frame.get(f"{name}_high", unknown),
        untouched=(frame["compressed_share"] == 0) & (frame["ratio"] >= 1) & (frame["budget"] != FULL),
    )
    lines = frame[frame["value"].notna()]
    left_out = len(frame) - len(lines)
    groups = str(lines["group"].iloc[0]) + (f"; left out, since they lack some: {left_out}" if left_out else "")
    compared = baseline(mine).get(benchmark, ("", FULL))[0]
    return Measured(str(name), lines, groups, _looks(lines["method"], {compared}))


def _looks(names: Iterable[str], compared: set[str]) -> dict[str, Style]:
    """A style for each name; what others are compared with is black and comes first."""
    distinct = list(dict.fromkeys(names))
    return dict.fromkeys([name for name in distinct if name in compared], WHOLE) | styles(
        name for name in distinct if name not in compared
    )


def _name(method: str, budget: int | str) -> str:
    return method if budget == FULL else f"{method}, {budget}"


def _front(lines: pd.DataFrame, less_is_better: bool) -> pd.DataFrame:
    """The lines that no other beats: none is as small and better, or smaller and as good. By size, ascending."""
    worth = -lines["value"] if less_is_better else lines["value"]
    ordered = lines.assign(worth=worth).sort_values(["ratio", "worth"], ascending=[True, False], kind="stable")
    best, kept = (-np.inf, -np.inf), []
    for ratio, value in zip(ordered["ratio"], ordered["worth"], strict=True):
        kept.append(value > best[1] or (ratio, value) == best)
        if kept[-1]:
            best = (ratio, value)
    return ordered[np.array(kept, bool)]


def _steps(front: pd.DataFrame, right: float) -> np.ndarray:
    """The corners of the line below which nothing is, [corners, 2]: level from each point to the next, then up or down."""
    points = list(zip(front["x"], front["value"], strict=True))
    until = [*(x for x, _ in points[1:]), right]
    corners = [corner for (x, y), end in zip(points, until, strict=False) for corner in ((x, y), (end, y))]
    return np.array(corners, float).reshape(-1, 2)


def _draw_line(axes: Axes, line: pd.DataFrame, look: Style, faint: float) -> None:
    """One method: points, the line through them and its band; a lone point has a bar."""
    axes.plot(line["x"], line["value"], label=line["method"].iloc[0], markersize=6, **look.line())
    if len(line) > 1:
        axes.fill_between(line["x"], line["low"], line["high"], color=look.colour, alpha=faint, linewidth=0)
    else:
        axes.vlines(line["x"], line["low"], line["high"], color=look.colour, alpha=0.6, linewidth=1.5)


def _draw_across(axes: Axes, line: Mapping[Any, Any], look: Style) -> None:
    """What has no budget: a dashed line from side to side, its marker at the right end."""
    axes.axhline(line["value"], label=line["method"], color=look.colour, linestyle="--", linewidth=1.5, zorder=1.5)
    axes.plot(0.985, line["value"], markersize=6, transform=axes.get_yaxis_transform(), **look.points())
    axes.axhspan(line["low"], line["high"], color=look.colour, alpha=0.08, linewidth=0, zorder=0.5)


def _cross(axes: Axes, lines: pd.DataFrame, looks: Mapping[str, Style]) -> None:
    """Crosses on points that were never evicted."""
    for line in lines.to_dict("records"):
        colour = ink(looks[line["method"]].colour)
        axes.plot(line["x"], line["value"], color=colour, marker="x", markersize=5, linestyle="none", zorder=4)


def _draw_out_of_memory(axes: Axes, missing: pd.DataFrame, looks: Mapping[str, Style]) -> None:
    """Crossed marks above all that is drawn, a row a configuration."""
    names = list(dict.fromkeys(missing["method"]))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** (0.06 * len(names)))
    height = 0.06 / (1 + 0.06 * len(names))
    for length, name in zip(missing["length"], missing["method"], strict=True):
        place = length, 1 - height * (names.index(name) + 0.5)
        axes.plot(*place, transform=axes.get_xaxis_transform(), markersize=5, **looks[name].points())
        axes.plot(*place, transform=axes.get_xaxis_transform(), markersize=9, marker="x", color=GREY)


def _legend(figure: Figure, entries: Mapping[str, Mapping[str, Any]], marks: Sequence[str]) -> None:
    looks = [*entries.values(), *(MARKS[mark] for mark in marks)]
    legend_below(figure, [Line2D([], [], **look) for look in looks], [*entries, *marks])


def _value_axis(axes: Axes, measured: Measured) -> None:
    values = measured.lines["value"]
    if measured.name == "perplexity" and values.max() > LARGE_SPAN * values.min() > 0:
        axes.set_yscale("log")
        _round_ticks(axes.yaxis, "{:g}")
    axes.set_ylabel(LABELS[measured.name])


def _ticks_at(axes: Axes, places: Iterable[float]) -> None:
    """A logarithmic x axis with its ticks at these places, as many as have room."""
    found = sorted({*places})
    low, high = (found[0] / 2, found[0] * 2) if len(found) == 1 else (found[0], found[-1])
    edge = (high / low) ** 0.06
    axes.set_xscale("log")
    axes.set_xlim(low / edge, high * edge)
    inches = axes.get_window_extent().width / axes.figure.dpi
    shown: dict[float, str] = {}
    free = -np.inf
    for place in found:
        text = f"{place:.10g}"
        centre, half = inches * np.log(place / low) / np.log(high / low), 0.045 * len(text)
        if centre - half > free:
            shown[place] = text
            free = centre + half + 0.08
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(shown), list(shown.values()))


def _round_ticks(axis: Axis, form: str) -> None:
    """Round numbers for the ticks of a logarithmic axis, as many as its range has use for."""
    low, high = axis.get_view_interval()
    steps: Locator = MaxNLocator(6) if high < 4 * low else LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,))
    axis.set_major_locator(steps)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))
