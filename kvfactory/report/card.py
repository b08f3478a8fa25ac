"""The matched-budget card: what every method finds and costs at the same budgets, one line each.

rows = with_scores(rows_of_a_latency_run, rows_of_another_run)
frame = card(rows)
save_card(frame, folder)
print_card(frame, Console())
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvfactory.folder_format import FULL, budget_name

from .methods import markdown
from .tables import overall, score_names, summarise

NUMBERS = {
    "score": ("score", "{:.2f}"),
    "cache_gib": ("cache GiB", "{:.4f}"),
    "tokens_per_second": ("tokens/s", "{:,.1f}"),
    "ttft_seconds": ("TTFT s", "{:.3f}"),
    "largest_batch": ("largest batch", "{:,.0f}"),
}
"""Columns of numbers: heading and form."""


def with_scores(rows: Sequence[Mapping[str, Any]], scored: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a latency run, and in each the score of its method and budget in the `scored` rows, None if there is none.

    It is that of the group named as the row's `length` where they have one, or else the average of all groups. The field
    is called as the benchmark that was scored, and `score_interval` has the ends of its interval, both 0..1.
    """
    if not scored:
        return [dict(row) for row in rows]
    frame = summarise(scored)
    lines = pd.concat([frame, overall(scored).assign(group=FULL)]).dropna(subset="score").to_dict("records")
    found = {(line["group"], line["method"], line["budget"]): line for line in lines}
    groups, name = {line["group"] for line in lines}, scored[0]["benchmark"]

    def score(row: Mapping[str, Any]) -> dict[str, Any]:
        group = str(row["length"])
        line = found.get((group if group in groups else FULL, row["method"], budget_name(row)))
        if line is None:
            return {name: None, "score_interval": None}
        ends = [line[f"score_{end}"] / 100 for end in ("low", "high")]
        return {name: line["score"] / 100, "score_interval": None if pd.isna(ends[0]) else ends}

    return [{**row, **score(row), "scores": [name]} for row in rows]


def card(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per group, method and budget, from rows that `with_scores` gave a score; scores are 0..100.

    Columns: prompt (length and batch size), method, budget, those of `NUMBERS` and of the score's interval, oom.
    """
    frame = summarise(rows)
    (score,) = score_names(rows)
    intervals = {(row["group"], row["method"], budget_name(row)): row["score_interval"] for row in rows}
    lines = zip(frame["group"], frame["method"], frame["budget"], strict=True)
    ends = [intervals[line] or [None, None] for line in lines]
    return pd.DataFrame(
        {
            "prompt": frame["group"],
            "method": frame["method"],
            "budget": frame["budget"],
            "score": frame[score],
            "score_low": [None if low is None else round(100 * low, 2) for low, _ in ends],
            "score_high": [None if high is None else round(100 * high, 2) for _, high in ends],
            "cache_gib": frame["cache_bytes"] / 2**30,
            "tokens_per_second": frame.get("tokens_per_second"),
            "ttft_seconds": frame.get("ttft_seconds"),
            "largest_batch": frame.get("largest_batch"),
            "oom": frame["oom"],
        }
    ).astype(dict.fromkeys([*NUMBERS, "score_low", "score_high"], float) | {"largest_batch": "Int64"})


def save_card(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Write `card.csv` and `card.md`."""
    paths = [folder / "card.csv", folder / "card.md"]
    frame.to_csv(paths[0], index=False, lineterminator="\n")
    paths[1].write_text(markdown(_headings(), _lines(frame)) + "\n", encoding="utf-8")
    return paths


def print_card(frame: pd.DataFrame, console: Console) -> None:
    """Show a frame of `card`."""
    table = Table(title=Text("scores and costs at equal budgets"), title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in _headings():
        table.add_column(heading, justify="left" if heading in ("prompt", "method") else "right", overflow="fold")
    for line in _lines(frame):
        table.add_row(*map(Text, line))
    console.print(table, "")


def _headings() -> list[str]:
    score, *costs = (heading for heading, _ in NUMBERS.values())
    return ["prompt", "method", "budget", score, "95 % interval", *costs]


def _lines(frame: pd.DataFrame) -> Iterator[list[str]]:
    for line in frame.to_dict("records"):
        forms = {name: "-" if pd.isna(line[name]) else form.format(line[name]) for name, (_, form) in NUMBERS.items()}
        score, *costs = ("oom" if line["oom"] and name != "score" else text for name, text in forms.items())
        interval = "-" if pd.isna(line["score_low"]) else f"{line['score_low']:.1f}-{line['score_high']:.1f}"
        yield [line["prompt"], line["method"], str(line["budget"]), score, interval, *costs]
