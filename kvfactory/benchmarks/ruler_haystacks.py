"""RULER's tasks that hide something in a haystack: needles (niah_*) and a chain of variables (vt)."""

from __future__ import annotations

import random
import re
import string
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from kvfactory.benchmarks.ruler_tasks import Sample, Task, filling, words

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


# ---- needles ----


def _word(rng: random.Random) -> str:
    return f"{rng.choice(words('adjective'))}-{rng.choice(words('noun'))}"


def _number(rng: random.Random) -> str:
    return str(rng.randint(1000000, 9999999))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


KINDS: dict[str, Callable[[random.Random], str]] = {"words": _word, "numbers": _number, "uuids": _uuid}
"""What keys and values may be."""


@dataclass(frozen=True)
class Needle:
    """A value and the key to ask for it."""

    kind: str
    """What the value is, in the plural that the sentence always has: numbers, uuids."""
    key: str
    value: str

    @property
    def sentence(self) -> str:
        return f"One of the special magic {self.kind} for {self.key} is: {self.value}."


class Hay(ABC):
    """A kind of haystack."""

    least: int
    """The smallest size: lines, or words of an essay."""

    @abstractmethod
    def hide(self, needles: Sequence[Needle], size: int, rng: random.Random) -> str:
        """A context of that size with the needles in it, in their order."""


class _Lines(Hay):
    least = 5  # the official step at short lengths

    @abstractmethod
    def lines(self, needles: Sequence[Needle], count: int, rng: random.Random) -> list[str]: ...

    def hide(self, needles: Sequence[Needle], size: int, rng: random.Random) -> str:
        lines = self.lines(needles, size, rng)
        points = sorted(rng.sample(range(size), len(needles)), reverse=True)
        for point, needle in zip(points, reversed(needles), strict=True):
            lines.insert(point, needle.sentence)
        return "\n".join(lines)


class Noise(_Lines):
    """The same line over and over."""

    def lines(self, needles: Sequence[Needle], count: int, rng: random.Random) -> list[str]:
        return [NOISE] * count


@dataclass(frozen=True)
class Needles(_Lines):
    """Needles that nobody asks for, no two with the same key."""

    keys: str
    values: str

    def lines(self, needles: Sequence[Needle], count: int, rng: random.Random) -> list[str]:
        hidden = {needle.key for needle in needles}
        drawn: dict[str, str] = {}
        while len(drawn) < count:
            key, value = KINDS[self.keys](rng), KINDS[self.values](rng)
            if key not in hidden:
                drawn.setdefault(key, value)
        return [Needle(self.values, key, value).sentence for key, value in drawn.items()]


class Essay(Hay):
    """The beginning of a text, or all of it over and over; needles stand between sentences.

    Sentences are found by a regular expression and not by the official nltk model, which would have to be downloaded:
    only the needles' places depend on them.
    """

    least = 50
    # The percentages of 40 even steps.
    depths = tuple(round(100 * step / 39) for step in range(40))
    # A word and the blank after it; a character where a script has no blanks between words.
    piece = re.compile(r"[^\s\u2e80-\U0010ffff]{1,30} ?|\S ?")
    sentence_end = re.compile(r"[.!?][\"')\]]* |[。！？]")

    def __init__(self, text: str) -> None:
        self.pieces = self.piece.findall(" ".join(text.split()) + " ")

    def hide(self, needles: Sequence[Needle], size: int, rng: random.Random) -> str:
        pieces = (self.pieces * -(-size // len(self.pieces)))[:size]
        text = "".join(pieces).strip()
        ends = sorted({0, *(each.end() for each in self.sentence_end.finditer(text)), len(text)})
        if len(ends) == 2:  # no sentence ends: needles stand between words
            ends = [0, *accumulate(map(len, pieces))]
        depths = sorted(rng.sample(self.depths, len(needles)))
        points = [0, *(ends[(len(ends) - 1) * depth // 100] for depth in depths), len(text)]
        runs = [text[start:end].strip() for start, end in pairwise(points)]
        hidden = [each.sentence for each in needles]
        return " ".join(part for pair in zip(runs, [*hidden, ""], strict=True) for part in pair if part)


@dataclass(frozen=True)
class NeedleInAHaystack(Task):
    """`num_keys` keys with `num_values` values each are hidden, and `num_queries` of the keys asked for."""

    hay: Hay
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def draw(self, place: str, number: int, length: int) -> Sample:
        rng = random.Random(place)
        hidden = {
            key: [KINDS[self.values](rng) for _ in range(self.num_values)]
            for key in _distinct(KINDS[self.keys], self.num_keys, rng)
        }
        needles = [Needle(self.values, key, value) for key, values in hidden.items() for value in values]
        rng.shuffle(needles)
        asked = rng.sample([*hidden], self.num_queries)
        query = ", ".join(asked[:-1]) + ", and " * (len(asked) > 1) + asked[-1]
        template, prefix = niah_wording(self.values, query, self.num_queries * self.num_values)
        return Sample(
            answers=[value for key in asked for value in hidden[key]],
            prefix=prefix,
            text=lambda size: template.replace("{context}", self.hay.hide(needles, size, filling(place))),
            least=self.hay.least,
            query=query,
        )


def niah_wording(kind: str, query: str, answers: int) -> tuple[str, str]:
    """The text with a place for its {context}, and how the answer begins; one answer is asked for in the singular."""
    some, magic, are, are_all = ("A", kind[:-1], "is", "is") if answers == 1 else ("Some", kind, "are", "are all")
    return (
        f"{some} special magic {magic} {are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {magic} afterwards.\n{{context}}\n"
        f"What {are_all} the special magic {magic} for {query} mentioned in the provided text?",
        f" The special magic {magic} for {query} mentioned in the provided text {are}",
    )


# ---- variables ----


class VariableTracking(Task):
    """A variable gets a value, four others get it from each other in turn; a solved example goes before."""

    names = 5
    template = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
        "Question: Find all variables that are assigned the value {query} in the text above."
    )
    prefix = (
        " Answer: According to the chain(s) of variable assignment in the text above, {names} variables are assigned "
        "the value {query}, they are: "
    )
    # As many as the official generator finds room for in the 500 tokens that its example may have.
    example_lines = 14

    def draw(self, place: str, number: int, length: int) -> Sample:
        rng = random.Random(place)
        names, example_names = (_distinct(_letters(count), self.names, rng) for count in (5, 3))
        value, example_value = map(str, rng.sample(range(10000, 99999), 2))

        def text(size: int) -> str:
            hay = filling(place)
            example = self._text(example_names, example_value, self.example_lines, hay)
            solution = f"{self._prefix(example_value)} {' '.join(example_names)}"
            return f"{example}{solution}\n\n{self._text(names, value, size, hay)}"

        return Sample(names, self._prefix(value), text, least=self.names, query=value)

    def _text(self, names: Sequence[str], value: str, size: int, rng: random.Random) -> str:
        statements = [f"VAR {names[0]} = {value}", *(f"VAR {to} = VAR {of} " for of, to in pairwise(names))]
        lines = [NOISE] * size
        points = sorted(rng.sample(range(size), len(statements)))
        for earlier, (point, statement) in enumerate(zip(points, statements, strict=True)):
            lines.insert(point + earlier, statement)
        return self.template.format(context="\n".join(lines), query=value)

    def _prefix(self, value: str) -> str:
        return self.prefix.format(names=self.names, query=value)


def _distinct(draw: Callable[[random.Random], str], count: int, rng: random.Random) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw(rng)] = None
    return [*drawn]


def _letters(count: int) -> Callable[[random.Random], str]:
    return lambda rng: "".join(rng.choices(string.ascii_uppercase, k=count))
