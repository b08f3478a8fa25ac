"""NACL: keep what proxy tokens attend to, and a few tokens drawn by chance (arXiv 2408.03675).

Proxies are the last tokens, often the question; their attention, summed, scores the prompt. Part of the places goes to the
best scores, the rest is drawn from what is left, a token's chances following the softmax of its score, so that no head is
sure to lose a token that the proxies overlooked. Lots are hashes of seed, layer, head and position: the same on every
device, and the same again while decoding.

References differ: the authors let proxies attend to all of the prompt, later tokens included, and protect sinks and recent
tokens, those fewer than the proxies by default; KVCache-Factory's attention is `causal`, it protects the proxies too, and
it may take them from the start of the prompt or from both ends. Here proxies are always protected. The default draws 37% of
the places, the authors' 7% of the prompt beside 12% by score. With grouped queries the authors read the scores of the wrong
query heads; here a group's scores are averaged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvfactory import AttentionScoredMethod, LayerContext, at_least, hookimpl, require
from kvfactory.hookspecs import RegisterMethod

from .random import uniforms


@dataclass(frozen=True, kw_only=True)
class NACL(AttentionScoredMethod):
    """Keeps the tokens that the proxies attend to most, and a random choice of the others."""

    reads: ClassVar[str] = "the proxies' queries"
    aliases: ClassVar[dict[str, str]] = {"proxy_size": "window_size", "mode": "proxy_tokens"}

    window_size: int = 8
    """Proxy tokens, always kept."""
    proxy_tokens: Literal["suffix", "prefix", "edges"] = "suffix"
    """Take the proxies from the end of the prompt, from its start, or the sinks and as many as `suffix` does."""
    sink_size: int = 4
    """First tokens, always kept."""
    recent_size: int | None = None
    """Last tokens, always kept, proxies among them; those alone if not given."""
    random_ratio: float = 0.37
    """Share of the places beside protected tokens that is drawn: 0 none, 1 all."""
    random_seed: int = 0
    """Another seed draws other tokens."""
    temperature: float = 1.0
    """Below 1 the draw follows the scores more closely, above less; 0 or less gives all the same chance."""
    causal: bool = False
    """Proxies attend to no token after them."""

    def __post_init__(self) -> None:
        at_least(self, window_size=1, sink_size=0)
        last = self.proxies()[1]
        require(
            self.recent_size is None or self.recent_size >= last,
            f"--recent_size is {self.recent_size}; the last {last} tokens are proxies and kept anyway; give {last} or more",
        )
        require(0 <= self.random_ratio <= 1, f"--random_ratio is {self.random_ratio}; it is a share from 0 to 1")
        suffix = self.proxy_tokens == "suffix"
        require(
            suffix or not self.causal,
            f"--proxy_tokens {self.proxy_tokens}: under --causal true the first tokens see nothing but each other; "
            "give --causal false",
        )
        require(
            suffix or self.decode_budget is None,
            f"--proxy_tokens {self.proxy_tokens}: queries of the first tokens are gone while decoding; "
            "leave --decode_budget out",
        )
        super().__post_init__()

    @property
    def recent_queries(self) -> int:
        return self.window_size

    def proxies(self) -> tuple[int, int]:
        """How many of the first and of the last tokens are proxies."""
        ends = {
            "suffix": (0, self.window_size),
            "prefix": (self.window_size, 0),
            "edges": (self.sink_size, self.window_size),
        }
        return ends[self.proxy_tokens]

    def protected(self) -> tuple[int, int]:
        first, last = self.proxies()
        return max(first, self.sink_size), max(last, self.recent_size or 0)

    def score(self, layer: LayerContext) -> Tensor:
        attention = layer.window_attention(self.window_size) if self.causal else self.open_attention(layer)
        return self.per_stored_head(layer, attention.sum(1))

    def open_attention(self, layer: LayerContext) -> Tensor:
        """The proxies' attention without a causal mask, [query_heads, proxies, tokens]."""
        first, last = self.proxies()
        queries = torch.cat([layer.queries[:, :first], layer.queries[:, layer.queries.shape[1] - last :]], 1).float()
        grouped = queries.unflatten(0, (layer.kv_heads, -1)) / math.sqrt(queries.shape[-1])
        return torch.einsum("hgqd,hkd->hgqk", grouped, layer.keys.float()).softmax(-1).flatten(0, 1)

    def choose(self, layer: LayerContext, counts: list[int]) -> list[Tensor]:
        """The best tokens, and others drawn one by one: those with the largest log(u) / p, each with a u of its own."""
        ranked = super().choose(layer, [layer.num_tokens - sum(self.protected())] * len(counts))
        scores = self.shared_scores(layer)
        lots = uniforms(self.random_seed, layer.layer_index, len(counts), layer.positions).log()
        chosen = []
        for head, count in enumerate(counts):
            drawn = round(count * self.random_ratio)
            best, rest = ranked[head][: count - drawn], ranked[head][count - drawn :]
            winners = (lots[head, rest] / self.chances(scores[head, rest])).topk(drawn).indices
            chosen.append(torch.cat([best, rest[winners]]))
        return chosen

    def chances(self, scores: Tensor) -> Tensor:
        """The chance of each of the tokens left to be drawn first."""
        return (scores / self.temperature if self.temperature > 0 else torch.zeros_like(scores)).softmax(-1)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("nacl", attention=NACL)
