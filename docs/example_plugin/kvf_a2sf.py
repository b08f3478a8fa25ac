"""A2SF: heavy hitters that fade, for attention counts less the longer ago it was given (arXiv 2407.20485).

Each query multiplies what tokens got so far by `forgetting_factor` and adds its own attention. Early tokens, which all
queries see, no longer outweigh late ones. With a factor of 1 this is H2O's score. The authors evict at every step; here
`decode_budget` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfactory import LayerContext, TrackingMethod, hookimpl, reduce_groups, require
from kvfactory.hookspecs import RegisterMethod


@dataclass(frozen=True, kw_only=True)
class A2SF(TrackingMethod):
    """Keeps the tokens with the most attention of late."""

    reads: ClassVar[str] = "the last 256 queries"

    forgetting_factor: float = 0.9
    """What is left of a token's score after one more query, 0 to 1."""

    def __post_init__(self) -> None:
        require(0 <= self.forgetting_factor <= 1, f"--forgetting_factor is {self.forgetting_factor}; it is 0 to 1")
        super().__post_init__()

    def protected(self) -> tuple[int, int]:
        return 0, 1

    def track_prompt(self, layer: LayerContext) -> Tensor:
        """Faded attention from each query head, [stored heads, tokens, group]; what older queries gave has faded away."""
        attention = layer.window_attention(min(256, layer.num_tokens))
        age = torch.arange(attention.shape[1] - 1, -1, -1, device=attention.device)
        faded = (attention * self.forgetting_factor ** age[:, None]).sum(1)
        return self.grouped(layer, faded).transpose(1, 2)

    def track_step(self, state: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
        for query in weights.unbind(2):  # one new token, or several of a chunk
            state = self.forgetting_factor * state + query.transpose(1, 2)
        return state

    def value(self, state: Tensor, positions: Tensor) -> Tensor:
        return reduce_groups(state.transpose(1, 2).flatten(0, 1), len(state), self.gqa_score_agg)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("a2sf", attention=A2SF)
