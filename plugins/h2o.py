"""H2O: keep the heavy hitters, the tokens that got most attention so far, and the most recent ones (arXiv 2306.14048).

A token's score is the attention it got from all queries of the prompt, summed. Half of the budget goes to heavy hitters
and half to recent tokens, as in the paper (heavy_ratio = recent_ratio); `recent_size` fixes the latter in tokens.

References differ: KVCache-Factory keeps only its last 8 tokens as recent (`recent_size=8`), and evicts at the end of the
prompt alone, which is the default here. The authors go on scoring and evicting one token a step while they decode
(`evict_while_decoding`): attention first, then the scores, then the eviction, as in their real-drop code; their masked
simulation hides one position more than it says and is not reproduced. kvpress divides a score by the number of queries
that could see the token (`average_over_queries`), which takes away the head start of early ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfactory import AttentionScoredMethod, DenseStore, LayerContext, Store, hookimpl, reduce_groups, require
from kvfactory.hookspecs import RegisterMethod


@dataclass(frozen=True, kw_only=True)
class H2O(AttentionScoredMethod):
    """Keeps the tokens with the largest accumulated attention beside the most recent ones."""

    aliases: ClassVar[dict[str, str]] = {"window_size": "recent_size"}

    heavy_ratio: float = 0.5
    """Part of the budget for heavy hitters, in proportion to `recent_ratio`."""
    recent_ratio: float = 0.5
    """Part of the budget for recent tokens, in proportion to `heavy_ratio`."""
    recent_size: int | None = None
    """Recent tokens kept, in place of the ratios."""
    average_over_queries: bool = False
    """Divide each score by the number of queries that could see the token."""
    evict_while_decoding: bool = False
    """Hold the budget while decoding: each step adds its attention to the scores and evicts."""

    def __post_init__(self) -> None:
        require(
            self.heavy_ratio >= 0 and self.recent_ratio >= 0 and self.heavy_ratio + self.recent_ratio > 0,
            f"--heavy_ratio {self.heavy_ratio} and --recent_ratio {self.recent_ratio} must be 0 or more, and not both 0",
        )
        require(
            self.recent_size is None or self.recent_size >= 0, f"--recent_size is {self.recent_size}; it is 0 or more"
        )
        super().__post_init__()

    def recent(self) -> int:
        if self.recent_size is not None:
            return self.recent_size
        # a whole share of recent tokens would leave no heavy hitter to choose
        return min(int(self.budget * self.recent_ratio / (self.heavy_ratio + self.recent_ratio)), self.budget - 1)

    def protected(self) -> tuple[int, int]:
        return 0, self.recent()

    def score(self, layer: LayerContext) -> Tensor:
        mass = layer.attention_mass()
        if self.average_over_queries:
            mass = mass / torch.arange(layer.num_tokens, 0, -1, device=mass.device)
        return self.per_stored_head(layer, mass)

    def store(self, layer: LayerContext, kept: Tensor | list[Tensor]) -> Store:
        if not self.evict_while_decoding:
            return super().store(layer, kept)
        require(
            isinstance(kept, Tensor),
            "--evict_while_decoding holds one budget for all heads of a layer; choose an allocator that gives them one",
        )
        assert isinstance(kept, Tensor)
        mass = layer.attention_mass().unflatten(0, (len(kept), -1))
        mass = mass.gather(2, kept[:, None].expand(-1, mass.shape[1], -1))
        capacity = kept.shape[1] if layer.num_tokens > self.budget else self.budget
        return HeavyHitterStore(*layer.gather(kept), kept.int(), mass, capacity, self)


class HeavyHitterStore(DenseStore):
    """Adds each step's attention to the scores, then evicts down to the budget."""

    observes = True

    def __init__(
        self, keys: Tensor, values: Tensor, positions: Tensor, mass: Tensor, capacity: int, method: H2O
    ) -> None:
        """`mass` [heads, group, length], float32: the attention each entry got from each query head."""
        super().__init__(keys, values, positions)
        self._mass = mass
        self._capacity = capacity
        self._method = method

    def observe(self, weights: Tensor | list[Tensor]) -> None:
        assert isinstance(weights, Tensor)
        got = weights.sum(1).unflatten(0, self._mass.shape[:2])
        self._mass = pad(self._mass, (0, got.shape[-1] - self._mass.shape[-1])) + got
        if self._length > self._capacity:
            self._evict()

    def _evict(self) -> None:
        recent = min(self._method.recent(), self._capacity - 1)
        scores = reduce_groups(self._mass.flatten(0, 1), self._mass.shape[0], self._method.gqa_score_agg)
        if self._method.average_over_queries:
            positions = self._all_positions()
            scores = scores / (positions[:, -1:] + 1 - positions)
        heavy = scores[:, : self._length - recent].argsort(dim=-1, descending=True, stable=True)
        heavy = heavy[:, : self._capacity - recent].sort(-1).values
        latest = torch.arange(self._length - recent, self._length, device=heavy.device).expand(len(heavy), -1)
        index = torch.cat([heavy, latest], 1)
        self._mass = self._mass.gather(2, index[:, None].expand(-1, self._mass.shape[1], -1))
        self.keep(index)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("h2o", attention=H2O)
