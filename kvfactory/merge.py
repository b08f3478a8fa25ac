"""Merging: what evicted entries leave behind in those that stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from .parts import Part


@dataclass(frozen=True, kw_only=True)
class Merge(Part, ABC):
    """Adds evicted entries to kept ones; its dataclass fields are settings, as a method's are.

    Works at each eviction, after the prompt and while decoding, whichever method chose what stays.
    """

    @property
    def prompt_only(self) -> bool:
        """Whether this is for the end of a prompt alone, and refused where a method evicts while decoding."""
        return False

    @abstractmethod
    def merge(self, keys: Tensor, values: Tensor, kept: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The kept entries, with what the others leave in them: keys and values [heads, count, head_dim].

        Given are all entries [heads, tokens, head_dim], the kept index [heads, count], ascending, and the scores
        [heads, tokens], float32, by which it was chosen. What was given is left as it is.
        """
