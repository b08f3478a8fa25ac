"""TOVA: keep what the last query attends to, and let go of one token a step (arXiv 2401.06104).

Attention is averaged over all query heads, so that every head of a layer keeps the same tokens. The prompt is cut by its
last query, and each step while decoding by its own, once it has attended.

References differ: the authors protect nothing, and the newest token may be the one that goes, which is the default here;
kvpress always keeps it (`recent_size=1`). Where an allocator gives the heads of a layer different budgets, each head goes
by its own group's attention while decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvfactory import LayerContext, TrackingMethod, at_least, hookimpl, reduce_groups
from kvfactory.hookspecs import RegisterMethod


@dataclass(frozen=True, kw_only=True)
class TOVA(TrackingMethod):
    """Keeps the tokens that the last query attends to most, averaged over heads."""

    reads: ClassVar[str] = "the last query"

    gqa_score_agg: Literal["mean", "max", "sum"] = "mean"
    """How the attention of all query heads of a layer becomes one."""
    recent_size: int = 0
    """Last tokens, always kept."""
    decode_budget: int | Literal["same"] | None = "same"

    def __post_init__(self) -> None:
        at_least(self, recent_size=0)
        super().__post_init__()

    def protected(self) -> tuple[int, int]:
        return 0, self.recent_size

    def track_prompt(self, layer: LayerContext) -> Tensor:
        """The last query's attention as all heads share it, [stored heads, tokens]."""
        return self.over_heads(layer.window_attention(1)[:, 0], self.stored_heads(layer))

    def track_step(self, state: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
        return self.over_heads(weights[:, :, -1].flatten(0, 1), len(state))

    def value(self, state: Tensor, positions: Tensor) -> Tensor:
        return state

    def over_heads(self, attention: Tensor, heads: int) -> Tensor:
        """[query_heads, tokens] -> [heads, tokens], all rows alike."""
        return reduce_groups(attention, 1, self.gqa_score_agg).expand(heads, -1)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("tova", attention=TOVA)
