"""What a plugin writes: a `Method`, or far more often an `EvictionMethod`, which only has to score tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .budget import BudgetAllocator, Uniform
from .context import LayerContext, reduce_groups
from .errors import UserError
from .stores import DenseStore, RaggedStore, Store, spread


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A policy: looks at one layer after its prefill and answers with what that layer keeps.

    Stateless. Its dataclass fields are its settings: they become command-line flags and are written in every result row.
    """

    memory: ClassVar[Literal["physical", "nominal"]] = "physical"
    """`nominal` marks a method that masks entries and holds all of them."""
    aliases: ClassVar[dict[str, str]] = {}
    """Names that other programs use for a setting, and this one's."""

    @abstractmethod
    def compress(self, layer: LayerContext) -> Store:
        """What the layer keeps; its full keys and values are dropped afterwards."""

    def settings(self) -> dict[str, Any]:
        """All settings by name, those of the allocator among them."""
        flat: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, BudgetAllocator):
                flat["allocator"] = value.name
                flat |= {inner.name: getattr(value, inner.name) for inner in fields(value)}
            else:
                flat[each.name] = value
        return flat


@dataclass(frozen=True, kw_only=True)
class EvictionMethod(Method):
    """Keeps the tokens that score best, at the end of prefill, beside those it protects.

    A subclass writes `score`, and `protected` if some tokens are always kept. Every allocator works with every score.
    """

    budget: int
    """KV entries kept per stored head and layer after prefill, protected ones included."""
    kv_cache_granularity: Literal["kv_head", "query_head"] = "kv_head"
    """Entries are chosen and stored once per KV head, or once per query head (as published figures often are)."""
    allocator: BudgetAllocator = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        needed = sum(self.protected())
        if self.budget <= needed:
            raise UserError(
                f"budget {self.budget} leaves {type(self).__name__} nothing to choose: "
                f"it always keeps {needed} tokens; give --max_capacity_prompts more than {needed}"
            )

    @abstractmethod
    def score(self, layer: LayerContext) -> Tensor:
        """Scores [stored heads or kv_heads, prompt tokens], float32, higher is kept; protected tokens' do not matter.

        Must not depend on `budget` or `allocator`: a sweep scores once for all of them.
        """

    def protected(self) -> tuple[int, int]:
        """How many of the first and of the last tokens are always kept."""
        return 0, 0

    def store(self, layer: LayerContext, kept: Tensor | list[Tensor]) -> Store:
        """The store of the kept positions, ascending: [stored heads, count], or a list where heads keep different numbers.

        A method that acts while decoding returns a store of its own.
        """
        if isinstance(kept, Tensor):
            return DenseStore(*layer.gather(kept), kept.int())
        group = len(kept) // layer.kv_heads
        return RaggedStore(
            [layer.keys[head // group, index] for head, index in enumerate(kept)],
            [layer.values[head // group, index] for head, index in enumerate(kept)],
            [index.int() for index in kept],
        )

    def compress(self, layer: LayerContext) -> Store:
        tokens = torch.arange(layer.num_tokens, device=layer.keys.device)
        if layer.num_tokens <= self.budget:
            return self.store(layer, tokens.expand(self.stored_heads(layer), -1))
        first, last = self.protected()
        counts = self._counts(layer, first, last)
        ranked = self._ranked(layer, first, last)
        sinks, window = tokens[:first], tokens[layer.num_tokens - last :]
        if len(set(counts)) == 1:
            chosen = ranked[:, : counts[0]].sort(-1).values
            return self.store(
                layer, torch.cat([sinks.expand(len(ranked), -1), chosen, window.expand(len(ranked), -1)], 1)
            )
        heads = zip(ranked, counts, strict=True)
        return self.store(layer, [torch.cat([sinks, head[:count].sort().values, window]) for head, count in heads])

    def stored_heads(self, layer: LayerContext) -> int:
        return layer.kv_heads if self.kv_cache_granularity == "kv_head" else layer.query_heads

    def _counts(self, layer: LayerContext, first: int, last: int) -> list[int]:
        return self.allocator.counts(
            self._scores(layer)[:, first : layer.num_tokens - last],
            budget=self.budget,
            protected=first + last,
            layer_index=layer.layer_index,
            num_layers=layer.num_layers,
        )

    def _scores(self, layer: LayerContext) -> Tensor:
        return layer.shared(self._score_key(), lambda: spread(self.score(layer), self.stored_heads(layer)))

    def _ranked(self, layer: LayerContext, first: int, last: int) -> Tensor:
        """Competing tokens from best to worst, ties by position, [stored heads, competing tokens]."""

        def rank() -> Tensor:
            competing = self._scores(layer)[:, first : layer.num_tokens - last]
            return competing.argsort(dim=-1, descending=True, stable=True) + first

        return layer.shared(("ranked", self._score_key(), first, last), rank)

    def _score_key(self) -> tuple[Any, ...]:
        values = (getattr(self, each.name) for each in fields(self) if each.name not in ("budget", "allocator"))
        return type(self).score, *values


@dataclass(frozen=True, kw_only=True)
class AttentionScoredMethod(EvictionMethod):
    """An eviction method whose scores come from attention, of which each query head has its own."""

    gqa_score_agg: Literal["mean", "max", "sum"] = "mean"
    """How the scores of the query heads that share a KV head become one."""

    def per_stored_head(self, layer: LayerContext, scores: Tensor) -> Tensor:
        """[query_heads, ...] -> [stored heads, ...], reduced over the query heads that share a KV head."""
        return reduce_groups(scores, self.stored_heads(layer), self.gqa_score_agg)
