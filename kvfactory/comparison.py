"""Two runs row by row: what their settings differ in, what became of scores and predictions, and which rows changed most.

    pairs = pair(load_run("results/before"), load_run("results/after"))
    print(figures(pairs.both))
    print(differing(pairs.both))

Rows are the same if benchmark, example, method and budget are. Everything is told from the first run to the second: a
difference is the second's value less the first's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import pandas as pd

from kvfactory.folder_format import FULL, budget_name
from kvfactory.report.intervals import Draws, Statistic, average_name, averaged, draws, ends, statistics
from kvfactory.report.tables import MEASURES, score_names
from kvfactory.rescoring import RESCORED, in_table_order
from kvfactory.results import CSV, Row, Run, by_plugin, changed_values, key_of

LESS_IS_BETTER = ("nll", "perplexity", "ttft_seconds", "tpot_seconds", "peak_bytes")
"""Of the fields that rows without scores are measured by; of the others more is better."""
SIZES = ("kept_tokens_mean", "cache_bytes")
"""What is kept of a prompt, which is told apart from what it led to."""
CONFIGURATION = ["benchmark", "method", "budget"]
FIGURES = [
    *("benchmark", "measure", "group", "method", "budget", "rows", "a", "b", "difference", "low", "high"),
    *("better", "worse", "equal", "changed"),
]
"""The columns of `figures`."""
SIDES = FIRST, SECOND = "a", "b"

Pair = tuple[Row, Row]
"""A row of the first run and the same of the second."""


@dataclass(frozen=True)
class Pairs:
    """The rows of two runs."""

    both: list[Pair]
    lonely: tuple[list[Row], list[Row]]
    """Those that one of the two alone has."""


def pair(first: Run, second: Run) -> Pairs:
    """The rows of two runs, put together, in the order of the first one's tables."""
    ordered = [in_table_order(run.rows, run.path / CSV) for run in (first, second)]
    rows = [{(row["benchmark"], *key_of(row)): row for row in each} for each in ordered]
    both = [(row, rows[1][key]) for key, row in rows[0].items() if key in rows[1]]
    alone = [[row for key, row in mine.items() if key not in other] for mine, other in (rows, reversed(rows))]
    return Pairs(both, (alone[0], alone[1]))


def settings_changed(first: Run, second: Run) -> list[tuple[str, str, str]]:
    """Each setting that differs, with both values as JSON; None, False and not there are the same."""
    return changed_values(first.settings, second.settings)


def environment_changed(first: Run, second: Run) -> list[tuple[str, str, str]]:
    """The same of where the rows were made: versions, commit, each plugin and the machine."""
    return changed_values(_environment(first), _environment(second))


def _environment(run: Run) -> dict[str, Any]:
    """Of the last session that made rows, and the version that scored them since, if one did."""
    scored = [each for each in run.sessions if RESCORED in each["arguments"]]
    made = [each for each in run.sessions if each not in scored]
    where = by_plugin(made[-1]["environment"]) if made else {}
    return where | ({"scored by kvfactory": scored[-1]["environment"]["kvfactory"]} if scored else {})


def count(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows of each benchmark, method and budget."""
    frame = pd.DataFrame([_configuration(row) for row in rows], columns=CONFIGURATION).astype({"budget": object})
    return frame.groupby(CONFIGURATION, sort=False).size().rename("rows").reset_index()


def _configuration(row: Row) -> dict[str, Any]:
    return {"benchmark": row["benchmark"], "method": row["method"], "budget": budget_name(row)}


def measured(pairs: Sequence[Pair]) -> list[Statistic]:
    """What rows are compared by: their scores, or what else was measured. The first says which changed most."""
    rows = [row for each in pairs for row in each]
    found = statistics(rows, score_names(rows))
    others = [name for name in MEASURES if name not in ("nll", "perplexity", "scored_tokens")]
    return [*found, *(Statistic(name, name) for name in others if any(name in row for row in rows))]


def figures(pairs: Sequence[Pair]) -> pd.DataFrame:
    """A line for each benchmark, measure, method, budget and group, and where there are several groups for their average.

    `rows` are those that have the measure in both; `a` and `b` are the means of the first and the second run, `difference`
    is the paired one, `low` and `high` the ends of its 95 % bootstrap interval. Then come the rows that are `better`,
    `worse` and `equal` in the second, and those whose prediction `changed`, if there are any. Scores are 0 to 100.
    """
    lines: list[dict[str, Any]] = []
    for benchmark in dict.fromkeys(first["benchmark"] for first, _ in pairs):
        own = [each for each in pairs if each[0]["benchmark"] == benchmark]
        for statistic in measured(own):
            lines += _lines(own, statistic)
    return pd.DataFrame(lines, columns=[*FIGURES]).astype({"budget": object})


def _lines(pairs: Sequence[Pair], statistic: Statistic) -> Iterator[dict[str, Any]]:
    name = statistic.field
    groups: dict[tuple[str, int | str], dict[str, list[Pair]]] = {}
    for each in pairs:
        if all(isinstance(row.get(name), int | float) and isfinite(row[name]) for row in each):
            key = each[0]["method"], budget_name(each[0])
            groups.setdefault(key, {}).setdefault(each[0]["group"], []).append(each)
    for (method, budget), parts in groups.items():
        about = {"benchmark": pairs[0][0]["benchmark"], "measure": statistic.name, "method": method, "budget": budget}
        found = {group: _drawn(part, statistic, group) for group, part in parts.items()}
        lines = [
            about | {"group": group} | _of_draws(*found[group]) | _counts(part, name) for group, part in parts.items()
        ]
        if len(parts) > 1:
            whole = [each for part in parts.values() for each in part]
            average = (
                float(np.mean([drawn[0] for drawn in found.values()])),
                averaged([drawn for _, drawn in found.values()]),
            )
            lines.insert(0, about | {"group": average_name(len(parts))} | _of_draws(*average) | _counts(whole, name))
        yield from lines


def _drawn(pairs: Sequence[Pair], statistic: Statistic, group: str) -> tuple[float, Draws]:
    """The first mean of a configuration in a group, and what resamples say of the second."""
    weights = [first[statistic.weight] for first, _ in pairs] if statistic.weight else None
    mean = np.average([first[statistic.field] for first, _ in pairs], weights=weights)
    sides = [
        {**row, "method": side, "budget": None, "budget_share": None}
        for each in pairs
        for row, side in zip(each, SIDES, strict=True)
    ]
    return float(statistic.shape(mean)), draws(sides, statistic, (FIRST, FULL), group)[SECOND, FULL]


def _of_draws(mean: float, drawn: Draws) -> dict[str, float]:
    low, high = ends(drawn.differences[:, None])
    return {
        FIRST: mean,
        SECOND: mean + drawn.difference,
        "difference": drawn.difference,
        "low": float(low[0]),
        "high": float(high[0]),
    }


def _counts(pairs: Sequence[Pair], name: str) -> dict[str, int | None]:
    gains = [(second[name] - first[name]) * (-1 if name in LESS_IS_BETTER else 1) for first, second in pairs]
    predicted = any("prediction" in row for each in pairs for row in each)
    return {
        "rows": len(pairs),
        "better": sum(gain > 0 for gain in gains),
        "worse": sum(gain < 0 for gain in gains),
        "equal": sum(gain == 0 for gain in gains),
        "changed": sum(first.get("prediction") != second.get("prediction") for first, second in pairs)
        if predicted
        else None,
    }


def sizes(pairs: Sequence[Pair]) -> pd.DataFrame:
    """What is kept of prompts: for each configuration both means, of rows that say it in both, and how many differ."""
    known = [each for each in pairs if all(row.get(name) is not None for row in each for name in SIZES)]
    cells = [
        _configuration(each[0])
        | {f"{name}_{side}": row[name] for name in SIZES for row, side in zip(each, SIDES, strict=True)}
        | {"rows": 1, "differing": int(any(each[0][name] != each[1][name] for name in SIZES))}
        for each in known
    ]
    if not cells:
        return pd.DataFrame(columns=[*CONFIGURATION, "rows", "differing"])
    columns = {
        name: "sum" if name in ("rows", "differing") else "mean" for name in cells[0] if name not in CONFIGURATION
    }
    frame = pd.DataFrame(cells).astype({"budget": object}).groupby(CONFIGURATION, sort=False).agg(columns).reset_index()
    return frame


def differing(pairs: Sequence[Pair]) -> pd.DataFrame:
    """The rows that differ in a measure, the prediction or what is kept, those first whose first measure differs most.

    Every value has two columns, `NAME_a` and `NAME_b`; scores are 0 to 1, as in rows.
    """
    names = list(dict.fromkeys(each.field for each in measured(pairs)))
    fields = [each for each in (*names, "prediction", *SIZES) if any(each in row for both in pairs for row in both)]
    found = [each for each in pairs if any(_differs(each, name) for name in fields)]
    found.sort(key=lambda each: _distances(each, names), reverse=True)
    lines = [
        _configuration(first)
        | {"group": first["group"], "example_id": first["example_id"]}
        | {f"{name}_{side}": row.get(name) for name in fields for row, side in zip((first, second), SIDES, strict=True)}
        for first, second in found
    ]
    return pd.DataFrame(lines)


def _differs(rows: Pair, name: str) -> bool:
    """Whether a field does; what is kept is known of both rows or not compared."""
    values = [row.get(name) for row in rows]
    return values[0] != values[1] and not (name in SIZES and None in values)


def _distances(rows: Pair, names: Sequence[str]) -> list[float]:
    """By how much each measure differs; one that a row lacks and the other has differs most."""
    values = [(rows[0].get(name), rows[1].get(name)) for name in names]
    return [0.0 if a == b else np.inf if a is None or b is None else abs(b - a) for a, b in values]


def visible(text: object) -> str:
    """The text on one line, with what a terminal would obey or not show in place of its own characters."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def shortened(texts: Sequence[str], width: int = 60, before: int = 20) -> list[str]:
    """Texts as `visible`, at most `width` characters each, from `before` characters before the place where they part."""
    shown = [visible(each) for each in texts]
    parted = (place for place, characters in enumerate(zip(*shown, strict=False)) if len({*characters}) > 1)
    shortest, longest = min(map(len, shown)), max(map(len, shown))
    start = max(0, next(parted, shortest) - before) if longest > width else 0
    return [
        ("…" if start else "") + each[start : start + width] + ("…" if len(each) > start + width else "")
        for each in shown
    ]
