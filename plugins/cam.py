"""CaM: pass the value of an evicted token on to the tokens after it, as likely as it is attended to.

When a token is evicted, its value divided by m = `merge_budget` is added to each of the next m kept tokens, with the
probability P = A / mean A of those, at most 1, where A is the attention a token got (ICML 2024). Keys stay as they are.
Where fewer than m follow, their share is lost, as in the authors' code. Tokens evicted together pass on original values.

The method `cam` is KVCache-Factory's selection, SnapKV's without pooling, with the merge `cam`; the authors merge under
sinks and a recent window. That merge goes with any method whose scores are in proportion to attention, which it takes for
A: only their ratios count. A method that gives its protected tokens no score leaves them 0, which makes P larger.

The authors' streaming code has the mean over the next m tokens in P (`denominator=next`), their other code that over all
later ones (`later`: evicted ones too). They draw at random (`sampling=bernoulli`); the default adds the expected value.

What KVCache-Factory merges is another thing (`cam_rule=kvcache-factory`): every token of the prompt in turn, evicted or
not, into the next m, with what those before it left there, and A in proportion to its maximum over the prompt's start and
the m tokens from itself on; its m is its window size. It edits the prompt's values while the prompt's own attention still
needs them, which changes all that follows: not reproduced, values are copied here. It has no form for decoding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, normalize, pad

from kvfactory import AttentionScoredMethod, LayerContext, Merge, WindowMethod, at_least, hookimpl, require
from kvfactory.hookspecs import RegisterMerge, RegisterMethod
from kvfactory.indexing import entries, evicted


@dataclass(frozen=True, kw_only=True)
class Cam(WindowMethod, AttentionScoredMethod):
    """Keeps the tokens that the last `window_size` queries attend to most, one by one."""

    def score(self, layer: LayerContext) -> Tensor:
        # the window's own columns too: selection leaves them out, and the merge needs them
        return self.per_stored_head(layer, layer.window_attention(self.window_size).sum(1))


@dataclass(frozen=True, kw_only=True)
class CamMerge(Merge):
    """Adds the values of evicted tokens to the kept ones that follow."""

    merge_budget: int = 32
    """Kept tokens among which a value is shared out."""
    cam_rule: Literal["evicted", "kvcache-factory"] = "evicted"
    """Merge what is evicted, or every token in turn."""
    denominator: Literal["next", "later"] = "next"
    """What a token's attention is compared with: the tokens that would take its value, or all later ones."""
    start_ratio: float = 0.1
    """Part of the prompt, at its beginning, that KVCache-Factory's rule compares with and does not merge."""
    sampling: Literal["expected", "bernoulli"] = "expected"
    """Add the expected value, or draw."""
    merge_seed: int = 1
    """Seed of the draws."""

    def __post_init__(self) -> None:
        at_least(self, merge_budget=1)
        require(0 < self.start_ratio < 1, f"--start_ratio is {self.start_ratio}; it is more than 0 and less than 1")
        require(
            self.cam_rule == "kvcache-factory" or self.start_ratio == CamMerge.start_ratio,
            f"--start_ratio {self.start_ratio} is of --cam_rule kvcache-factory; give that too",
        )
        require(
            self.cam_rule == "evicted" or self.denominator == "next",
            f"--denominator {self.denominator} is of --cam_rule evicted; leave one of them out",
        )
        require(
            self.sampling == "bernoulli" or self.merge_seed == CamMerge.merge_seed,
            f"--merge_seed {self.merge_seed} is of --sampling bernoulli; give that too",
        )

    @property
    def weighs_scores(self) -> bool:
        return True

    @property
    def prompt_only(self) -> bool:
        return self.cam_rule == "kvcache-factory"  # it merges every token at each eviction

    def merge(self, keys: Tensor, values: Tensor, kept: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        merge = self._merge_every_token if self.cam_rule == "kvcache-factory" else self._merge_evicted
        return entries(keys, kept), merge(keys, values.float(), kept, scores).to(values.dtype)

    def _merge_evicted(self, keys: Tensor, values: Tensor, kept: Tensor, scores: Tensor) -> Tensor:
        budget, (heads, count), tokens = self.merge_budget, kept.shape, scores.shape[1]
        gone = evicted(kept, tokens)
        place = torch.searchsorted(kept.contiguous(), gone)  # of the first kept token behind it
        if self.denominator == "next":
            takers = (count - torch.arange(count + 1, device=kept.device)).clamp(max=budget)
            attention = pad(entries(scores, kept), (0, budget)).unfold(1, budget, 1).sum(-1)
            usual = (attention / takers).gather(1, place)
        else:
            attention = pad(scores[:, 1:], (0, 1)).flip(1).cumsum(1).flip(1)
            usual = entries(attention, gone) / (tokens - 1 - gone)
        share = self._share(entries(keys, gone), entries(scores, gone) / usual)
        leaving = share[..., None] * entries(values, gone)
        by_place = values.new_zeros(heads, count + 1, values.shape[-1])
        by_place = by_place.scatter_add(1, place[..., None].expand_as(leaving), leaving)[:, :-1]
        before = pad(by_place.transpose(1, 2), (budget - 1, 0))
        return entries(values, kept) + avg_pool1d(before, budget, stride=1).transpose(1, 2)

    def _merge_every_token(self, keys: Tensor, values: Tensor, kept: Tensor, scores: Tensor) -> Tensor:
        budget, tokens = self.merge_budget, scores.shape[1]
        start = math.ceil(self.start_ratio * tokens)
        merging = torch.arange(start, max(tokens - budget, start), device=kept.device)
        if len(merging):
            highest = torch.maximum(
                scores[:, start:-1].unfold(1, budget, 1).amax(-1), scores[:, :start].amax(1, keepdim=True)
            )
            share = self._share(keys[:, merging], scores[:, merging] / highest) / budget
            values = values.clone()
            for token, part in zip(merging.tolist(), share.unbind(1), strict=True):
                values[:, token + 1 : token + 1 + budget] += (part[:, None] * values[:, token])[:, None]
        return entries(values, kept)

    def _share(self, keys: Tensor, ratio: Tensor) -> Tensor:
        """What part of its value each token passes on, [heads, tokens], given how its attention compares."""
        probability = ratio.nan_to_num(nan=0.0).clamp(0, 1)  # nobody to compare with, or nothing on both sides: 0
        if self.sampling == "expected":
            return probability
        return (uniforms(keys, self.merge_seed) < probability).float()


def uniforms(keys: Tensor, seed: int) -> Tensor:
    """A draw from 0..1 for each token, [heads, tokens]: the fraction of a long random projection of its key's direction.

    A token's luck is so its own: the same in any batch and any order, another at every position and in every layer.
    """
    projection = 1000 * torch.randn(keys.shape[-1], generator=torch.Generator().manual_seed(seed))
    return (normalize(keys.float(), dim=-1) @ projection.to(keys.device)).frac().abs()


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("cam", attention=Cam, merge="cam")


@hookimpl
def kvfactory_register_merges(register: RegisterMerge) -> None:
    register("cam", CamMerge)
