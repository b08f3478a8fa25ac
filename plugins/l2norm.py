"""L2Norm: keep the keys of smallest norm, which tend to be those that get most attention (arXiv 2406.11430).

Nothing but keys is looked at; rotation leaves their norms alone. The first two layers, whose norms say little, keep every
token (`skip_layers`): the budget is that of the others, and results show what was really kept.

References agree on the score. The authors keep a share of the tokens, rounded up, KVCache-Factory and this a number of them;
kvpress skips no layer. None protects recent tokens, nor does the default here: `recent_size` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfactory import DenseStore, EvictionMethod, LayerContext, Store, at_least, hookimpl, require
from kvfactory.hookspecs import RegisterMethod
from kvfactory.stores import spread


@dataclass(frozen=True, kw_only=True)
class L2Norm(EvictionMethod):
    """Keeps the tokens whose keys have the smallest norms, in all layers but a few."""

    signed_scores: ClassVar[bool] = True

    skip_layers: tuple[int, ...] = (0, 1)
    """Layers that keep every token, counted from 0."""
    recent_size: int = 0
    """Last tokens, always kept."""

    def __post_init__(self) -> None:
        at_least(self, recent_size=0)
        require(
            all(layer >= 0 for layer in self.skip_layers),
            f"--skip_layers {'+'.join(map(str, self.skip_layers))}: layers are counted from 0; give 0 or more",
        )
        super().__post_init__()

    def protected(self) -> tuple[int, int]:
        return 0, self.recent_size

    def score(self, layer: LayerContext) -> Tensor:
        return -layer.keys.float().norm(dim=-1)

    def select(self, layer: LayerContext) -> Tensor | list[Tensor]:
        if layer.layer_index in self.skip_layers:
            return torch.arange(layer.num_tokens, device=layer.keys.device).expand(self.stored_heads(layer), -1)
        return super().select(layer)

    def store(self, layer: LayerContext, kept: Tensor | list[Tensor]) -> Store:
        if layer.layer_index in self.skip_layers:
            return DenseStore(spread(layer.keys, len(kept)), spread(layer.values, len(kept)))
        return super().store(layer, kept)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("l2norm", attention=L2Norm)
