"""KVMerger: melt runs of similar neighbours into their most attended token, closer keys weighing more (arXiv 2407.08454).

Consecutive tokens whose keys are alike, each with the next, form a merging set, whose pivot is its token of the highest
score. The members are averaged with Gaussian weights g_i = exp(-||k_p - k_i||^2 / 2 sigma^2), where sigma is
sum g_i / (sqrt(2) |S|).

In the paper the sets decide how much is compressed; here the method has decided what stays, and the sets say what becomes
of the rest. So the pivot is the best kept member, the evicted members merge into it, other kept members stay as they are,
and a set without a kept member leaves nothing. S is the pivot and the evicted members. The paper also spares the first two
layers and the last one; a merge is not told the layer.

The text leaves two things open. Sigma is defined by the weights that it defines: they start from the root mean square of
||k_p - k_i|| over S, and are updated once. A mean of weights is a plain number below 1 where keys of a real model are many
units apart: taken for a distance (`sigma=absolute`) it leaves no weight above 0, and nothing merges. So distances are
counted in that root mean square (`relative`). And the value weights carry the size of the set, to make up for attention to
entries that are gone; a re-implementation divides by it again, which is the default here and keeps values in the hull of
their set (`value_weights=mean`); with `sum`, which is the paper's, large sets drown the rest of the attention.
While decoding, neighbours are neighbours in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from kvfactory import Merge, hookimpl, require
from kvfactory.hookspecs import RegisterMerge
from kvfactory.indexing import entries, evicted

from .merge_weighted import weighted_sums


@dataclass(frozen=True, kw_only=True)
class KVMerger(Merge):
    """Merges evicted tokens into the best kept one of their run, by a Gaussian kernel."""

    similarity_threshold: float = 0.6
    """Neighbours whose keys have a larger cosine are of one merging set."""
    value_weights: Literal["mean", "sum"] = "mean"
    """Values are averaged as keys are, or multiplied by the size of their set too."""
    sigma: Literal["relative", "absolute"] = "relative"
    """Sigma is a multiple of the root mean square distance from the pivot, or a distance itself."""

    def __post_init__(self) -> None:
        require(
            -1 <= self.similarity_threshold <= 1,
            f"--similarity_threshold is {self.similarity_threshold}; a cosine is between -1 and 1",
        )

    def merge(self, keys: Tensor, values: Tensor, kept: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        gone = evicted(kept, keys.shape[1])
        sets = merging_sets(keys, self.similarity_threshold)
        pivot = best_member(sets, kept, scores).gather(1, entries(sets, gone))
        joins = pivot < kept.shape[1]
        pivot = pivot.where(joins, 0)  # those that join no set weigh nothing

        def at_pivots(start: float, arriving: Tensor) -> Tensor:
            """A start for each kept entry, and what arrives there on top of it."""
            return torch.full_like(kept, start, dtype=torch.float32).scatter_add(1, pivot, arriving)

        size = at_pivots(1, joins.float())
        apart = (entries(entries(keys, kept), pivot).float() - entries(keys, gone).float()).square().sum(-1) * joins
        mean_apart = (at_pivots(0, apart) / size).clamp(min=torch.finfo(torch.float32).tiny)
        relative = apart / mean_apart.gather(1, pivot)
        sigma = at_pivots(1, (-relative / 2).exp() * joins) / (2**0.5 * size)
        distance = relative if self.sigma == "relative" else apart
        weight = (-distance / (2 * sigma.square().gather(1, pivot))).exp() * joins
        total = at_pivots(1, weight)

        def merged(x: Tensor, total: Tensor) -> Tensor:
            return (weighted_sums(x, kept, gone, pivot, weight) / total[..., None]).to(x.dtype)

        return merged(keys, total), merged(values, total / size if self.value_weights == "sum" else total)


def merging_sets(keys: Tensor, threshold: float) -> Tensor:
    """The number of each token's merging set, [heads, tokens], ascending: a pair that is not alike starts another."""
    cosine = cosine_similarity(keys[:, 1:].float(), keys[:, :-1].float(), dim=-1)
    return pad((cosine <= threshold).cumsum(1), (1, 0))


def best_member(sets: Tensor, kept: Tensor, scores: Tensor) -> Tensor:
    """For each set the place of its best member among the kept, [heads, sets], the first of equals; `count` for none."""
    sets_kept, scores_kept = entries(sets, kept), entries(scores, kept)
    highest = torch.full_like(scores, -torch.inf).scatter_reduce(1, sets_kept, scores_kept, "amax")
    count = kept.shape[1]
    place = torch.arange(count, device=kept.device).where(scores_kept == highest.gather(1, sets_kept), count)
    return torch.full_like(sets, count).scatter_reduce(1, sets_kept, place, "amin")


@hookimpl
def kvfactory_register_merges(register: RegisterMerge) -> None:
    register("kvmerger", KVMerger)
