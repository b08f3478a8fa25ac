"""SnapKV: keep what the last queries of the prompt look at (arXiv 2404.14469).

The attention of an observation window over all keys is summed per key, reduced over the query heads that share a KV head,
and pooled so that neighbours of a hit stay with it. The window itself is always kept.

References differ in defaults: the authors' LongBench configurations use window 32, kernel 7, maxpool, KVCache-Factory's
runner window 8, kernel 7, maxpool. The latter is the default here, so that small budgets are not all window. The authors
store once per query head (`kv_cache_granularity=query_head`). kvpress pools before it reduces the group, KVCache-Factory
after; that is one and the same for avgpool with mean, and for the rest `pool_order=heads_first` is kvpress's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import pad

from kvfactory import AttentionScoredMethod, LayerContext, WindowMethod, hookimpl, pool, require
from kvfactory.hookspecs import RegisterMethod


@dataclass(frozen=True, kw_only=True)
class SnapKV(WindowMethod, AttentionScoredMethod):
    """Keeps the tokens that the last `window_size` queries attend to most."""

    kernel_size: int = 7
    """Width of the pooling, odd."""
    pooling: Literal["avgpool", "maxpool"] = "maxpool"
    pool_order: Literal["groups_first", "heads_first"] = "groups_first"
    """Pool the scores after the heads of a group became one, or before."""

    def __post_init__(self) -> None:
        require(
            self.kernel_size >= 1 and self.kernel_size % 2 == 1,
            f"--kernel_size is {self.kernel_size}; pooling keeps the length of its input only with an odd size of 1 or more",
        )
        super().__post_init__()

    def score(self, layer: LayerContext) -> Tensor:
        # the window's own columns are cut off before pooling, or its scores would leak into its neighbours
        votes = layer.window_attention(self.window_size).sum(1)[:, : -self.window_size]
        if self.pool_order == "heads_first":
            scores = self.per_stored_head(layer, pool(votes, self.kernel_size, self.pooling))
        else:
            scores = pool(self.per_stored_head(layer, votes), self.kernel_size, self.pooling)
        return pad(scores, (0, self.window_size))


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("snapkv", attention=SnapKV)
