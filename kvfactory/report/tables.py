"""Rows to tables: the frame behind `results.csv`, the wide form LongBench users know, and what the terminal shows.

    frame = summarise(rows)              # one line per benchmark, group, method and budget
    print_table(frame, Console())
    wide(rows).to_csv(...)               # one line per method and budget, a column per group

A line is made of the rows that carry its method and budget and of nothing else; the order of rows only decides the
order of lines. Scores are 0..100, rounded as LongBench rounds them. A method without a budget has the budget "full".
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

FULL = "full"
KEYS = ["benchmark", "group", "method", "budget"]
SECONDS = ["prefill_seconds", "compress_seconds", "decode_seconds"]
COSTS = ["kept_tokens_mean", "read_tokens_mean", "cache_bytes", "ratio", "compressed_share", *SECONDS]
NOT_SCORES = {*COSTS, "depth_percent"}

TABLE_WIDTH = 100  # columns that a table with short names fits
MOST_LINES = 60  # what a terminal can show; a longer table is for results.csv


def summarise(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per (benchmark, group, method, budget), each in first-seen order: examples, mean scores and mean costs.

    `compressed_share` (0..1) says in how many of the examples anything was evicted.
    """
    scores = score_names(rows)
    cells = [{**row, "budget": budget_name(row["budget"]), "compressed_share": row.get("evicted")} for row in rows]
    frame = pd.DataFrame(cells, columns=[*KEYS, "memory", *scores, *COSTS])
    frame = frame.astype({"budget": object} | dict.fromkeys([*scores, *COSTS], float))
    groups = _first_seen(frame, KEYS).groupby(KEYS, sort=False)
    parts: dict[str, pd.Series] = {
        "examples": groups.size(),
        **{name: groups[name].agg(percent) for name in scores},
        **{name: groups[name].mean() for name in COSTS},
        "memory": groups["memory"].agg(lambda kinds: "nominal" if "nominal" in set(kinds) else "physical"),
    }
    return pd.DataFrame(parts).reset_index()


def overall(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame of `summarise` averaged over the groups of each benchmark, every group counting the same.

    A configuration that still lacks a group gets no numbers: an average over fewer groups compares with nothing.
    """
    parts = []
    for _, part in frame.groupby("benchmark", sort=False):
        count = part["group"].nunique()
        lines = part.groupby(["benchmark", "method", "budget"], sort=False)
        means = lines.mean(numeric_only=True).where(lines.size() == count)
        means["examples"] = lines["examples"].sum()
        means["memory"] = lines["memory"].min()  # "nominal" sorts before "physical"
        parts.append(means.reset_index().assign(group=f"average of {count} groups"))
    return pd.concat(parts)[frame.columns].round(dict.fromkeys(_scores_of(frame), 2)) if parts else frame


def wide(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per (method, budget): the score of each group in a column of its own, and their plain mean as `average`.

    A group without rows is empty, and so is the average of its line. Several benchmarks make columns benchmark/group.
    """
    frame = summarise(rows)
    if frame["benchmark"].nunique() > 1:
        frame["group"] = frame["benchmark"] + "/" + frame["group"]
    frame = _first_seen(frame, ["method", "budget", "group"])
    table = frame.set_index(["method", "budget", "group"])["score"].unstack(sort=False)
    return table.assign(average=table.mean(axis=1, skipna=False).round(2)).rename_axis(columns=None).reset_index()


def print_table(frame: pd.DataFrame, console: Console) -> None:
    """Show a frame of `summarise`: a table for each group unless there are many, and their average."""
    if frame.empty:
        console.print("no rows yet")
    for benchmark, part in frame.groupby("benchmark", sort=False):
        groups = part["group"].nunique()
        if len(part) <= MOST_LINES or groups == 1:
            for group, lines in part.groupby("group", sort=False):
                console.print(_table(f"{benchmark}: {group}", lines), "")
        if groups > 1:
            console.print(_table(f"{benchmark}: average of {groups} groups", overall(part)), "")


def score_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """`score` and every other named score: a float field within 0..1 that is neither a cost nor a place in the grid."""
    values: dict[str, list[float]] = {"score": []}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float) and name not in NOT_SCORES and not name.endswith("_seconds"):
                values.setdefault(name, []).append(value)
    return [name for name, found in values.items() if name == "score" or all(0 <= value <= 1 for value in found)]


def budget_name(budget: int | str | None) -> int | str:
    """The budget as tables and figures show it."""
    return FULL if budget is None else budget


def percent(scores: Iterable[float]) -> float:
    """The mean of scores 0..1 as 0..100 with two decimals, by Python's sum and round as in LongBench's evaluation."""
    values = [float(score) for score in scores]
    return round(100 * sum(values) / len(values), 2)


def _first_seen(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The frame sorted by these columns, the values of each in the order in which they first occur."""
    ranks = pd.DataFrame({name: pd.factorize(frame[name])[0] for name in columns}, index=frame.index)
    return frame.loc[ranks.sort_values(columns, kind="stable").index]


def _scores_of(frame: pd.DataFrame) -> list[str]:
    return [name for name in frame.columns if name not in {*KEYS, *COSTS, "examples", "memory"}]


def _table(title: str, frame: pd.DataFrame) -> Table:
    scores = _scores_of(frame)
    table = Table(title=Text(title), title_justify="left", caption_justify="left", box=None, padding=(0, 1, 0, 0))
    if (frame["memory"] == "nominal").any():
        table.caption = "* nominal: evicted entries are only masked, the memory is not freed"
    table.add_column("\nmethod", overflow="fold")
    tokens = {"kept_tokens_mean": "kept\ntokens"}
    if (frame["read_tokens_mean"] < frame["kept_tokens_mean"]).any():
        tokens["read_tokens_mean"] = "read\ntokens"
    costs = [*tokens.values(), "\nevicted", "cache\nMiB", "of\nfull", "prefill\ns", "compr.\ns", "decode\ns"]
    for name in ["\nbudget", "\nn", *(f"\n{name}" for name in scores), *costs]:
        table.add_column(name, justify="right")
    for line in frame.to_dict("records"):
        table.add_row(
            Text(line["method"]),
            str(line["budget"]),
            str(line["examples"]),
            *(_number(line[name], "{:.2f}") for name in scores),
            *(_number(line[name], "{:.1f}") for name in tokens),
            _evicted(line),
            _cache(line),
            _ratio(line),
            *(_number(line[name], "{:.2f}") for name in SECONDS),
        )
    return table


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
