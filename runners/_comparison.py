"""Two runs row by row, as `kvfactory compare` shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvfactory.comparison import (
    Pairs,
    count,
    differing,
    environment_changed,
    figures,
    measured,
    pair,
    settings_changed,
    shortened,
    sizes,
    visible,
)
from kvfactory.errors import UserError
from kvfactory.foreign import read_results
from kvfactory.report.intervals import Statistic
from kvfactory.report.tables import MEASURES
from kvfactory.report.terminal import MOST_LINES, wide_console
from kvfactory.results import Row, Run

FEW = 6
"""Configurations that a line has room for."""
TEXTS = ("name", "in A", "in B", "benchmark", "group", "method", "example", "predictions")
"""Headings of columns that begin at the left."""


def compare(a: Path, b: Path, rows: int, output: Path | None) -> None:
    """What the command does."""
    first, second = read_results(a), read_results(b)
    pairs = pair(first, second)
    if not pairs.both:
        raise UserError(f"{a} and {b} have no row in common: {_why(first, second)}")
    console = wide_console()
    for name, run in (("A", first), ("B", second)):
        console.print(Text(f"{name}  {visible(run.path)}  {len(run.rows)} rows"), soft_wrap=True)
    console.print("")
    for what, changed in (("settings", settings_changed), ("environment", environment_changed)):
        lines = [{"name": name, "in A": old, "in B": new} for name, old, new in changed(first, second)]
        if lines:
            _print_table(f"differences of {what}", lines, console)
        else:
            console.print(f"{what}: the same\n")
    found = differing(pairs.both)
    _print_coverage(pairs, len(found), console)
    if len(found):
        _print_figures(figures(pairs.both), console)
        _print_sizes(sizes(pairs.both), console)
        _print_rows(pairs, found, rows, console)
    if output:
        found.to_csv(output, index=False, errors="backslashreplace")
        console.print(Text(f"rows that differ  {visible(output)}"), soft_wrap=True)


def _why(first: Run, second: Run) -> str:
    """Why no row is in both."""
    has = [_configurations(run.rows) for run in (first, second)]
    if {*has[0]} & {*has[1]}:
        return "they ran other examples"
    return "; ".join(f"{name} has {_listed([*each])}" for name, each in zip("AB", has, strict=True))


def _configurations(rows: Sequence[Row]) -> dict[str, int]:
    """The rows of each."""
    frame = count(rows)
    return {
        f"{line['benchmark']}: {line['method']} {line['budget']}": line["rows"] for line in frame.to_dict("records")
    }


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return visible(", ".join(names[:FEW]) + more)


def _print_coverage(pairs: Pairs, differing: int, console: Console) -> None:
    """How many rows are compared, and which are in one run alone."""
    both = len(pairs.both)
    same = f"the {both} rows that are in both are the same, in scores, predictions, kept tokens and bytes"
    console.print(f"{differing} of the {both} rows that are in both differ" if differing else same, soft_wrap=True)
    for name, rows in zip("AB", pairs.lonely, strict=True):
        listed = [f"{each} ({number} rows)" for each, number in _configurations(rows).items()]
        if listed:
            console.print(Text(f"only in {name}: {len(rows)} rows, {_listed(listed)}"), soft_wrap=True)
    console.print("")


def _print_figures(frame: pd.DataFrame, console: Console) -> None:
    """For each measure the averages of configurations, and their groups unless there are many."""
    for (benchmark, measure), part in frame.groupby(["benchmark", "measure"], sort=False):
        averages = part.drop_duplicates(["method", "budget"])  # the average comes first where there is one
        groups = part.drop(averages.index)
        _print_table(f"{benchmark}: {measure}", [_figures(line) for line in averages.to_dict("records")], console)
        if 0 < len(groups) <= MOST_LINES:
            lines = [_figures(line) for line in groups.to_dict("records")]
            _print_table(f"{benchmark}: {measure} by group", lines, console)


def _figures(line: Mapping[Any, Any]) -> dict[str, str]:
    _, form, unit = MEASURES.get(line["measure"], ("", "{:.2f}", 1))
    signed = form.replace("{:", "{:+")
    a, b, difference, low, high = (line[name] / unit for name in ("a", "b", "difference", "low", "high"))
    return {
        "group": line["group"],
        "method": line["method"],
        "budget": str(line["budget"]),
        "n": str(line["rows"]),
        "A": form.format(a),
        "B": form.format(b),
        "B - A": signed.format(difference),
        "95 %\ninterval": "-" if pd.isna(low) else f"{signed.format(low)} to {signed.format(high)}",
        **{name: str(line[name]) for name in ("better", "worse", "equal")},
        "other\nprediction": "" if pd.isna(line["changed"]) else f"{line['changed']:.0f}",
    }


def _print_sizes(frame: pd.DataFrame, console: Console) -> None:
    """What is kept, of configurations where it is not the same."""
    changed = frame[frame["differing"] > 0]
    if len(frame) > len(changed) == 0:
        console.print("kept tokens and bytes: the same in all rows that have both\n", soft_wrap=True)
    lines = [
        {
            **{name: str(line[name]) for name in ("benchmark", "method", "budget")},
            "rows that\ndiffer": f"{line['differing']} of {line['rows']}",
            **{f"kept\n{side.upper()}": f"{line[f'kept_tokens_mean_{side}']:,.1f}" for side in "ab"},
            **{f"MiB\n{side.upper()}": f"{line[f'cache_bytes_{side}'] / 2**20:,.2f}" for side in "ab"},
        }
        for line in changed.to_dict("records")
    ]
    _print_table("what is kept of prompts", lines, console)


def _print_rows(pairs: Pairs, frame: pd.DataFrame, rows: int, console: Console) -> None:
    """The rows that differ most, with the first measure of their benchmark."""
    for benchmark, part in frame.head(rows).groupby("benchmark", sort=False):
        measures = measured([each for each in pairs.both if each[0]["benchmark"] == benchmark])[:1]
        lines = [
            {
                "example": line["example_id"],
                "method": line["method"],
                "budget": str(line["budget"]),
                **{f"{each.name}\n{side.upper()}": _number(line, each, side) for each in measures for side in "ab"},
                "predictions": _predictions(line),
            }
            for line in part.to_dict("records")
        ]
        _print_table(f"{benchmark}: rows that differ most", lines, console)
    if more := max(0, len(frame) - rows):
        console.print(f"{more} more rows differ; --rows shows more of them, --output has all\n", soft_wrap=True)


def _number(line: Mapping[Any, Any], measure: Statistic, side: str) -> str:
    value = line[f"{measure.field}_{side}"]
    return "-" if pd.isna(value) else f"{float(measure.shape(value)):,.4g}"


def _predictions(line: Mapping[Any, Any]) -> str:
    """Both of them one above the other, or what both are."""
    texts = [line.get(f"prediction_{side}") or "" for side in "ab"]
    first, second = shortened(texts)
    return first if texts[0] == texts[1] else f"A {first}\nB {second}"


def _print_table(title: str, lines: Sequence[Mapping[str, str]], console: Console) -> None:
    """Lines of equal headings; no markup, nothing that a terminal would obey, and no column or table without a text."""
    headings = [heading for heading in lines[0] if any(line[heading] for line in lines)] if lines else []
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="left" if heading in TEXTS else "right", overflow="fold")
    for line in lines:
        table.add_row(*(Text("\n".join(map(visible, line[heading].split("\n")))) for heading in headings))
    if lines:
        console.print(Text(visible(title)), table, "", sep="\n")
