"""Needle in a haystack: one fact at some depth of a long text, and a question that only the fact answers.

A run is a grid of context lengths and depths with a number of samples in each cell. What is hidden, how it is asked for
and how the answer is scored is a style, a class in `STYLES`:

    number      `digits` digits for a random pair of words, worded as RULER's niah_single_2; right or wrong
    sandwich    the San Francisco sandwich of the first needle test; graded by the words of the answer

Every cell draws from a random generator of its own, so that it comes out the same whatever else is in the run, and
every sample reads the haystack from another sentence on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING

from kvfactory.benchmarks import Benchmark, Example
from kvfactory.benchmarks.haystack import Haystack, TokenizedHaystack
from kvfactory.benchmarks.needle_styles import STYLES, Cell, Chat
from kvfactory.errors import UserError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def logistic(x: float) -> float:
    """Percent -> percent, crowded towards both ends (slope 0.1 around 50); 0 and 100 stay."""
    return x if x in (0, 100) else round(100 / (1 + math.exp(-0.1 * (x - 50))), 3)


SPACINGS: dict[str, Callable[[float], float]] = {"linear": round, "sigmoid": logistic}


def depth_grid(count: int, spacing: str = "linear") -> list[float]:
    """`count` depths from 0 to 100 percent; linear ones are whole numbers."""
    if count < 1:
        raise UserError(f"--depths: {count} of them is not a grid; at least 1 is needed")
    if spacing not in SPACINGS:
        raise unknown("depth spacing", spacing, SPACINGS)
    return [float(SPACINGS[spacing](100 * i / max(count - 1, 1))) for i in range(count)]


class Needle(Benchmark):
    """Every length with every depth, `samples` times; a style's examples and scores.

    Lengths are in tokens, depths in percent. `chat` wraps a user's turn for an instruct model; without it the prompt is
    plain text. `digits` belongs to the style "number" (4 if not given). UserError for a grid that cannot be.
    """

    name = "needle"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        style: str,
        lengths: Sequence[int],
        depths: Sequence[float],
        samples: int,
        digits: int | None = None,
        haystack: Haystack,
        seed: int = 42,
        chat: Chat | None = None,
    ) -> None:
        if style not in STYLES:
            raise unknown("needle style", style, STYLES)
        _check_axis("--context_lengths", [str(length) for length in lengths])
        _check_axis("--depths", [f"{depth:g}" for depth in depths])
        for depth in depths:
            if not 0 <= depth <= 100:
                raise UserError(f"--depths {depth:g}: a depth is a percentage, 0 to 100")
        if samples < 1:
            raise UserError(f"--samples {samples}: each cell needs at least 1")
        self._style = STYLES[style](TokenizedHaystack(haystack, tokenizer), chat, seed, digits)
        for length in lengths:
            if length < self._style.shortest:
                raise UserError(
                    f"--context_lengths {length}: too short for the needle, its question and some haystack; "
                    f"the shortest possible is {self._style.shortest}"
                )
        self._cells = [Cell(*axes) for axes in product(lengths, map(float, depths), range(samples))]

    def examples(self) -> list[Example]:
        return [self._example(cell) for cell in self._cells]

    def prompt_ids(self, example: Example) -> list[int]:
        info = example.info
        return self._style.prompt_ids(Cell(info["context_length"], info["depth_percent"], info["sample"]))

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        return self._style.score(example.info["expected"], prediction)

    def _example(self, cell: Cell) -> Example:
        where = {"context_length": cell.length, "depth_percent": cell.depth, "sample": cell.sample}
        facts = self._style.facts(cell)
        return Example(
            id=f"{self._style.label}/{cell}",
            group=str(cell.length),
            answers=[facts["expected"]],
            max_new_tokens=self._style.max_new_tokens,
            stop_ids=self._style.stop_ids,
            info={"style": self._style.name, **where, **facts},
        )


def _check_axis(flag: str, values: Sequence[str]) -> None:
    if not values:
        raise UserError(f"{flag}: at least one is needed")
    value, times = Counter(values).most_common(1)[0]
    if times > 1:
        raise UserError(f"{flag}: {value} is given {times} times; each may be given once")
