"""What is hidden in a haystack, how it is asked for and how the answer is scored: what a style is, and the numbers."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol

from kvfactory.benchmarks.haystack import TokenizedHaystack, split_point
from kvfactory.benchmarks.ruler_haystacks import Needle, niah_wording
from kvfactory.chat import Message
from kvfactory.errors import UserError, require


class Chat(Protocol):
    """Wraps the text of a user's turn for an instruct model: `kvfactory.chat.chat_ids` with a tokenizer in place."""

    def __call__(self, text: str, answer_prefix: str, earlier: Sequence[Message] = ()) -> list[int]:
        """Token ids of the prompt, which ends with the beginning of the answer; `earlier` turns come first."""


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
    settings: ClassVar[tuple[str, ...]] = ()
    """Flags that belong to this style; its constructor takes them by name."""
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
    def answers(self, cell: Cell) -> list[str]:
        """What is looked for, one text a needle."""

    @abstractmethod
    def facts(self, cell: Cell) -> dict[str, Any]:
        """What the result row says about what is hidden; JSON-able."""

    @abstractmethod
    def prompt_ids(self, cell: Cell) -> list[int]:
        """Token ids of the cell's prompt."""

    @classmethod
    @abstractmethod
    def score(cls, answers: Sequence[str], prediction: str) -> dict[str, float]:
        """Named scores in [0, 1] of a prediction, given the `answers` of its cell."""

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
        return Needle("numbers", self.key, self.value).sentence


class Number(Style):
    """A number for a key, worded as RULER's niah_single_2. The whole prompt is as long as the context length says.

    Several needles are spread from the cell's depth to the end in equal steps, as in the first multi-needle test, and all
    asked for in one question, worded as RULER's niah_multiquery; the first of them is the one a single needle would be.
    """

    name = "number"
    settings = ("digits", "needles")

    def __init__(
        self, hay: TokenizedHaystack, chat: Chat | None, seed: int, *, digits: int = 4, needles: int = 1
    ) -> None:
        super().__init__(hay, chat, seed)
        require(digits >= 1, f"--digits {digits}: a number has at least 1")
        require(needles >= 1, f"--needles {needles}: at least 1 is hidden")
        most = min(9 * 10 ** (digits - 1), len(ADJECTIVES) * len(NOUNS))
        require(needles <= most, f"--needles {needles}: no more than {most} can differ with --digits {digits}")
        self.digits, self.needles = digits, needles
        several = needles > 1
        self.label = f"{self.name}{digits}x{needles}" if several else f"{self.name}{digits}"
        longest = "-".join(max(words, key=lambda word: len(hay.encode(f"-{word}"))) for words in (ADJECTIVES, NOUNS))
        # A blank, a colon or a quote may come before a number; of several each may be given with its key.
        self.max_new_tokens = needles * (digits + 6 + several * len(hay.encode(f" {longest}")))
        widest = [Secret(longest, "9" * digits, 0)] * needles
        self.shortest = self._frame(widest) + LEAST_CONTEXT

    def answers(self, cell: Cell) -> list[str]:
        return [secret.value for secret in self._secrets(cell)]

    def facts(self, cell: Cell) -> dict[str, Any]:
        secrets = self._secrets(cell)
        common = {"digits": self.digits, "haystack_start": secrets[0].start}
        if self.needles == 1:
            return {"key": secrets[0].key, "expected": secrets[0].value, **common}
        places = zip(secrets, self._depths(cell), strict=True)
        return {
            "needles": [{"key": each.key, "value": each.value, "depth_percent": depth} for each, depth in places],
            **common,
        }

    def prompt_ids(self, cell: Cell) -> list[int]:
        secrets = self._secrets(cell)
        room = cell.length - self._frame(secrets)
        for _ in range(ATTEMPTS):
            ids = self._render(secrets, self._context(secrets, room, self._depths(cell)))
            if cell.length - SLACK <= len(ids) <= cell.length:
                return ids
            room -= len(ids) - cell.length  # where texts meet, tokens merge anew
        raise UserError(
            f"--haystack: no stretch of it makes a prompt of {cell.length} tokens; its text is lost in tokens"
        )

    @classmethod
    def score(cls, answers: Sequence[str], prediction: str) -> dict[str, float]:
        return {"score": sum(value in prediction for value in answers) / len(answers)}

    def _secrets(self, cell: Cell) -> list[Secret]:
        """As many as there are needles; no two share a key or a value."""
        rng = self.rng(str(cell))
        first = self.rng(cell.square).randrange(len(self.starts))
        values: dict[str, str] = {}
        while len(values) < self.needles:
            key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
            value = str(rng.randrange(10 ** (self.digits - 1), 10**self.digits))
            if value not in values.values():
                values.setdefault(key, value)
        return [Secret(key, value, self.start(cell, first)) for key, value in values.items()]

    def _depths(self, cell: Cell) -> list[float]:
        """The depth of each needle, in percent: all at the end where the cell's own is 100."""
        return [cell.depth + i * (100 - cell.depth) / self.needles for i in range(self.needles)]

    def _context(self, secrets: Sequence[Secret], room: int, depths: Sequence[float]) -> str:
        """`room` tokens of haystack with the secrets in them."""
        around = self.hay.window(secrets[0].start, room)
        points = [split_point(around, depth, self.hay.ends) for depth in depths]
        first, *others = (self.hay.decode(around[i:j]).strip() for i, j in pairwise([0, *points, len(around)]))
        parts = [
            first,
            *(part for secret, after in zip(secrets, others, strict=True) for part in (secret.sentence, after)),
        ]
        return " ".join(filter(None, parts))

    def _frame(self, secrets: Sequence[Secret]) -> int:
        """Tokens of a prompt that has no haystack in it."""
        return len(self._render(secrets, " ".join(secret.sentence for secret in secrets)))

    def _render(self, secrets: Sequence[Secret], context: str) -> list[int]:
        *keys, last = (secret.key for secret in secrets)
        query = f"{', '.join(keys)}, and {last}" if keys else last
        text, prefix = niah_wording("numbers", query, self.needles)
        return self.render(text.replace("{context}", context), prefix)
