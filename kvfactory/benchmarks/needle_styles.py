"""What is hidden in a haystack, how it is asked for and how the answer is scored: a class for each style."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from kvfactory.benchmarks.haystack import TokenizedHaystack, insert_needle, split_point
from kvfactory.errors import UserError

Chat = Callable[[str, str], list[int]]
"""(text of the user's turn, how the answer begins) -> token ids of the prompt."""

LEAST_CONTEXT = 32
"""Tokens of haystack below which a depth says nothing."""
SLACK = 30
"""Tokens that a prompt may fall short of its context length."""
ATTEMPTS = 16
"""The first or second stretch of haystack fits; a tokenizer that cannot spell the text never does."""


@dataclass(frozen=True)
class Cell:
    """One square of the grid and one of its samples."""

    length: int
    depth: float
    sample: int

    @property
    def square(self) -> str:
        return f"{self.length}/depth{self.depth:g}"

    def __str__(self) -> str:
        return f"{self.square}/{self.sample}"


class Style(ABC):
    """One kind of needle: its examples' facts, their prompts and their scores."""

    name: ClassVar[str]
    label: str
    """The name, with whatever else tells its examples from another run's."""
    shortest: int
    """The least context length, in tokens, that holds the needle, the wording and LEAST_CONTEXT tokens of haystack."""
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()

    def __init__(self, hay: TokenizedHaystack, chat: Chat | None, seed: int) -> None:
        self.hay, self.chat, self.seed = hay, chat, seed
        first, *others = hay.sentence_starts
        self.starts = [first, *self.rng("starts").sample(others, len(others))]

    @abstractmethod
    def facts(self, cell: Cell) -> dict[str, Any]:
        """What the result row says about the needle; `expected` is the answer."""

    @abstractmethod
    def prompt_ids(self, cell: Cell) -> list[int]:
        """Token ids of the cell's prompt."""

    @abstractmethod
    def score(self, expected: str, prediction: str) -> dict[str, float]:
        """Named scores of one answer, in [0, 1]."""

    def rng(self, place: str) -> random.Random:
        """A generator for that place in the grid; seeded with a text, it draws the same in every process."""
        return random.Random(f"{self.seed}/{place}")

    def start(self, cell: Cell, first: int) -> int:
        """The haystack token that the cell's prompt begins with; samples take the starts in turn, from the `first`."""
        return self.starts[(first + cell.sample) % len(self.starts)]

    def render(self, text: str, prefix: str) -> list[int]:
        """The prompt's ids, special tokens and chat template included."""
        return self.chat(text, prefix) if self.chat else list(self.hay.tokenizer.encode(text + prefix, verbose=False))


# fmt: off
ADJECTIVES = (
    "amber", "ancient", "bitter", "brave", "bright", "calm", "clever", "crisp", "curious", "distant", "eager", "early",
    "faint", "gentle", "golden", "grand", "hidden", "hollow", "humble", "idle", "jolly", "keen", "lively", "lonely",
    "mellow", "modest", "narrow", "noble", "patient", "polite", "proud", "quiet", "rapid", "rustic", "sharp", "silent",
    "silver", "slender", "smooth", "solid", "steady", "sturdy", "sudden", "tender", "timid", "vivid", "warm", "wild",
)
NOUNS = (
    "anchor", "apple", "barn", "basket", "bridge", "candle", "canyon", "castle", "cloud", "compass", "copper", "cradle",
    "desert", "drum", "falcon", "feather", "forest", "fountain", "garden", "glacier", "hammer", "harbor", "island",
    "kettle", "ladder", "lantern", "marble", "meadow", "mirror", "mountain", "orchard", "otter", "pebble", "piano",
    "pillow", "planet", "ribbon", "river", "saddle", "shadow", "spider", "temple", "thunder", "tunnel", "valley",
    "violin", "whistle", "window",
)
# fmt: on


@dataclass(frozen=True)
class Secret:
    """A value, the key to ask for it, and the haystack token that its prompt begins with."""

    key: str
    value: str
    start: int

    @property
    def sentence(self) -> str:
        return f"One of the special magic numbers for {self.key} is: {self.value}."


class Number(Style):
    """A number for a key, worded as RULER's niah_single_2. The whole prompt is as long as the context length says."""

    name = "number"
    template = (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n{context}\n"
        "What is the special magic number for {key} mentioned in the provided text?"
    )
    prefix = " The special magic number for {key} mentioned in the provided text is"

    def __init__(self, hay: TokenizedHaystack, chat: Chat | None, seed: int, digits: int | None) -> None:
        super().__init__(hay, chat, seed)
        self.digits = 4 if digits is None else digits
        if self.digits < 1:
            raise UserError(f"--digits {self.digits}: a number has at least 1")
        self.label = f"{self.name}{self.digits}"
        self.max_new_tokens = self.digits + 6  # a blank, a colon or a quote may come first
        longest = "-".join(
            max(words, key=lambda word: len(self.hay.encode(f"-{word}"))) for words in (ADJECTIVES, NOUNS)
        )
        widest = Secret(longest, "9" * self.digits, 0)
        self.shortest = len(self._render(widest, widest.sentence)) + LEAST_CONTEXT

    def facts(self, cell: Cell) -> dict[str, Any]:
        secret = self._secret(cell)
        return {"key": secret.key, "expected": secret.value, "digits": self.digits, "haystack_start": secret.start}

    def prompt_ids(self, cell: Cell) -> list[int]:
        secret = self._secret(cell)
        room = cell.length - len(self._render(secret, secret.sentence))
        for _ in range(ATTEMPTS):
            ids = self._render(secret, self._context(secret, room, cell.depth))
            if cell.length - SLACK <= len(ids) <= cell.length:
                return ids
            room -= len(ids) - cell.length  # where texts meet, tokens merge anew
        raise UserError(
            f"--haystack: no stretch of it makes a prompt of {cell.length} tokens; its text is lost in tokens"
        )

    def score(self, expected: str, prediction: str) -> dict[str, float]:
        return {"score": float(expected in prediction)}

    def _secret(self, cell: Cell) -> Secret:
        rng = self.rng(str(cell))
        key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        value = str(rng.randrange(10 ** (self.digits - 1), 10**self.digits))
        first = self.rng(cell.square).randrange(len(self.starts))
        return Secret(key, value, self.start(cell, first))

    def _context(self, secret: Secret, room: int, depth: float) -> str:
        around = self.hay.window(secret.start, room)
        point = split_point(around, depth, self.hay.ends)
        before, after = self.hay.decode(around[:point]).strip(), self.hay.decode(around[point:]).strip()
        return " ".join(part for part in (before, secret.sentence, after) if part)

    def _render(self, secret: Secret, context: str) -> list[int]:
        return self.render(self.template.format(context=context, key=secret.key), self.prefix.format(key=secret.key))


class Sandwich(Style):
    """The San Francisco sandwich. 200 tokens of the context length are left for its wording, as in the first test.

    Sample 0 begins where the haystack begins and is that test's own; others begin at other sentences.
    """

    name = label = "sandwich"
    needle = "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n"
    expected = "eat a sandwich and sit in Dolores Park on a sunny day."
    buffer = 200
    max_new_tokens = 30
    plain_wording = (
        "<|im_start|> This is a very long story book: <book> {context} </book>.\n Based on the content of the book, "
        "Question: The best thing to do in San Francisco is: ",
        "\nAnswer:",
    )
    chat_wording = (
        "This is a very long story book: <book> {context} </book>.\n Based on the content of the book, "
        "Question: What is the best thing to do in San Francisco?",
        "The best thing to do in San Francisco is",
    )

    def __init__(self, hay: TokenizedHaystack, chat: Chat | None, seed: int, digits: int | None) -> None:
        super().__init__(hay, chat, seed)
        if digits is not None:
            raise UserError("--digits is a setting of the needle style 'number'; the sandwich has none")
        # Imported here because it takes half a second, which no other command has to wait for.
        from rouge_score.rouge_scorer import RougeScorer

        self._rouge = RougeScorer(["rouge1"], use_stemmer=True)
        self._needle_ids = self.hay.encode(self.needle)
        self.stop_ids = frozenset(self.hay.encode("\n")[-1:])
        self.shortest = self.buffer + len(self._needle_ids) + LEAST_CONTEXT

    def facts(self, cell: Cell) -> dict[str, Any]:
        return {"expected": self.expected, "haystack_start": self.start(cell, first=0)}

    def prompt_ids(self, cell: Cell) -> list[int]:
        around = self.hay.window(self.start(cell, first=0), cell.length)
        ids = insert_needle(around, self._needle_ids, cell.depth, self.hay.stops, cell.length - self.buffer)
        text, prefix = self.chat_wording if self.chat else self.plain_wording
        return self.render(text.format(context=self.hay.decode(ids)), prefix)

    def score(self, expected: str, prediction: str) -> dict[str, float]:
        words = set(expected.lower().split())
        recall = len(words & set(prediction.lower().split())) / len(words)
        return {"score": recall, "rouge1": self._rouge.score(self.needle, prediction)["rouge1"].fmeasure}


STYLES: dict[str, Callable[[TokenizedHaystack, Chat | None, int, int | None], Style]] = {
    Number.name: Number,
    Sandwich.name: Sandwich,
}
