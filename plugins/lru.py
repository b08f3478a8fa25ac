"""LRU: evict the token that was least recently attended to strongly, as a cache of pages would.

A query accesses the `access_size` tokens that get most of its attention, and its own. The token whose latest access lies
furthest back goes first; among those accessed last by one query the one with the least attention so far, then the oldest.
Each of the prompt's last `window_size` queries counts as a step; tokens that none of them accessed go before all others.
With an `access_size` of the budget or more, every entry is accessed at every step, and attention alone decides.

The thesis that this baseline comes from stamps tokens when they are inserted and never again, which is first in, first
out, and leaves the choice among prompt tokens to the sort's order; its idea is implemented here, its code is not. That a
new token counts as accessed does not protect it from others accessed at that step: `recent_size` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvfactory import LayerContext, TrackingMethod, at_least, hookimpl, reduce_groups
from kvfactory.hookspecs import RegisterMethod
from kvfactory.indexing import largest


@dataclass(frozen=True, kw_only=True)
class LRU(TrackingMethod):
    """Keeps the tokens that were accessed last, beside the first and the most recent ones."""

    reads: ClassVar[str] = "the window's queries"

    access_size: int = 32
    """Tokens that a query accesses: those that get most of its attention."""
    window_size: int = 32
    """Queries at the end of the prompt whose accesses count."""
    sink_size: int = 4
    """First tokens, always kept."""
    recent_size: int = 1
    """Last tokens, always kept."""
    decode_budget: int | Literal["same"] | None = "same"

    def __post_init__(self) -> None:
        at_least(self, access_size=1, window_size=1, sink_size=0, recent_size=0)
        super().__post_init__()

    def protected(self) -> tuple[int, int]:
        return self.sink_size, self.recent_size

    def track_prompt(self, layer: LayerContext) -> Tensor:
        """The position of the query that accessed each entry last, -1 if none did, and the attention it got so far:
        [stored heads, tokens, 2], float32."""
        window = layer.window_attention(min(self.window_size, layer.num_tokens))
        attention = self.per_stored_head(layer, window)
        never = attention.new_tensor([-1.0, 0.0]).expand(len(attention), layer.num_tokens, 2)
        return self.accessed(never, attention, layer.positions)

    def track_step(self, state: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
        return self.accessed(state, reduce_groups(weights.flatten(0, 1), len(state), self.gqa_score_agg), positions)

    def accessed(self, state: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        """The state after queries, those of the last entries, whose attention is [stored heads, queries, tokens]."""
        queries, tokens = attention.shape[1:]
        hits = largest(attention, self.access_size) & (attention > 0)
        hits.diagonal(tokens - queries, 1, 2).fill_(True)
        latest = torch.where(hits, positions[:, -queries:, None].float(), -1.0).amax(1)
        last_access, mass = state.unbind(-1)
        return torch.stack([last_access.maximum(latest), mass + attention.sum(1)], -1)

    def value(self, state: Tensor, positions: Tensor) -> Tensor:
        """Ranks, 0 for what goes first: a float32 has no room for both an access and what decides between equals."""
        last_access, mass = state.unbind(-1)
        by_mass = mass.argsort(stable=True)
        by_access = by_mass.gather(1, last_access.gather(1, by_mass).argsort(stable=True))
        return by_access.argsort().float()


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("lru", attention=LRU)
