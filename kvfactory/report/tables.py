"""Rows to tables: the frame behind `results.csv`, the wide form LongBench users know, and what the terminal shows.

    frame = summarise(rows)              # one line per benchmark, group, method and budget
    print_table(frame, Console())
    wide(rows).to_csv(...)               # one line per method and budget, a column per group

A line is made of the rows that carry its method and budget and of nothing else; the order of rows only decides the
order of lines. Scores are 0..100, rounded as LongBench rounds them. A method without a budget has the budget "full".
What is measured and is no score (`MEASURES`) has columns where rows have it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

FULL = "full"
KEYS = ["benchmark", "group", "method", "budget"]
SECONDS = ["prefill_seconds", "compress_seconds", "decode_seconds"]
COSTS = ["kept_tokens_mean", "read_tokens_mean", "cache_bytes", "ratio", "compressed_share", *SECONDS]
MEASURES = {
    "perplexity": ("perplexity", "{:.2f}", 1),
    "nll": ("nats", "{:.4f}", 1),
    "scored_tokens": ("scored\ntokens", "{:,.0f}", 1),
    "ttft_seconds": ("first\ntoken s", "{:.3f}", 1),
    "tpot_seconds": ("s per\ntoken", "{:.4f}", 1),
    "tokens_per_second": ("tokens\nper s", "{:,.1f}", 1),
    "peak_bytes": ("peak\nMiB", "{:,.1f}", 2**20),
    "largest_batch": ("largest\nbatch", "{:,.0f}", 1),
}
"""Fields of rows that are neither scores nor costs: heading, form and unit in the terminal, in the order of columns."""

TABLE_WIDTH = 100  # columns that a table with short names fits
MOST_LINES = 60  # what a terminal can show; a longer table is for results.csv


def summarise(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per (benchmark, group, method, budget), each in first-seen order: examples, mean scores and mean costs.

    `compressed_share` (0..1) says in how many of the examples anything was evicted. `nll` is a mean over tokens and
    `perplexity` its exponential; `scored_tokens` are a sum. `oom` says whether memory did not suffice for one.
    """
    scores, measures = score_names(rows), [name for name in MEASURES if any(name in row for row in rows)]
    ability, oom = ([name] if any(name in row for row in rows) else [] for name in ("ability", "oom"))
    own = [{"budget": budget_name(row["budget"]), "compressed_share": row.get("evicted")} for row in rows]
    cells = [{"oom": False, **row, **each} for row, each in zip(rows, own, strict=True)]
    frame = pd.DataFrame(cells, columns=[*KEYS, "memory", *scores, *measures, *COSTS, *ability, *oom])
    frame = frame.astype({"budget": object} | dict.fromkeys([*scores, *measures, *COSTS, *ability], float))
    frame["nats"] = frame["nll"] * frame["scored_tokens"] if "nll" in measures else np.nan
    groups = _first_seen(frame, KEYS).groupby(KEYS, sort=False)
    means = {name: groups[name].mean() for name in [*measures, *COSTS]}
    if "nll" in measures:
        means["scored_tokens"] = groups["scored_tokens"].sum()
        means["nll"] = groups["nats"].sum() / means["scored_tokens"]
        means["perplexity"] = np.exp(means["nll"])
    parts: dict[str, pd.Series] = {
        "examples": groups.size(),
        **{name: groups[name].agg(percent) for name in scores},
        **means,
        **{name: groups[name].first() for name in ability},
        **{name: groups[name].any() for name in oom},
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
    if "score" not in frame:
        return pd.DataFrame(columns=["method", "budget", "average"])
    if frame["benchmark"].nunique() > 1:
        frame["group"] = frame["benchmark"] + "/" + frame["group"]
    frame = _first_seen(frame, ["method", "budget", "group"])
    table = frame.set_index(["method", "budget", "group"])["score"].unstack(sort=False)
    return table.assign(average=table.mean(axis=1, skipna=False).round(2)).rename_axis(columns=None).reset_index()


def by_fields(rows: Sequence[Mapping[str, Any]], line: str, column: str, order: Iterable[str]) -> pd.DataFrame:
    """Mean scores with one line per method, budget and value of a row's field `line`, and a column per value of `column`.

    Columns are in that order, and those without rows left out; `average` is their plain mean, empty where one is missing.
    """
    keys = ["method", "budget", line]
    cells = [
        {**{name: row[name] for name in (*keys, column, "score")}, "budget": budget_name(row["budget"])} for row in rows
    ]
    frame = pd.DataFrame(cells, columns=[*keys, column, "score"]).astype({"budget": object})
    table = frame.groupby([*keys, column], sort=False)["score"].agg(percent).unstack(sort=False)
    table = table[[name for name in order if name in table]]
    return table.assign(average=table.mean(axis=1, skipna=False).round(2)).rename_axis(columns=None).reset_index()


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


def print_table(frame: pd.DataFrame, console: Console) -> None:
    """Show a frame of `summarise`: a table for each group unless there are many, and their average."""
    if frame.empty:
        console.print("no rows yet")
    for benchmark, part in frame.groupby("benchmark", sort=False):
        groups, beyond = part["group"].nunique(), beyond_ability(part)
        if len(part) <= MOST_LINES or groups == 1:
            for group, lines in part.groupby("group", sort=False):
                notes = [f"beyond this model, differences are noise: {beyond[str(group)]}"] if group in beyond else []
                console.print(_table(f"{benchmark}: {group}", lines, notes), "")
        if groups > 1 and "score" in part:
            notes = [f"{len(beyond)} of them beyond this model: {'; '.join(beyond)}"] if beyond else []
            console.print(_table(f"{benchmark}: average of {groups} groups", overall(part), notes), "")


def score_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The named scores of the rows, in first-seen order; a row that does not list its own has `score` at most."""
    names = (row.get("scores", [name for name in ("score",) if name in row]) for row in rows)
    return list(dict.fromkeys(name for each in names for name in each))


def beyond_ability(frame: pd.DataFrame) -> dict[str, str]:
    """Groups whose differences are noise, and why: what keeps everything scores less there than means anything."""
    if "ability" not in frame:
        return {}
    whole = frame[(frame["budget"] == FULL) & (frame["compressed_share"] == 0) & (frame["ratio"] >= 1)]
    weak = whole[whole["score"] < 100 * whole["ability"]].drop_duplicates("group")
    return {
        str(line["group"]): f"{line['method']} scores {line['score']:.2f}, less than {100 * line['ability']:.0f}"
        for line in weak.to_dict("records")
    }


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
    others = {*KEYS, *COSTS, *MEASURES, "examples", "ability", "oom", "memory"}
    return [name for name in frame.columns if name not in others]


def _table(title: str, frame: pd.DataFrame, notes: Sequence[str] = ()) -> Table:
    scores, measures = _scores_of(frame), {name: each for name, each in MEASURES.items() if name in frame}
    table = Table(title=Text(title), title_justify="left", caption_justify="left", box=None, padding=(0, 1, 0, 0))
    if (frame["memory"] == "nominal").any():
        notes = [*notes, "* nominal: evicted entries are only masked, the memory is not freed"]
    table.caption = "\n".join(notes) or None
    table.add_column("\nmethod", overflow="fold")
    tokens = {"kept_tokens_mean": "kept\ntokens"}
    if (frame["read_tokens_mean"] < frame["kept_tokens_mean"]).any():
        tokens["read_tokens_mean"] = "read\ntokens"
    seconds = dict(zip(SECONDS, ("prefill\ns", "compr.\ns", "decode\ns"), strict=True))
    if "ttft_seconds" in measures:  # which, with the seconds per token, says what these say
        del seconds["prefill_seconds"], seconds["decode_seconds"]
    sizes = [*tokens.values(), "\nevicted", "cache\nMiB", "of\nfull", *seconds.values()]
    headings = [heading if "\n" in heading else f"\n{heading}" for heading, _, _ in measures.values()]
    for name in ["\nbudget", "\nn", *(f"\n{name}" for name in scores), *headings, *sizes]:
        table.add_column(name, justify="right")
    for line in frame.to_dict("records"):
        costs = [
            *(_number(line[name] / unit, form) for name, (_, form, unit) in measures.items()),
            *(_number(line[name], "{:.1f}") for name in tokens),
            _evicted(line),
            _cache(line),
            _ratio(line),
            *(_number(line[name], "{:.2f}") for name in seconds),
        ]
        table.add_row(
            Text(line["method"]),
            str(line["budget"]),
            str(line["examples"]),
            *(_number(line[name], "{:.2f}") for name in scores),
            *("oom" if cell == "-" and line.get("oom") else cell for cell in costs),
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
