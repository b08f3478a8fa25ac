"""Tables as the terminal shows them.

print_table(rows, Console())
console.print(plain_table("title", frame))
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from kvfactory.folder_format import FULL
from kvfactory.report.intervals import Configuration, average_name, baseline, distinguishable
from kvfactory.report.tables import MEASURES, SECONDS, beyond_ability, overall, scores_of, summarise

TABLE_WIDTH = 108  # columns that a table with short names fits
FILE_WIDTH = 140  # columns that one fits whose methods have settings in their names
MOST_LINES = 60  # what a terminal can show; a longer table is for results.csv


def wide_console() -> Console:
    """A console in which tables have the room they need, where it is no terminal that says how wide it is."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)
    return console


def plain_table(title: str, frame: pd.DataFrame) -> Table:
    """A frame as it is: texts to the left, numbers to the right with two decimals."""
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in frame:
        texts = frame[name].map(lambda value: isinstance(value, str)).all() and name != "budget"
        table.add_column(str(name), justify="left" if texts else "right", overflow="fold")
    for line in frame.to_dict("records"):
        table.add_row(
            *(Text(_number(each, "{:.2f}") if isinstance(each, float) else str(each)) for each in line.values())
        )
    return table


def print_table(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Show rows: a table for each group unless there are many, and their average.

    Columns that no line has anything to say in are left out, and seconds where the console is too narrow for them.
    """
    frame, averages, references = summarise(rows), overall(rows), baseline(rows)
    if frame.empty:
        console.print("no rows yet")
    for benchmark, part in frame.groupby("benchmark", sort=False):
        groups, beyond = part["group"].nunique(), beyond_ability(part)
        show = partial(_table, reference=references.get(str(benchmark)), narrow=console.width < TABLE_WIDTH)
        if len(part) <= MOST_LINES or groups == 1:
            for group, lines in part.groupby("group", sort=False):
                notes = [f"beyond this model, differences are noise: {beyond[str(group)]}"] if group in beyond else []
                console.print(show(f"{benchmark}: {group}", lines, notes), "")
        if groups > 1 and "score" in part:
            notes = [f"{len(beyond)} of them beyond this model: {'; '.join(beyond)}"] if beyond else []
            average = averages[averages["benchmark"] == benchmark]
            console.print(show(f"{benchmark}: {average_name(groups)}", average, notes), "")


def _table(
    title: str, frame: pd.DataFrame, notes: Sequence[str], *, reference: Configuration | None, narrow: bool
) -> Table:
    figures = {name: (name, "{:.2f}", 1) for name in scores_of(frame)}
    figures |= {name: each for name, each in MEASURES.items() if name in frame}
    others = frame[[line != reference for line in zip(frame["method"], frame["budget"], strict=True)]]
    compared = next((name for name in ("score", "perplexity") if _known(others, f"{name}_difference")), None)
    bounded = [name for name in figures if name != "nll" and _known(frame, f"{name}_low")]
    table = Table(title=Text(title), title_justify="left", caption_justify="left", box=None, padding=(0, 1, 0, 0))
    if compared and reference:
        notes = [*notes, f"diff.: to {reference[0]} on the same examples; ~ may be 0, which its 95 % interval contains"]
    if (frame["memory"] == "nominal").any():
        notes = [*notes, "* nominal: evicted entries are only masked, the memory is not freed"]
    table.caption = Text("\n".join(notes)) if notes else None
    tokens = {"kept_tokens_mean": "kept\ntokens"}
    if (frame["read_tokens_mean"] < frame["kept_tokens_mean"]).any():
        tokens["read_tokens_mean"] = "read\ntokens"
    seconds = {} if narrow else dict(zip(SECONDS, ("prefill\ns", "compr.\ns", "decode\ns"), strict=True))
    if "ttft_seconds" in figures:  # which, with the seconds per token, says what these say
        seconds.pop("prefill_seconds", None)
        seconds.pop("decode_seconds", None)
    headings = ["method", "budget", "n"]
    for name, (heading, _, _) in figures.items():
        headings += [
            heading,
            *(["95 %\ninterval"] if name in bounded else []),
            *(["diff."] if name == compared else []),
        ]
    headings += [*tokens.values(), "evicted", "cache\nMiB", "of\nfull", *seconds.values()]
    lines = []
    for line in frame.to_dict("records"):
        cells = [line["method"], str(line["budget"]), str(line["examples"])]
        for name, (_, form, unit) in figures.items():
            cells += [_number(line[name] / unit, form)]
            cells += [_interval(line, name)] if name in bounded else []
            cells += [_difference(line, name, reference)] if name == compared else []
        cells += [
            *(_number(line[name], "{:.1f}") for name in tokens),
            _evicted(line),
            _cache(line),
            _ratio(line),
            *(_number(line[name], "{:.2f}") for name in seconds),
        ]
        lines.append(["oom" if cell == "-" and line.get("oom") else cell for cell in cells])
    told = [place for place in range(len(headings)) if place < 3 or any(cells[place] != "-" for cells in lines)]
    for heading in (headings[place] for place in told):
        justify: JustifyMethod = "left" if heading == "method" else "right"
        table.add_column(heading if "\n" in heading else f"\n{heading}", justify=justify, overflow="fold")
    for cells in lines:
        table.add_row(*(Text(cells[place]) for place in told))
    return table


def _known(frame: pd.DataFrame, name: str) -> bool:
    return name in frame and bool(frame[name].notna().any())


def _interval(line: Mapping[Hashable, Any], name: str) -> str:
    low, high = line[f"{name}_low"], line[f"{name}_high"]
    return "-" if pd.isna(low) else f"{low:.1f}-{high:.1f}"


def _difference(line: Mapping[Hashable, Any], name: str, reference: Configuration | None) -> str:
    difference = line[f"{name}_difference"]
    if pd.isna(difference) or (line["method"], line["budget"]) == reference:
        return "-"
    sure = distinguishable(line[f"{name}_difference_low"], line[f"{name}_difference_high"])
    return f"{difference:+.2f}" + (" " if sure else "~")


def _evicted(line: Mapping[Hashable, Any]) -> str:
    share = line["compressed_share"]
    if pd.isna(share) or (line["budget"] == FULL and share == 0):
        return "-"
    return {0: "never", 1: "always"}.get(share, f"{share:.0%}")


def _cache(line: Mapping[Hashable, Any]) -> str:
    if pd.isna(line["cache_bytes"]):
        return "-"
    return f"{line['cache_bytes'] / 2**20:,.1f}" + ("*" if line["memory"] == "nominal" else "")


def _ratio(line: Mapping[Hashable, Any]) -> str:
    """Share of the full cache; none where a budget was never reached, unless the bytes shrank in another way."""
    if line["budget"] != FULL and line["compressed_share"] == 0 and line["ratio"] >= 1:
        return "-"
    return _number(line["ratio"], "{:.1%}")


def _number(value: float, form: str) -> str:
    return "-" if pd.isna(value) else form.format(value)
