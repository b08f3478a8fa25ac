"""How a budget is split: over layers (pyramid), over the heads of a layer (head-adaptive), or not at all (uniform).

An allocator sees the scores of the tokens that compete for a place, and says how many each stored head keeps. Tokens a
method protects (sinks, a recent window) are kept besides and are part of the budget.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import UserError, require
from .parts import Part


@dataclass(frozen=True)
class Share:
    """A budget that grows with the prompt: `Share(10)`, written 10%, is a tenth of its tokens, rounded down."""

    percent: float

    def __post_init__(self) -> None:
        require(0 < self.percent <= 100, f"{self}: a share of the prompt is more than 0% and at most 100%")

    @classmethod
    def read(cls, text: object) -> Share:
        """The share that a text such as `12.5%` means; ValueError for any other text."""
        if isinstance(text, Share):
            return text
        if not str(text).endswith("%"):
            raise ValueError(text)
        return cls(float(str(text)[:-1]))

    def of(self, tokens: int) -> int:
        return int(tokens * self.percent / 100)

    def __str__(self) -> str:
        return f"{self.percent:g}%"


def whole_shares(shares: Sequence[float], total: int) -> list[int]:
    """Shares as whole numbers that add up to the total: rounded down, and the largest remainders up, earlier ones first."""
    floors = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda each: floors[each] - shares[each])
    for each in by_remainder[: total - sum(floors)]:
        floors[each] += 1
    return floors


@dataclass(frozen=True, kw_only=True)
class BudgetAllocator(Part, ABC):
    """Splits a budget; its dataclass fields are settings, as a method's are."""

    @abstractmethod
    def counts(self, scores: Tensor, *, budget: int, protected: int, layer_index: int, num_layers: int) -> list[int]:
        """How many of the competing tokens each stored head keeps.

        Scores are [heads, competing tokens], float32; `budget` is entries per head, of which `protected` are kept anyway.
        """


@dataclass(frozen=True, kw_only=True)
class Uniform(BudgetAllocator):
    """Every head of every layer keeps the budget."""

    def counts(
        self,
        scores: Tensor,
        *,
        budget: int,
        protected: int,
        layer_index: int,
        num_layers: int,
    ) -> list[int]:
        heads, competing = scores.shape
        return [min(budget - protected, competing)] * heads


@dataclass(frozen=True, kw_only=True)
class Pyramid(BudgetAllocator):
    """Many entries in the first layers, few in the last, falling linearly (PyramidKV, arXiv 2406.02069).

    Schedules that go by one name differ; with b = budget - protected and T prompt tokens:
    - `exact`: real steps, rounded so that the mean over layers is the budget.
    - `kvcache-factory`: from 2b - b // beta down in integer steps; uniform while T < 2b. Integer steps lose their
      remainder, so that the mean over layers can exceed the budget (by up to 1.6 times for small budgets).
    - `never-uniform`: the same without the uniform case, as the authors of AdaKV have it.
    - `kvpress`: real steps, rounded, and the protected tokens taken out of each layer's share instead of added to it;
      uniform if the last layer would hold fewer than the protected tokens.
    """

    beta: float = 20
    """Steepness: the last layer keeps about 1/beta of the budget."""
    pyramid_schedule: Literal["exact", "kvcache-factory", "never-uniform", "kvpress"] = "exact"

    def __post_init__(self) -> None:
        if not self.beta >= 1:
            raise UserError(f"--beta is {self.beta}; a pyramid needs a beta of 1 (flat) or more")

    def counts(self, scores: Tensor, *, budget: int, protected: int, layer_index: int, num_layers: int) -> list[int]:
        heads, competing = scores.shape
        schedule = {
            "kvcache-factory": self._integer_steps,
            "never-uniform": self._integer_steps,
            "kvpress": self._rounded_steps,
            "exact": self._exact,
        }[self.pyramid_schedule]
        count = schedule(budget - protected, protected, competing, layer_index, num_layers)
        return [max(0, min(count, competing))] * heads

    def _integer_steps(self, base: int, protected: int, competing: int, layer: int, layers: int) -> int:
        short = self.pyramid_schedule == "kvcache-factory" and competing + protected < 2 * base
        if short or layers == 1:
            return base
        low = int(base // self.beta)
        high = 2 * base - low
        if high >= competing:
            low, high = 2 * base - competing, competing
        return high - layer * ((high - low) // (layers - 1))

    def _rounded_steps(self, base: float, protected: int, competing: int, layer: int, layers: int) -> int:
        low = base / self.beta
        high = 2 * base - low
        if high >= competing:
            low, high = 2 * base - competing, competing
        if layers == 1 or not competing + protected >= high >= low >= protected:
            return round(base) - protected
        return round(high - layer * (high - low) / (layers - 1)) - protected

    def _exact(self, base: int, protected: int, competing: int, layer: int, layers: int) -> int:
        if layers == 1:
            return base
        high = max(min(2 * base - base / self.beta, competing), base)
        step = 2 * (high - base) / (layers - 1)
        return whole_shares([high - each * step for each in range(layers)], layers * base)[layer]


@dataclass(frozen=True, kw_only=True)
class HeadAdaptive(BudgetAllocator):
    """The heads of a layer share one budget by what their scores are worth (AdaKV, arXiv 2407.11550).

    Two forms of the floor that guards a head against losing everything:
    - `blend`: AdaKV's own. A head's count is `count * (1 - floor) + int(base * floor)`, rounded half to even; the
      layer's total can miss heads * base by a few entries.
    - `guarantee`: kvpress's. Each head is sure of its best `int(base * floor)` tokens, the rest goes to the best scores of
      the layer; the total is exact.
    """

    floor: float = 0.2
    """Share of the budget that every head gets, 0 (all by score) to 1 (uniform)."""
    normalize: bool = True
    """Weigh a head's scores by the share of them that its best `base` tokens hold."""
    floor_rule: Literal["blend", "guarantee"] = "blend"

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise UserError(f"--floor is {self.floor}; it is a share from 0 to 1")

    @property
    def weighs_scores(self) -> bool:
        return self.normalize

    def counts(
        self,
        scores: Tensor,
        *,
        budget: int,
        protected: int,
        layer_index: int,
        num_layers: int,
    ) -> list[int]:
        heads, competing = scores.shape
        base = min(budget - protected, competing)
        ordered = scores.sort(dim=-1, descending=True, stable=True).values
        if self.normalize:
            require(
                bool((scores >= 0).all()),
                "--normalize weighs heads by shares of their scores, which takes scores of 0 or more; --normalize false",
            )
            total = ordered.sum(-1, keepdim=True)
            ordered = ordered * (
                ordered[:, :base].sum(-1, keepdim=True) / total.clamp(min=torch.finfo(total.dtype).tiny)
            )
        sure = int(base * self.floor)
        if self.floor_rule == "guarantee":
            ordered = ordered.clone()
            ordered[:, :sure] = torch.inf
        best = ordered.flatten().argsort(descending=True, stable=True)[: heads * base]
        won = torch.bincount(best // competing, minlength=heads)
        if self.floor_rule == "blend":
            won = torch.round(won * (1 - self.floor) + sure).long()
        return [min(count, competing) for count in won.tolist()]
