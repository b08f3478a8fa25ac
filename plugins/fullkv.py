"""FullKV: keep everything. What every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from kvfactory import DenseStore, LayerContext, Method, Store, hookimpl
from kvfactory.hookspecs import RegisterMethod
from kvfactory.method import packed
from kvfactory.quantisation import Quantisation


@dataclass(frozen=True, kw_only=True)
class FullKV(Method):
    """Keeps every key and value, as the stock model does."""

    quant_method: Quantisation | None = None
    """How they are stored in few bits, if they are."""

    def compress(self, layer: LayerContext) -> Store:
        return packed(DenseStore(layer.keys, layer.values), layer, self.quant_method)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("fullkv", attention=FullKV)
