"""What a runner iterates over: examples, their prompts and their scores. No command line, no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


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
    info: dict[str, Any] = field(default_factory=dict)
    """JSON-able facts that are copied into the result row: depth, length, all_classes, ..."""


class Benchmark(ABC):
    """A set of examples and its metric."""

    name: ClassVar[str]

    @abstractmethod
    def examples(self) -> Sequence[Example]:
        """All examples, in a fixed order."""

    @abstractmethod
    def prompt_ids(self, example: Example) -> list[int]:
        """Token ids of the example's prompt, special tokens and chat template included."""

    @abstractmethod
    def score(self, example: Example, prediction: str) -> dict[str, float]:
        """Named scores in [0, 1]; `score` is the one that tables show."""
