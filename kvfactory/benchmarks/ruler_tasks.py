"""What a task of RULER is: samples that are drawn first and written out later, at any size.

A sample's question and answers are drawn from a random generator of its own, and what fills its context from another.
The official generator draws everything from one stream, through the attempts that find a size too, so that a sample there
depends on all before it. Here it does not depend on the other samples, nor its question on the length it is asked at.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from kvfactory.metrics import RULER_TASKS

TOKENS_TO_GENERATE = {
    **dict.fromkeys((task for task in RULER_TASKS if task.startswith("niah")), 128),
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    **dict.fromkeys(("qa_1", "qa_2"), 32),
}
"""The longest answer of each task, in tokens."""


@dataclass(frozen=True)
class Sample:
    """One question; its context is made when its size is known."""

    answers: list[str]
    prefix: str
    """How the answer begins; it ends the prompt."""
    text: Callable[[int], str]
    """The task's text with so much filling: lines, words or documents. The same for the same size, and longer for more."""
    least: int
    """The smallest size."""
    most: int | None = None
    """The largest size; None where there is no end to it."""
    query: str = ""
    """What the question asks for; empty in the tasks that always ask the same."""


class Task(ABC):
    """Makes samples."""

    @abstractmethod
    def draw(self, place: str, number: int, length: int) -> Sample:
        """The sample with that `number`; `place` seeds its generators, `length` is the tokens it will have to fit."""


def filling(place: str) -> random.Random:
    """The generator of what a sample's context is filled with."""
    return random.Random(f"{place}/filling")


@cache
def words(*kinds: str) -> tuple[str, ...]:
    """Words of the package wonderwords, each once and sorted; kinds are `noun`, `adjective` and `verb`."""
    lists = [resources.files("wonderwords.assets").joinpath(f"{kind}list.txt").read_text("utf-8") for kind in kinds]
    return tuple(sorted({word.rstrip() for text in lists for word in text.splitlines()}))
