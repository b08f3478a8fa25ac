"""The format of run folders, field by field: a sweep fills it in, docs/results.md is written from it.

A row is flat: the fields of the four parts one after the other, and between them what a benchmark or a method adds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

FORMAT = 2
"""The version. In 1, shares stood in `budget` itself, and prompts were not recorded."""


FULL = "full"
"""The budget of what keeps everything, in tables."""


def told(meaning: str) -> Any:
    """A field with its meaning."""
    return field(metadata={"meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a row is about."""

    benchmark: str = told("the benchmark")
    group: str = told("what a line of the table is about: a dataset, a context length")
    example_id: str = told("the example, the same name in every run")
    method: str = told("the method as it was asked for: its name, and settings given with it behind colons")
    budget: int | None = told(
        "KV entries asked for per head and layer; null for a method that keeps everything. Of a share of the prompt, the "
        "entries that it came to"
    )
    budget_share: str | None = told("the share that was asked for, such as `10%`, or null")
    settings: dict[str, Any] = told(
        "every setting of the method, its allocator, merge and storage, defaults included; null for `none`"
    )
    memory: str = told("`physical`, or `nominal` for a method that masks what it evicts and still holds it")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was generated; rows of benchmarks that generate nothing have other fields in its place."""

    prediction: str = told("what was generated, special tokens left out")
    answers: list[str] = told("what would have been right")
    score: float = told("the benchmark's main score, 0 to 1; its other scores are fields too")
    scores: list[str] = told("the names of all its scores")


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is kept of the prompt, right after it was read."""

    kept_tokens_min: float = told(
        "entries really kept of the prompt per head: of the layer that keeps least, its heads' mean"
    )
    kept_tokens_mean: float = told("mean over layers")
    kept_tokens_max: float = told("of the layer that keeps most")
    cache_bytes: int = told(
        "every tensor the stores hold after the prompt: keys, values, positions and other bookkeeping"
    )
    full_cache_bytes: int = told("keys and values of the whole prompt, uncompressed, as this model has them")
    ratio: float = told("`cache_bytes` over `full_cache_bytes`")
    evicted: bool = told("whether any layer kept fewer entries than the prompt has tokens")


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long things were and how long they took, in tokens and seconds."""

    prompt_tokens: int = told("tokens of the prompt")
    question_tokens: int = told("tokens read after the prompt was compressed: a question, or a turn of a conversation")
    new_tokens: int = told("tokens generated, the stop token among them")
    read_tokens_mean: float = told(
        "entries that a head's query read in the last step, generated ones among them: mean over heads and layers"
    )
    stop_reason: str | None = told("`stop` for a stop token, `length` where the answer reached its longest")
    prefill_seconds: float = told(
        "the pass over the prompt; one pass serves all methods and each row shows the whole of it, but for methods with a "
        "prefill of their own"
    )
    compress_seconds: float = told("the method's own time after the pass, as if it had run alone")
    decode_seconds: float = told(
        "the row's share of the steps it took part in: a step of 64 rows counts a 64th for each; reading the question "
        "counts too"
    )


ROW = (Subject, Answer, Size, Course)
"""The parts of a row, in its order."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """One command's stay in a run folder."""

    started: str = told("when, in UTC, as ISO 8601 has it")
    arguments: dict[str, Any] = told("every flag, and under `command` the command line")
    environment: dict[str, Any] = told(
        "commit of the working directory, versions of Python and packages, plugins, and the machine and device"
    )


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What `run_meta.json` holds."""

    format: int = told(f"the version of the format, {FORMAT} now; folders without one are version 1")
    settings: dict[str, Any] = told(
        "the flags and facts that make results what they are; a resumed run must have the same"
    )
    sessions: list[Session] = told("an entry for each session that worked here")


def flat(part: Any) -> dict[str, Any]:
    """The fields of a part as a row has them."""
    return {each.name: getattr(part, each.name) for each in fields(part)}


def budget_name(row: Mapping[str, Any]) -> int | str:
    """The budget as tables and figures show it."""
    budget: int | str | None = row.get("budget_share") or row["budget"]
    return FULL if budget is None else budget


def budget_number(budget: int | str) -> tuple[bool, float]:
    """Whether a budget of tables is a share, and its number; one without a number comes behind all others."""
    found = re.fullmatch(r"([\d.]+)(%?)", str(budget))
    return (bool(found[2]), float(found[1])) if found else (True, math.inf)
