"""H2O: keep the heavy hitters, the tokens that got most attention so far, and the most recent ones (arXiv 2306.14048).

A token's score is the attention it got from all queries of the prompt, summed. Half of the budget goes to heavy hitters
and half to recent tokens, as in the paper (heavy_ratio = recent_ratio); `recent_size` fixes the latter in tokens.

References differ: KVCache-Factory keeps only its last 8 tokens as recent (`recent_size=8`), and evicts at the end of the
prompt alone, which is the default here. The authors go on scoring and evicting one token a step while they decode
(`decode_budget=same`): attention first, then the scores, then the eviction, as in their real-drop code; their masked
simulation hides one position more than it says and is not reproduced. kvpress divides a score by the number of queries
that could see the token (`average_over_queries`), which takes away the head start of early ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvfactory import LayerContext, TrackingMethod, at_least, hookimpl, reduce_groups, require
from kvfactory.hookspecs import RegisterMethod


@dataclass(frozen=True, kw_only=True)
class H2O(TrackingMethod):
    """Keeps the tokens with the largest accumulated attention beside the most recent ones."""

    reads: ClassVar[str] = "all queries"
    aliases: ClassVar[dict[str, str]] = {"window_size": "recent_size"}

    heavy_ratio: float = 0.5
    """Part of the budget for heavy hitters, in proportion to `recent_ratio`."""
    recent_ratio: float = 0.5
    """Part of the budget for recent tokens, in proportion to `heavy_ratio`."""
    recent_size: int | None = None
    """Recent tokens kept, in place of the ratios."""
    average_over_queries: bool = False
    """Divide each score by the number of queries that could see the token."""

    def __post_init__(self) -> None:
        at_least(self, recent_size=0)
        require(
            self.heavy_ratio >= 0 and self.recent_ratio >= 0 and self.heavy_ratio + self.recent_ratio > 0,
            f"--heavy_ratio {self.heavy_ratio} and --recent_ratio {self.recent_ratio} must be 0 or more, and not both 0",
        )
        super().__post_init__()

    def recent(self) -> int:
        if self.recent_size is not None:
            return self.recent_size
        assert isinstance(self.budget, int)
        # a whole share of recent tokens would leave no heavy hitter to choose
        return min(int(self.budget * self.recent_ratio / (self.heavy_ratio + self.recent_ratio)), self.budget - 1)

    def protected(self) -> tuple[int, int]:
        return 0, self.recent()

    def least_budget(self) -> int:
        return (self.recent_size or 0) + 1

    def track_prompt(self, layer: LayerContext) -> Tensor:
        """Attention that each entry got from each query head, [stored heads, tokens, group]."""
        return self.grouped(layer, layer.attention_mass()).transpose(1, 2)

    def track_step(self, state: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
        return state + weights.sum(2).transpose(1, 2)

    def value(self, state: Tensor, positions: Tensor) -> Tensor:
        mass = reduce_groups(state.transpose(1, 2).flatten(0, 1), len(state), self.gqa_score_agg)
        if self.average_over_queries:
            mass = mass / (positions[:, -1:] + 1 - positions)
        return mass


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("h2o", attention=H2O)
