"""What the report page's example browser shows: prompts, answers, predictions and which tokens were kept, packed small.

    unpacked(packed(sections)) == examples_of(sections)

Packed it is JSON, gzipped, in base64: a browser undoes that when it is asked for, and nothing a model wrote can end the
element that holds it.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvfactory.folder_format import budget_name
from kvfactory.recording import PromptText, load_kept, load_prompts
from kvfactory.report.sections import Section
from kvfactory.report.tables import score_names

Answered = Mapping[str, Any]
"""A row with a prediction."""


def packed(sections: Iterable[Section]) -> str:
    """`examples_of` as base64 of gzipped JSON; empty where no row of any section has a prediction."""
    found = examples_of(sections)
    if not found:
        return ""
    return base64.b64encode(gzip.compress(json.dumps(found, separators=(",", ":")).encode(), mtime=0)).decode()


def unpacked(text: str) -> list[dict[str, Any]]:
    """What `packed` was given."""
    found: list[dict[str, Any]] = json.loads(gzip.decompress(base64.b64decode(text)))
    return found


def examples_of(sections: Iterable[Section]) -> list[dict[str, Any]]:
    """An item for each section that has predictions.

    `configurations` are [method, budget] pairs; an example's `rows` has an item for each of them, null where there is no
    row. An example's `text` is an index into `texts`, [first tokens, last tokens], or null where no prompt is recorded.
    """
    items = []
    for section in sections:
        rows = [row for row in section.rows if "prediction" in row]
        if rows:
            items.append(_examples(section, rows))
    return items


def _examples(section: Section, rows: Sequence[Answered]) -> dict[str, Any]:
    prompts, kept = load_prompts(section.folder), load_kept(section.folder)
    configurations = list(dict.fromkeys((row["method"], str(budget_name(row))) for row in rows))
    texts: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
    by_example: dict[str, dict[tuple[str, str], Answered]] = {}
    for row in rows:
        by_example.setdefault(row["example_id"], {})[row["method"], str(budget_name(row))] = row

    def example(name: str, answered: Mapping[tuple[str, str], Answered]) -> dict[str, Any]:
        first, prompt = next(iter(answered.values())), prompts.get(name)
        text = prompt and texts.setdefault((tuple(prompt.begin), tuple(prompt.end)), len(texts))
        found = [answered.get(each) for each in configurations]
        levels = [kept.get((name, *each)) for each in configurations]
        return {
            "id": name,
            "group": str(first["group"]),
            "answers": [str(each) for each in first.get("answers", [])],
            "text": text,
            **_about(prompt),
            "rows": [row and _row(row, level) for row, level in zip(found, levels, strict=True)],
        }

    examples = [example(name, answered) for name, answered in by_example.items()]
    return {
        "benchmark": section.name,
        "configurations": configurations,
        "examples": examples,
        "texts": list(texts),
    }


def _about(prompt: PromptText | None) -> dict[str, Any]:
    if prompt is None:
        return {}
    return {"tokens": prompt.tokens, "question": prompt.question, "after": prompt.after}


def _row(row: Answered, kept: str | None) -> dict[str, Any]:
    scores = {name: float(row[name]) for name in score_names([row])}
    return {
        "prediction": str(row["prediction"]),
        "scores": {name: score if math.isfinite(score) else None for name, score in scores.items()},
        "kept_tokens": row.get("kept_tokens_mean"),
        "kept": kept,
    }
