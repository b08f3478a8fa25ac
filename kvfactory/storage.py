"""How what a method keeps is stored and read, whatever the method: kinds of parts that come after eviction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from .buffers import Buffer
from .context import LayerContext
from .parts import Part
from .stores import Store


@dataclass(frozen=True, kw_only=True)
class Storage(Part, ABC):
    """Changes how a store holds or reads its entries; its dataclass fields are settings, as a method's are."""

    @abstractmethod
    def stored(self, store: Store, layer: LayerContext) -> Store:
        """The store that a method made of a layer, holding or reading its entries in this way."""


@dataclass(frozen=True, kw_only=True)
class Packing(Storage):
    """Holds entries in buffers of its own."""

    @abstractmethod
    def buffer(self, layer: LayerContext, keys: Tensor, values: Tensor) -> Buffer:
        """A buffer of these entries [heads, length, head_dim], which a method kept of a layer.

        Where each head has a store of its own, it is called once for each, with a layer of that head alone.
        """

    def stored(self, store: Store, layer: LayerContext) -> Store:
        def make(keys: Tensor, values: Tensor, head: int | None = None, heads: int = 1) -> Buffer:
            alone = layer if head is None else next(islice(layer.stored_heads(heads), head, None))
            return self.buffer(alone, keys, values)

        return store.pack(make)


@dataclass(frozen=True, kw_only=True)
class Quantisation(Packing):
    """Holds entries in few bits."""


@dataclass(frozen=True, kw_only=True)
class KeyPruning(Packing):
    """Holds some channels of the keys."""


@dataclass(frozen=True, kw_only=True)
class Retrieval(Storage):
    """Reads at each step some of what is held."""
