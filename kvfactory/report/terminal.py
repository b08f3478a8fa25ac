"""Tables as the terminal shows them.

print_table(rows, Console())
console.print(plain_table("title", frame))
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
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
            *(Text(_formatted(each, "{:.2f}") if isinstance(each, float) else str(each)) for each in line.values())
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
        show = partial(_print_lines, console, references.get(str(benchmark)))
        if len(part) <= MOST_LINES or groups == 1:
            for group, lines in part.groupby("group", sort=False):
                notes = [f"beyond this model, differences are noise: {beyond[str(group)]}"] if group in beyond else []
                show(f"{benchmark}: {group}", lines, notes)
        if groups > 1 and "score" in part:
            notes = [f"{len(beyond)} of them beyond this model: {'; '.join(beyond)}"] if beyond else []
            average = averages[averages["benchmark"] == benchmark]
            show(f"{benchmark}: {average_name(groups)}", average, notes)


Line = Mapping[Hashable, Any]
"""A line of a frame of `summarise`."""
Column = tuple[str, Callable[[Line], str]]
"""A heading, and what stands below it in a line."""


def _print_lines(
    console: Console, reference: Configuration | None, title: str, frame: pd.DataFrame, notes: Sequence[str]
) -> None:
    """One table. Its title and its notes are no parts of it, since a narrow table would fold them."""
    columns = [*_figures(frame, reference), *_sizes(frame), *_seconds(frame, console.width < TABLE_WIDTH)]
    lines = frame.to_dict("records")
    cells = {heading: [_or_oom(cell(line), line) for line in lines] for heading, cell in columns}
    told = {heading: texts for heading, texts in cells.items() if set(texts) != {"-"}}
    about = {"method": frame["method"], "budget": frame["budget"].map(str), "n": frame["examples"].map(str)}
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in (*about, *told):
        justify: JustifyMethod = "left" if heading == "method" else "right"
        table.add_column(heading if "\n" in heading else f"\n{heading}", justify=justify, overflow="fold")
    for texts in zip(*about.values(), *told.values(), strict=True):
        table.add_row(*map(Text, texts))
    if "diff." in told and reference:
        notes = [*notes, f"diff.: to {reference[0]} on the same examples; ~ where its 95 % interval contains 0"]
    if (frame["memory"] == "nominal").any():
        notes = [*notes, "* nominal: evicted entries are only masked, the memory is not freed"]
    console.print(Text(title, style="italic"), table, *(Text(note, style="dim") for note in notes), "", sep="\n")


def _figures(frame: pd.DataFrame, reference: Configuration | None) -> Iterator[Column]:
    """Scores and measures, with intervals where they are known, and the difference of the one that matters."""
    forms = {name: (name, "{:.2f}", 1) for name in scores_of(frame)}
    forms |= {name: each for name, each in MEASURES.items() if name in frame}
    compared = next((name for name in ("score", "perplexity") if name in forms), None)
    for name, (heading, form, unit) in forms.items():
        yield heading, partial(_number, name, form, unit=unit)
        if name != "nll" and f"{name}_low" in frame:
            interval = "95 %\ninterval" if name == compared else f"{name}\n95 %"
            yield interval, partial(_interval, name)
        if name == compared:
            yield "diff.", partial(_difference, name, reference)


def _sizes(frame: pd.DataFrame) -> Iterator[Column]:
    yield "kept\ntokens", partial(_number, "kept_tokens_mean", "{:.1f}")
    if (frame["read_tokens_mean"] < frame["kept_tokens_mean"]).any():
        yield "read\ntokens", partial(_number, "read_tokens_mean", "{:.1f}")
    yield "evicted", _evicted
    yield "cache\nMiB", _cache
    yield "of\nfull", _ratio


def _seconds(frame: pd.DataFrame, narrow: bool) -> Iterator[Column]:
    """None where the console is narrow; time to first token and per token say what prefill and decode say."""
    shown = ["compress_seconds"] if "ttft_seconds" in frame else SECONDS
    for name in () if narrow else shown:
        heading = {"compress_seconds": "compr.\ns"}.get(name, name.replace("_seconds", "\ns"))
        yield heading, partial(_number, name, "{:.2f}")


def _or_oom(cell: str, line: Line) -> str:
    return "oom" if cell == "-" and line.get("oom") else cell


def _interval(name: str, line: Line) -> str:
    low, high = line[f"{name}_low"], line[f"{name}_high"]
    return "-" if pd.isna(low) else f"{low:.1f}-{high:.1f}"


def _difference(name: str, reference: Configuration | None, line: Line) -> str:
    difference = line[f"{name}_difference"]
    if pd.isna(difference) or (line["method"], line["budget"]) == reference:
        return "-"
    sure = distinguishable(line[f"{name}_difference_low"], line[f"{name}_difference_high"])
    return f"{difference:+.2f}" + (" " if sure else "~")


def _evicted(line: Line) -> str:
    share = line["compressed_share"]
    if pd.isna(share) or (line["budget"] == FULL and share == 0):
        return "-"
    return {0: "never", 1: "always"}.get(share, f"{share:.0%}")


def _cache(line: Line) -> str:
    if pd.isna(line["cache_bytes"]):
        return "-"
    return f"{line['cache_bytes'] / 2**20:,.1f}" + ("*" if line["memory"] == "nominal" else "")


def _ratio(line: Line) -> str:
    """Share of the full cache; none where a budget was never reached, unless the bytes shrank in another way."""
    if line["budget"] != FULL and line["compressed_share"] == 0 and line["ratio"] >= 1:
        return "-"
    return _number("ratio", "{:.1%}", line)


def _number(name: str, form: str, line: Line, unit: float = 1) -> str:
    return _formatted(line[name] / unit, form)


def _formatted(value: float, form: str) -> str:
    return "-" if pd.isna(value) else form.format(value)
