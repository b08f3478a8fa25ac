"""Rows to tables: the frame behind `results.csv`, averages over groups, and the wide form LongBench users know.

    frame = summarise(rows)              # one line per benchmark, group, method and budget
    overall(rows)                        # one line per benchmark, method and budget
    wide(rows).to_csv(...)               # one line per method and budget, a column per group

A line is made of the rows that carry its method and budget and of nothing else; the order of rows only decides the
order of lines. Scores are 0..100, rounded as LongBench rounds them. A method without a budget has the budget "full".
What is measured and is no score (`MEASURES`) has columns where rows have it. Scores have intervals and differences to what
keeps everything (`intervals`), in columns called `score_low`, `score_difference` and so on; NaN where there are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kvfactory.folder_format import FULL, budget_name
from kvfactory.report.intervals import BOUNDS, KEYS, average_bounds, average_name, bounds_of

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


def summarise(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per (benchmark, group, method, budget), each in first-seen order: examples, mean scores and mean costs.

    `compressed_share` (0..1) says in how many of the examples anything was evicted. `nll` is a mean over tokens and
    `perplexity` its exponential; `scored_tokens` are a sum. `oom` says whether memory did not suffice for one.
    """
    scores, measures = score_names(rows), [name for name in MEASURES if any(name in row for row in rows)]
    ability, oom = ([name] if any(name in row for row in rows) else [] for name in ("ability", "oom"))
    own = [{"budget": budget_name(row), "compressed_share": row.get("evicted")} for row in rows]
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
    bounds = bounds_of(rows, scores).reindex(groups.size().index)
    parts: dict[str, pd.Series] = {
        "examples": groups.size(),
        **_beside({name: groups[name].agg(percent) for name in scores} | means, bounds),
        **{name: groups[name].first() for name in ability},
        **{name: groups[name].any() for name in oom},
        "memory": groups["memory"].agg(_memory),
    }
    return pd.DataFrame(parts).reset_index()


def overall(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What `summarise` gives, averaged over the groups of each benchmark, every group counting the same.

    A configuration that still lacks a group gets no numbers: an average over fewer groups compares with nothing.
    """
    frame, parts = summarise(rows), []
    for _, part in frame.groupby("benchmark", sort=False):
        count = part["group"].nunique()
        lines = part.groupby(["benchmark", "method", "budget"], sort=False)
        means = lines.mean(numeric_only=True).where(lines.size() == count)
        for name in scores_of(frame):  # datasets that are scored in another way too
            means[name] = means[name].where(lines[name].count() == count)
        means["examples"] = lines["examples"].sum()
        means["memory"] = lines["memory"].agg(_memory)
        parts.append(means.reset_index().assign(group=average_name(count)))
    if not parts:
        return frame
    whole = pd.concat(parts)[frame.columns].set_index(KEYS)
    bounds = average_bounds(rows, score_names(rows))
    whole[bounds.columns] = bounds.reindex(whole.index)
    return whole.reset_index().round(dict.fromkeys(scores_of(frame), 2))


def _beside(figures: Mapping[str, pd.Series], bounds: pd.DataFrame) -> dict[str, pd.Series]:
    """Figures in their order, each with its bounds behind it; those of scores with two decimals, as they have."""
    columns: dict[str, pd.Series] = {}
    for name, each in figures.items():
        columns[name] = each
        columns |= {bound: bounds[bound] for bound in bounds if bound in {f"{name}_{one}" for one in BOUNDS}}
    return columns


def _memory(kinds: pd.Series) -> Any:
    return "nominal" if (kinds == "nominal").any() else kinds.iloc[0]


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
    cells = [{**{name: row[name] for name in (*keys, column, "score")}, "budget": budget_name(row)} for row in rows]
    frame = pd.DataFrame(cells, columns=[*keys, column, "score"]).astype({"budget": object})
    table = frame.groupby([*keys, column], sort=False)["score"].agg(percent).unstack(sort=False)
    table = table[[name for name in order if name in table]]
    return table.assign(average=table.mean(axis=1, skipna=False).round(2)).rename_axis(columns=None).reset_index()


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


def percent(scores: Iterable[float]) -> float:
    """The mean of scores 0..1 as 0..100 with two decimals, by Python's sum and round as in LongBench's evaluation."""
    values = [float(score) for score in scores]
    return round(100 * sum(values) / len(values), 2)


def _first_seen(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The frame sorted by these columns, the values of each in the order in which they first occur."""
    ranks = pd.DataFrame({name: pd.factorize(frame[name])[0] for name in columns}, index=frame.index)
    return frame.loc[ranks.sort_values(columns, kind="stable").index]


def scores_of(frame: pd.DataFrame) -> list[str]:
    """The scores that a frame of `summarise` has, in its order."""
    return [name for name in frame.columns if f"{name}_{BOUNDS[-1]}" in frame and name not in MEASURES]
