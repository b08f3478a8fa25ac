"""FullKV: keep everything. What every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from kvfactory import DenseStore, LayerContext, Store, StoringMethod, hookimpl
from kvfactory.hookspecs import RegisterMethod


@dataclass(frozen=True, kw_only=True)
class FullKV(StoringMethod):
    """Keeps every key and value, as the stock model does."""

    @property
    def whole_prompt(self) -> str | None:
        return "channels of keys are chosen when the prompt is over" if self.key_pruning else None

    def compress(self, layer: LayerContext) -> Store:
        return self.stored(DenseStore(layer.keys, layer.values), layer)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("fullkv", attention=FullKV)
