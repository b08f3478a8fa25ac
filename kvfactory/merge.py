"""Merging: what evicted entries leave behind in those that stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
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


def evicted(kept: Tensor, tokens: int) -> Tensor:
    """The index of what is not kept, [heads, tokens - count], ascending, from that of what is, [heads, count]."""
    gone = torch.ones(len(kept), tokens, dtype=torch.bool, device=kept.device).scatter(1, kept, False)
    return gone.nonzero()[:, 1].view(len(kept), -1)


def entries(x: Tensor, index: Tensor) -> Tensor:
    """Those entries of x [heads, tokens, ...] that index [heads, count] names, [heads, count, ...]."""
    wide = index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])
    return x.gather(1, wide)
