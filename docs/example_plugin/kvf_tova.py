"""TOVA: hold a fixed number of tokens, and let go of those the newest query looks at least (arXiv 2401.06104).

The attention weights of one query are averaged over all heads of a layer, so that all its heads keep the same tokens. The
last query of the prompt cuts the cache down to the budget; from then on each step's query evicts one token.

One deviation, shared with kvpress: the authors may evict the newest token itself, and here it stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfactory import AttentionScoredMethod, DenseStore, LayerContext, Store, hookimpl, reduce_groups, require
from kvfactory.hookspecs import RegisterMethod


@dataclass(frozen=True, kw_only=True)
class Tova(AttentionScoredMethod):
    """Keeps what the newest query attends to most, in all heads alike, while decoding too."""

    def protected(self) -> tuple[int, int]:
        return 0, 1

    def score(self, layer: LayerContext) -> Tensor:
        attention = layer.window_attention(1)[:, -1]
        return reduce_groups(attention, 1, self.gqa_score_agg).expand(layer.kv_heads, -1)

    def store(self, layer: LayerContext, kept: Tensor | list[Tensor]) -> Store:
        require(isinstance(kept, Tensor), "tova keeps the same tokens in all heads; choose another --allocator")
        assert isinstance(kept, Tensor)
        capacity = kept.shape[1] if layer.num_tokens > self.budget else self.budget
        return TovaStore(*layer.gather(kept), kept.int(), capacity, self.gqa_score_agg)


class TovaStore(DenseStore):
    """Evicts after each step, down to its capacity, what the newest query attended to least."""

    observes = True

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, capacity: int, gqa_score_agg: str) -> None:
        super().__init__(keys, values, positions)
        self._capacity = capacity
        self._gqa_score_agg = gqa_score_agg

    def observe(self, weights: Tensor | list[Tensor]) -> None:
        assert isinstance(weights, Tensor)
        length = weights.shape[-1]
        if length <= self._capacity:
            return
        older = reduce_groups(weights[:, -1], 1, self._gqa_score_agg)[0, :-1]
        best = older.argsort(descending=True, stable=True)[: self._capacity - 1].sort().values
        kept = torch.cat([best, best.new_tensor([length - 1])])
        self.keep(kept.expand(len(self.lengths()), -1))


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("tova", attention=Tova)
