"""Pivot: average each evicted entry into the kept one with the most similar key (arXiv 2406.18139).

The merge of LOOK-M. Similarity is the cosine of rotated keys, protected tokens' among them, and values follow their keys.
An evicted entry is first averaged with its pivot as that was before any merge; the pivot then becomes the mean of itself
and of all such averages, so it never weighs less than half. The authors and KVCache-Factory agree on this. The authors
choose what to evict by H2O's score with the prompt's first tokens kept, images first; here the method chooses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvfactory import Merge, hookimpl
from kvfactory.hookspecs import RegisterMerge
from kvfactory.indexing import entries, evicted

DROPPED_AT_ONCE = 1024
"""Evicted entries whose similarities are held at once."""


@dataclass(frozen=True, kw_only=True)
class Pivot(Merge):
    """Averages what is evicted into the most similar of what stays."""

    def merge(self, keys: Tensor, values: Tensor, kept: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        gone = evicted(kept, keys.shape[1])
        _, pivot = nearest(keys, kept, gone)

        def merged(x: Tensor) -> Tensor:
            stays = entries(x, kept).float()
            averages = (entries(x, gone).float() + entries(stays, pivot)) / 2
            return stays.scatter_reduce(1, pivot[..., None].expand_as(averages), averages, "mean").to(x.dtype)

        return merged(keys), merged(values)


def nearest(keys: Tensor, kept: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """For each evicted entry its cosine with the most similar kept key, and the place of that among the kept.

    Keys are [heads, tokens, head_dim], kept [heads, count] and gone [heads, dropped] index them; both answers are
    [heads, dropped].
    """
    directions = normalize(keys.float(), dim=-1, eps=1e-6)
    candidates = entries(directions, kept).transpose(1, 2)
    best = [(chunk @ candidates).max(-1) for chunk in entries(directions, gone).split(DROPPED_AT_ONCE, 1)]
    return torch.cat([each.values for each in best], 1), torch.cat([each.indices for each in best], 1)


@hookimpl
def kvfactory_register_merges(register: RegisterMerge) -> None:
    register("pivot", Pivot)
