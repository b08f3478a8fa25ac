"""FullKV: keep everything. What every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvfactory import DenseStore, LayerContext, Method, Store, hookimpl
from kvfactory.hookspecs import RegisterMethod


@dataclass(frozen=True, kw_only=True)
class FullKV(Method):
    """Keeps every key and value, as the stock model does."""

    def compress(self, layer: LayerContext) -> Store:
        positions = torch.arange(layer.num_tokens, dtype=torch.int32, device=layer.keys.device)[None]
        return DenseStore(layer.keys, layer.values, positions)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("fullkv", attention=FullKV)
