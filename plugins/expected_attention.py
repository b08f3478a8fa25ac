"""ExpectedAttention: keep the keys that queries yet to come can be expected to look at (arXiv 2510.00636).

Queries before their rotation are taken for Gaussian. Their mean and covariance over the prompt, rotated as the next
`n_future_positions` tokens would be on average, give the expected weight of each key in closed form; that, times the
norm of its value, is the score. Sinks stand apart: their queries do not count, their keys are always kept.

The defaults are kvpress's, the authors' own code, which adds `epsilon` to the weights before the norms scale them. The
covariance is the biased one, as there. Two deviations: rotated queries are turned back in place of reading the hidden
states again, and the method can go on while decoding, with the statistics of the latest `query_window` queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfactory import AttentionScoredMethod, LayerContext, at_least, hookimpl, require
from kvfactory.hookspecs import RegisterMethod
from kvfactory.moments import quadratic, turned_moments
from kvfactory.rotary import angles, turn
from kvfactory.stores import spread

QUERY_WINDOW = 32


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(AttentionScoredMethod):
    """Keeps the tokens with the largest expected attention, weighed by the norms of their values."""

    reads: ClassVar[str] = "statistics of all queries"
    aliases: ClassVar[dict[str, str]] = {"n_sink": "sink_size"}

    n_future_positions: int = 512
    """How many positions behind the last token the queries to come are spread over."""
    sink_size: int = 4
    """First tokens: always kept, and left out of the statistics and of the softmax."""
    use_covariance: bool = True
    """Count how queries scatter around their mean, too."""
    use_vnorm: bool = True
    """Weigh a key's expected attention by the norm of its value."""
    epsilon: float = 0.0
    """Added to the expected attention before norms weigh it."""
    query_window: int = QUERY_WINDOW
    """The latest queries, whose statistics count while decoding; the prompt's are all of its own."""

    def __post_init__(self) -> None:
        at_least(self, n_future_positions=1, sink_size=0, epsilon=0, query_window=1)
        require(
            self.use_vnorm or self.epsilon == 0,
            f"--epsilon {self.epsilon} changes no rank without --use_vnorm; leave one of them out",
        )
        require(
            self.query_window == QUERY_WINDOW or self.decode_budget is not None,
            f"--query_window {self.query_window}: nothing is scored while decoding without --decode_budget; give one",
        )
        super().__post_init__()

    @property
    def recent_queries(self) -> int:
        return self.query_window

    def down_to(self, budget: int) -> Self:
        return super(ExpectedAttention, replace(self, query_window=QUERY_WINDOW)).down_to(budget)

    def protected(self) -> tuple[int, int]:
        return self.sink_size, 0

    def score(self, layer: LayerContext) -> Tensor:
        mean, covariance = self.future_queries(layer)
        keys = layer.keys[:, self.sink_size :]
        dim = keys.shape[-1]
        mean = mean / math.sqrt(dim)
        if self.use_covariance:
            logits = quadratic(keys, covariance / (2 * dim), mean)
        else:
            logits = (mean.unflatten(0, (len(keys), -1)) @ keys.float().transpose(1, 2)).flatten(0, 1)
        scores = self.per_stored_head(layer, logits.softmax(-1))
        if self.use_vnorm:
            norms = layer.values[:, self.sink_size :].float().norm(dim=-1)
            scores = (scores + self.epsilon) * spread(norms, len(scores))
        return pad(scores, (self.sink_size, 0))

    def future_queries(self, layer: LayerContext) -> tuple[Tensor, Tensor]:
        """Mean [query_heads, head_dim] and covariance [query_heads, head_dim, head_dim] of the queries to come."""
        frequencies = layer.rotary_frequencies().float()
        end = int(layer.positions[0, -1]) + 1
        count = min(layer.queries.shape[1], max(end - self.sink_size, 0))  # those of no sink
        cos, sin = (each[end - count : end] for each in angles(frequencies, end))
        mean, covariance = turned_moments(layer.queries[:, layer.queries.shape[1] - count :], cos, -sin)
        angle = torch.arange(end, end + self.n_future_positions, device=mean.device)[:, None] * frequencies
        cos, sin = angle.cos().mean(0), angle.sin().mean(0)
        rows = turn(covariance, cos, sin)
        return turn(mean, cos, sin), turn(rows.transpose(1, 2), cos, sin)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("expected_attention", attention=ExpectedAttention)
