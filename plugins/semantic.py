"""Semantic: group tokens whose keys are alike, and keep some of every group (after a thesis's SemanticClusterCache).

Keys of one KV head, turned back to position 0, are clustered by k-means; sinks and the most recent tokens are kept besides
and take no part. The best token of each cluster comes before all others, so that no group is lost as long as there are
places. The strategy says which token is best, and who gets the places that are left:
- `hybrid`: the nearest to the centroid is best; then tokens by the attention of the last queries, pooled as SnapKV's is.
- `attention`: all by that attention; clusters get places in proportion to what they get of it.
- `representative`: all by nearness; places in proportion to size. Nobody's attention is looked at.
Proportions are those of highest averages, the n-th token of a cluster counts its cluster's weight over n, so that scores
know nothing of the budget. `hybrid` is the default because it finds what is asked for: a fact is several tokens side by
side, which are of different clusters.

`strategy=thesis` is the original: one clustering for all heads, of the mean of rotated keys over KV heads. It keeps the
nearest token to each centroid and the last tenth of the budget, and fills up with the most recent tokens: with 32 clusters
and a budget of 256 mostly a sliding window. Its own `attention` (the first tokens of the largest clusters) and `hybrid`
(the same as `representative`) are not reproduced, and neither are its bugs: where representatives and recent tokens exceed
the budget it dropped the newest, here representatives of the smallest clusters go; and a full cache was clustered anew for
every token, where every 128 was meant (`decode_interval=128`). Its k-means was another, best of ten starts over all tokens.
Where heads keep different numbers of tokens while decoding, each is clustered by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfactory import AttentionScoredMethod, LayerContext, at_least, hookimpl, pool, require
from kvfactory.clustering import cluster_sums, kmeans, ranks_within, squared_distances
from kvfactory.hookspecs import RegisterMethod
from kvfactory.rotary import rotated
from kvfactory.stores import spread

FITTED = 512
"""Tokens, evenly spaced, that centroids are fitted to; all others only join the nearest."""
OF_ATTENTION = ("window_size", "kernel_size", "pooling", "gqa_score_agg")
"""Settings of strategies that look at attention."""


@dataclass(frozen=True, kw_only=True)
class Semantic(AttentionScoredMethod):
    """Keeps tokens of every cluster of keys, beside the first and the most recent ones."""

    reads: ClassVar[str] = "keys, the window's queries"

    strategy: Literal["hybrid", "attention", "representative", "thesis"] = "hybrid"
    """What is kept of a cluster: its most typical token and then what is attended to, what is attended to, what is
    typical, or as in the original: one typical token and then the most recent ones."""
    num_clusters: int = 32
    """Clusters a KV head; in the original, a layer."""
    sink_size: int | None = None
    """First tokens, always kept; 4 if not given, and none in the original."""
    recent_size: int | None = None
    """Last tokens, always kept; 8 if not given, and in the original a tenth of the budget."""
    window_size: int = 8
    """Last queries whose attention counts."""
    kernel_size: int = 7
    """Width of the pooling of attention, odd."""
    pooling: Literal["avgpool", "maxpool"] = "maxpool"

    def __post_init__(self) -> None:
        at_least(self, num_clusters=1, sink_size=0, recent_size=0, window_size=1)
        require(
            self.kernel_size >= 1 and self.kernel_size % 2 == 1,
            f"--kernel_size is {self.kernel_size}; pooling keeps the length of its input only with an odd size of 1 or more",
        )
        for each in fields(self):
            require(
                self.looks or each.name not in OF_ATTENTION or getattr(self, each.name) == each.default,
                f"--{each.name} {getattr(self, each.name)}: --strategy {self.strategy} looks at no attention; "
                "leave it out, or give --strategy hybrid or attention",
            )
        super().__post_init__()

    @property
    def looks(self) -> bool:
        """Whether attention is looked at."""
        return self.strategy in ("hybrid", "attention")

    @property
    def recent_queries(self) -> int:
        return self.window_size if self.looks else 0

    def protected(self) -> tuple[int, int]:
        first, last = self.sink_size, self.recent_size
        if self.strategy == "thesis":
            first = first or 0
            return first, self.tenth(first) if last is None else last
        return 4 if first is None else first, 8 if last is None else last

    def tenth(self, sinks: int) -> int:
        """A tenth of the budget, of which at least one token is left to choose."""
        assert isinstance(self.budget, int)
        return max(1, min(self.budget // 10, self.budget - sinks - 1))

    def least_budget(self) -> int:
        if self.strategy == "thesis" and self.recent_size is None:
            return (self.sink_size or 0) + 2
        return super().least_budget()

    def score(self, layer: LayerContext) -> Tensor:
        return self.original(layer) if self.strategy == "thesis" else self.by_cluster(layer)

    def by_cluster(self, layer: LayerContext) -> Tensor:
        """The first of each cluster, those of heavy clusters first, and then what the strategy says."""
        first, last = self.protected()
        competing = slice(first, layer.num_tokens - last)
        key = "clusters of keys", self.num_clusters, first, last
        labels, nearness = layer.shared(key, lambda: self.clusters(unrotated(layer, competing)))
        if self.looks:
            labels, nearness = (spread(each, self.stored_heads(layer)) for each in (labels, nearness))
            votes = layer.window_attention(min(self.window_size, layer.num_tokens)).sum(1)
            # protected columns are cut off before pooling, or their scores would leak into their neighbours
            mass = self.per_stored_head(layer, votes[:, competing])
            attention = pool(mass, self.kernel_size, self.pooling)
        else:
            mass = torch.full_like(nearness, 1 / nearness.shape[1])
        rank = ranks_within(labels, attention if self.strategy == "attention" else nearness)
        weight = cluster_sums(mass, labels, self.num_clusters).gather(1, labels)
        later = attention if self.strategy == "hybrid" else weight / (rank + 1)
        return pad(torch.where(rank == 0, weight + later.amax(), later), (first, last))

    def original(self, layer: LayerContext) -> Tensor:
        """The nearest to each centroid, those of large clusters first, and then the most recent."""
        labels, nearness = self.clusters(layer.keys.float().mean(0, keepdim=True))
        size = cluster_sums(torch.ones_like(nearness), labels, self.num_clusters).gather(1, labels)
        place = torch.arange(layer.num_tokens, device=labels.device)
        scores = torch.where(ranks_within(labels, nearness) == 0, size + layer.num_tokens, place)
        return scores.expand(layer.kv_heads, -1)

    def clusters(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The cluster of each of the points [heads, tokens, dim], and its nearness to the centroid, [heads, tokens]."""
        centroids, labels = kmeans(points, self.num_clusters, sample_size=FITTED)
        # the two tokens of a cluster are equally near to its mean: with few digits that is a tie, which position breaks
        return labels, -squared_distances(points, labels, centroids).bfloat16().float()


def unrotated(layer: LayerContext, tokens: slice) -> Tensor:
    """Keys of these tokens as they would be at position 0, [kv_heads, count, head_dim], float32."""
    return rotated(layer.keys[:, tokens].float(), -layer.positions[:, tokens], layer.rotary_frequencies())


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("semantic", attention=Semantic)
