"""Kinds of scores that come from attention: by query heads, by a window of queries, or by a record of each entry."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from .context import LayerContext, reduce_groups
from .decoding import BoundedStore, TrackingStore
from .errors import at_least
from .eviction import EvictionMethod
from .stores import Store


@dataclass(frozen=True, kw_only=True)
class AttentionScoredMethod(EvictionMethod):
    """An eviction method whose scores come from attention, of which each query head has its own."""

    gqa_score_agg: Literal["mean", "max", "sum"] = "mean"
    """How the scores of the query heads that share a KV head become one."""

    def per_stored_head(self, layer: LayerContext, scores: Tensor) -> Tensor:
        """[query_heads, ...] -> [stored heads, ...], reduced over the query heads that share a KV head."""
        return reduce_groups(scores, self.stored_heads(layer), self.gqa_score_agg)


@dataclass(frozen=True, kw_only=True)
class WindowMethod(EvictionMethod):
    """An eviction method that scores tokens by the last few queries, whose own tokens are always kept."""

    reads: ClassVar[str] = "the window's queries"

    window_size: int = 8
    """Observation window: the last queries, which score the tokens before them and whose own are always kept."""

    def __post_init__(self) -> None:
        at_least(self, window_size=1)
        super().__post_init__()

    @property
    def recent_queries(self) -> int:
        return self.window_size

    def protected(self) -> tuple[int, int]:
        return 0, self.window_size


@dataclass(frozen=True, kw_only=True)
class TrackingMethod(AttentionScoredMethod):
    """A method that keeps a record of each entry, to which the attention of every query adds.

    A record is one slice of a state [stored heads, tokens, ...], of any type and shape beyond the tokens. Entries that are
    evicted take theirs with them; those of new tokens start as zeros.
    """

    @abstractmethod
    def track_prompt(self, layer: LayerContext) -> Tensor:
        """The state after the prompt."""

    @abstractmethod
    def track_step(self, state: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
        """The state after another step, whose new tokens are in it already.

        Weights are [stored heads, group, new tokens, tokens], float32, positions [heads or 1, tokens].
        """

    @abstractmethod
    def value(self, state: Tensor, positions: Tensor) -> Tensor:
        """Scores of a state, [stored heads, tokens], float32."""

    def score(self, layer: LayerContext) -> Tensor:
        return self.value(self.tracked(layer), layer.positions)

    def tracked(self, layer: LayerContext) -> Tensor:
        """`track_prompt`, computed once for scores and stores."""
        return layer.shared(self.state_key(), lambda: self.track_prompt(layer))

    def state_key(self) -> tuple[Any, ...]:
        """What a layer knows the state by."""
        return "tracked", *self._score_key

    def decoding_store(self, layer: LayerContext, kept: Tensor) -> Store:
        return TrackingStore(layer, kept, self)

    def open_store(self, layer: LayerContext, kept: Tensor) -> BoundedStore:
        return TrackingStore(layer, kept, self._for_prompts_alone())

    def grouped(self, layer: LayerContext, attention: Tensor) -> Tensor:
        """[query_heads, ...] -> [stored heads, group, ...]."""
        return attention.unflatten(0, (self.stored_heads(layer), -1))
