"""Needle in a haystack: one fact at some depth of a long text, and a question that only the fact answers.

A run is a grid of context lengths and depths with a number of samples in each cell. What is hidden, how it is asked for
and how the answer is scored is a style, a class in `STYLES`:

    number      `digits` digits for a random pair of words, worded as RULER's niah_single_2, or several of them at once;
                the share of the numbers that the answer has
    sandwich    the San Francisco sandwich of the first needle test as KVCache-Factory asks for it; graded by the words
                of the answer
    original    the same sandwich in the first test's own system and user turns

Every cell draws from a random generator of its own, so that it comes out the same whatever else is in the run, and
every sample reads the haystack from another sentence on. A run may therefore go on with more of a grid, or another one.
`choose_grid` knows the published ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from kvfactory.benchmarks import Benchmark, Example
from kvfactory.benchmarks.haystack import Haystack, TokenizedHaystack
from kvfactory.benchmarks.needle_sandwich import Original, Sandwich
from kvfactory.benchmarks.needle_styles import Cell, Chat, Number, Style
from kvfactory.errors import UserError, require, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES: dict[str, type[Style]] = {style.name: style for style in (Number, Sandwich, Original)}


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


@dataclass(frozen=True)
class NamedGrid:
    """Context lengths in tokens, and for each spacing that the grid has its depths in percent."""

    lengths: Sequence[int]
    depths: Mapping[str, Sequence[float]]


GRIDS = {
    "list": NamedGrid((512, 1024), {"linear": (10, 30, 50, 70, 90)}),
    "original": NamedGrid(
        [round(1000 + 15000 * i / 34) for i in range(35)], {each: depth_grid(35, each) for each in SPACINGS}
    ),
    "kvcache-factory": NamedGrid(range(1000, 8001, 100), {each: depth_grid(10, each) for each in SPACINGS}),
}
"""A short one, to be listed otherwise; the first needle test's; KVCache-Factory's, as it is for Llama 3."""


@dataclass(frozen=True)
class Grid:
    """What a run is made of: context lengths in tokens, depths in percent, and a line for the user or None."""

    lengths: Sequence[int]
    depths: Sequence[float]
    notice: str | None = None


def choose_grid(
    name: str,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] | None = None,
    spacing: str | None = None,
    window: int | None = None,
) -> Grid:
    """The grid of `GRIDS` with that name; `lengths` and `depths` that are given stand in place of its own.

    Lengths beyond the `window` of the model, in tokens, are left out of a grid's own, which the notice says, and refused
    where they were given. No `spacing` is "linear". Raises UserError for a grid or spacing that is not there.
    """
    if name not in GRIDS:
        raise unknown("grid", name, GRIDS)
    longest = math.inf if window is None else window
    for length in lengths or ():
        require(length <= longest, f"--context_lengths {length}: longer than the model's window of {window} tokens")
    if depths is None:
        depths = _spaced(name, spacing or "linear")
    else:
        require(spacing is None, f"--depth_spacing {spacing}: it does not move the depths of --depths; leave one out")
    if lengths is not None:
        return Grid(lengths, depths)
    own = GRIDS[name].lengths
    fitting = [length for length in own if length <= longest]
    beyond = f"{len(own) - len(fitting)} of {len(own)} context lengths are beyond the model's window of {window} tokens"
    require(bool(fitting), f"--grid {name}: {beyond}; give --context_lengths")
    return Grid(fitting, depths, f"--grid {name}: {beyond} and left out" if len(fitting) < len(own) else None)


def _spaced(name: str, spacing: str) -> Sequence[float]:
    if spacing not in SPACINGS:
        raise unknown("depth spacing", spacing, SPACINGS)
    depths = GRIDS[name].depths
    owners = ", ".join(each for each, grid in GRIDS.items() if spacing in grid.depths)
    require(spacing in depths, f"--depth_spacing {spacing}: the depths of --grid {name} are a list; it is for {owners}")
    return depths[spacing]


def score(example: Example, prediction: str) -> dict[str, float]:
    """The scores of the example's style."""
    style = example.info["style"]
    if style not in STYLES:
        raise unknown("needle style", style, STYLES)
    return STYLES[style].score(example.answers, prediction)


class Needle(Benchmark):
    """Every length with every depth, `samples` times; a style's examples and scores.

    Lengths are in tokens, depths in percent. `chat` wraps a user's turn for an instruct model; without it the prompt is
    plain text. `digits` (4 if not given) and `needles` (1) belong to the style "number". UserError for a grid that cannot
    be, and for a setting that is not the style's.
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
        needles: int | None = None,
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
        own = {name: value for name, value in {"digits": digits, "needles": needles}.items() if value is not None}
        for name in own:
            owners = [each.name for each in STYLES.values() if name in each.settings]
            require(style in owners, f"--{name} is a setting of the needle style '{owners[0]}'; '{style}' has none")
        self._style = STYLES[style](TokenizedHaystack(haystack, tokenizer), chat, seed, **own)
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
        return score(example, prediction)

    def _example(self, cell: Cell) -> Example:
        where = {"context_length": cell.length, "depth_percent": cell.depth, "sample": cell.sample}
        return Example(
            id=f"{self._style.label}/{cell}",
            group=str(cell.length),
            answers=self._style.answers(cell),
            max_new_tokens=self._style.max_new_tokens,
            stop_ids=self._style.stop_ids,
            info={"style": self._style.name, **where, **self._style.facts(cell)},
        )


def _check_axis(flag: str, values: Sequence[str]) -> None:
    if not values:
        raise UserError(f"{flag}: at least one is needed")
    value, times = Counter(values).most_common(1)[0]
    if times > 1:
        raise UserError(f"{flag}: {value} is given {times} times; each may be given once")
