"""Weighted: add each evicted entry to the kept one with the most similar key, weighted by that similarity.

This is what KVCache-Factory calls `weighted`, its default here: the weight is the cosine moved to 0..1, a kept entry counts
1, and the sum is divided by its weights. LOOK-M's WeightedMerge (arXiv 2406.18139) is another rule, `weighted_rule=look-m`:
it weighs by the cosine itself but divides by the number of entries, which shrinks them, and leaves out evicted entries less
similar than the average one. It judges the n-th evicted entry of all heads at once, by their mean; where heads keep
different numbers each comes alone, and the mean is its own. KVMerger's rule (arXiv 2407.08454) is the merge `kvmerger`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvfactory import Merge, hookimpl
from kvfactory.hookspecs import RegisterMerge
from kvfactory.indexing import entries, evicted

from .merge_pivot import nearest


@dataclass(frozen=True, kw_only=True)
class Weighted(Merge):
    """Adds what is evicted to the most similar of what stays, with a weight."""

    weighted_rule: Literal["kvcache-factory", "look-m"] = "kvcache-factory"
    """Weights that add up to 1, or LOOK-M's."""

    def merge(self, keys: Tensor, values: Tensor, kept: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        gone = evicted(kept, keys.shape[1])
        weight, target = nearest(keys, kept, gone)
        if self.weighted_rule == "look-m":
            over_heads = weight.mean(0)
            similar = over_heads >= over_heads.mean()
            gone, weight, target = gone[:, similar], weight[:, similar], target[:, similar]
            counts_as = torch.ones_like(weight)
        else:
            counts_as = weight = ((weight + 1) / 2).clamp(min=1e-6)
        total = torch.ones_like(kept, dtype=torch.float32).scatter_add(1, target, counts_as)

        def merged(x: Tensor) -> Tensor:
            return (weighted_sums(x, kept, gone, target, weight) / total[..., None]).to(x.dtype)

        return merged(keys), merged(values)


def weighted_sums(x: Tensor, kept: Tensor, gone: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The kept entries of x, each with the evicted ones added whose target it is, times their weights; float32."""
    arriving = weight[..., None] * entries(x, gone).float()
    return entries(x, kept).float().scatter_add(1, target[..., None].expand_as(arriving), arriving)


@hookimpl
def kvfactory_register_merges(register: RegisterMerge) -> None:
    register("weighted", Weighted)
