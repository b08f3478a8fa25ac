"""RKV: keep what recent queries attend to, unless it repeats what is kept already (arXiv 2505.24133).

Made for long chains of thought: a token's score is its importance, the attention of the last queries, less its redundancy,
how similar its key is to the others. A key is not held against the latest one that is nearly the same, so that of many
copies the last stays. While decoding an eighth of the budget is freed at once (the authors' 128 of 1024).

The score is the authors': queries attend only to what lies before the window, the logits of a group are reduced by their
maximum, and importance is pooled. So is a quirk of theirs: a key with nothing similar to it is not held against the first
key. They compress after a fixed number of tokens or at a line's end; here a store evicts whenever it is full.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from kvfactory import LayerContext, Share, WindowMethod, hookimpl, pool, reduce_groups, require
from kvfactory.hookspecs import RegisterMethod
from kvfactory.stores import spread

ROWS = 256
"""Keys that are compared with all others at once."""


@dataclass(frozen=True, kw_only=True)
class RKV(WindowMethod):
    """Keeps the tokens that the last `window_size` queries attend to and that others do not repeat."""

    signed_scores: ClassVar[bool] = True
    aliases: ClassVar[dict[str, str]] = {"similarity_threshold": "redundancy_threshold"}

    kernel_size: int = 7
    """Width of the pooling, odd."""
    mix_lambda: float = 0.07
    """Weight of importance; the rest is that of redundancy."""
    redundancy_threshold: float = 0.5
    """Cosine above which a key counts as a copy of another."""
    decode_budget: int | Literal["same"] | None = "same"
    decode_interval: int | Share = Share(12.5)

    def __post_init__(self) -> None:
        require(
            self.kernel_size >= 1 and self.kernel_size % 2 == 1,
            f"--kernel_size is {self.kernel_size}; pooling keeps the length of its input only with an odd size of 1 or more",
        )
        require(0 <= self.mix_lambda <= 1, f"--mix_lambda is {self.mix_lambda}; it is a share from 0 to 1")
        super().__post_init__()

    def score(self, layer: LayerContext) -> Tensor:
        past = layer.num_tokens - self.window_size
        repeated = spread(redundancy(layer.keys, self.redundancy_threshold), self.stored_heads(layer))[:, :past]
        return pad(self.mix_lambda * self.attended(layer) - (1 - self.mix_lambda) * repeated, (0, self.window_size))

    def attended(self, layer: LayerContext) -> Tensor:
        """Importance of what lies before the window, [stored heads, tokens - window_size]."""
        queries = layer.queries[:, -self.window_size :].float().unflatten(0, (layer.kv_heads, -1))
        keys = layer.keys[:, : -self.window_size].float()
        logits = torch.einsum("hgqd,hkd->hgqk", queries, keys).flatten(0, 1) / math.sqrt(keys.shape[-1])
        attention = reduce_groups(logits, self.stored_heads(layer), "max").softmax(-1)
        return pool(attention.mean(1), self.kernel_size, "maxpool")


def redundancy(keys: Tensor, threshold: float) -> Tensor:
    """How similar each key [heads, tokens, head_dim] is to the others, as a softmax over them, [heads, tokens]."""
    unit = normalize(keys.float(), dim=-1)
    token = torch.arange(keys.shape[1], device=keys.device)
    similarity = unit.new_zeros(unit.shape[:2])
    for rows in token.split(ROWS):
        cosine = (unit[:, rows] @ unit.transpose(1, 2)).masked_fill(rows[:, None] == token, 0.0)
        latest_copy = torch.where(cosine > threshold, token, 0).amax(-1, keepdim=True)
        similarity += cosine.scatter(2, latest_copy, 0.0).sum(1)
    return (similarity / len(token)).softmax(-1)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("rkv", attention=RKV)
