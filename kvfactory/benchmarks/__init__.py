"""What a runner iterates over: examples, their prompts and their scores. No command line, no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """One question; cheap to make, since a resumed run makes all of them and runs only what is missing."""

    id: str
    """Unique in the run and the same every time, e.g. `hotpotqa/3f2a` or `512/depth50/7`."""
    group: str
    """The row of the results table it belongs to: a dataset, a context length."""
    answers: list[str]
    max_new_tokens: int
    min_new_tokens: int = 0
    """Stop tokens cannot be chosen before this many tokens."""
    stop_ids: frozenset[int] = frozenset()
    """Stop tokens beside the model's own."""
    context: str | None = None
    """Examples that follow each other and name the same context have the same prompt: it is compressed once for all."""
    after: str | None = None
    """The id of the example whose turn comes before: this one goes on with its cache and has no prompt of its own."""
    ability: float | None = None
    """The mean score that keeping everything must reach in this group for differences between methods to mean anything."""
    info: dict[str, Any] = field(default_factory=dict)
    """JSON-able facts that are copied into the result row: depth, length, all_classes, ..."""


class Benchmark(ABC):
    """A set of examples and its metric.

    An answer is generated and goes to `score`, unless the example has `target_ids`: then those are fed one by one, or
    all in one pass, and what the model thought of them goes to `measure`.
    """

    name: str
    """What rows and tables call it: what it is registered as, and behind a comma what tells its variants apart."""
    golden_turns: bool = False
    """Whether a turn that comes `after` another sees the first of its `answers` in place of what was generated."""
    one_pass: bool = False
    """Whether `target_ids` are read in one pass with the prompt; a method changes it by its own prompt attention alone."""

    @abstractmethod
    def examples(self) -> Sequence[Example]:
        """All examples, in a fixed order."""

    @abstractmethod
    def prompt_ids(self, example: Example) -> list[int]:
        """Token ids that are read and compressed, special tokens and chat template included."""

    def question_ids(self, example: Example) -> list[int]:
        """Token ids that are read once the prompt is compressed, or once the turn before has its answer; none if empty."""
        return []

    def target_ids(self, example: Example) -> list[int]:
        """Token ids that stand in the answer's place; none if the answer is generated."""
        return []

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Named scores in [0, 1] of a generated answer; `score` is the one that tables show."""
        raise NotImplementedError(f"{self.name} scores no generated answers")

    def measure(self, example: Example, losses: Sequence[float]) -> dict[str, float]:
        """Row fields from the negative log-likelihoods of the targets, in nats; in one pass, of all tokens but the first."""
        raise NotImplementedError(f"{self.name} has no targets")
