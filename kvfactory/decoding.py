"""Stores that go on evicting while tokens are generated: the decode-time form that every scorer has."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .buffers import Stackable
from .context import LayerContext
from .indexing import entries
from .stores import DenseStore, Reading

if TYPE_CHECKING:
    from .eviction import EvictionMethod
    from .scoring import TrackingMethod


class BoundedStore(DenseStore):
    """Has its method choose again, from what is stored, whenever a step leaves more than its capacity."""

    acts = True
    spare: ClassVar[int] = 1
    """Room beyond the capacity, for the step's own token."""

    def __init__(self, layer: LayerContext, kept: Tensor, method: EvictionMethod) -> None:
        """Starts with those tokens of a layer that kept [heads, count] names."""
        self._capacity = capacity = method.capacity(layer.num_tokens, kept.shape[1])
        self._left = 0 if capacity is None else method.after_eviction(capacity)
        self._method = method if capacity is None else method.down_to(self._left)
        limit = None if capacity is None else capacity + self.spare
        super().__init__(*method.gather(layer, kept), layer.true_positions(kept).int(), limit=limit)
        place = layer.layer_index, layer.num_layers
        self._make_layer = partial(
            LayerContext, *place, inverse_frequencies=layer.inverse_frequencies, first_kv_head=layer.first_kv_head
        )
        self._recent = method.recent_queries
        self._queries = latest(layer.queries, self._recent)

    def stackable(self, position: int) -> Stackable | None:
        return super().stackable(position)  # `read` gives all there is here too

    def read(self, query: Tensor) -> Reading:
        if self._recent:
            self._queries = latest(torch.cat([self._queries, query], 1), self._recent)
        return super().read(query)

    def observe(self, weights: Tensor | list[Tensor] | None) -> None:
        if self._capacity is not None and self._length > self._capacity:
            layer = self.as_layer()
            kept = self._method.select(layer)
            assert isinstance(kept, Tensor)
            self.keep(kept, None if self._method.merge is None else self._method.gather(layer, kept))
        super().observe(weights)

    def as_layer(self) -> LayerContext:
        """What is stored, as a layer to score."""
        return self._make_layer(self._queries, *self._entries(), listed_positions=self._all_positions())


def latest(queries: Tensor, count: int) -> Tensor:
    """The last queries [heads, count, head_dim], in a tensor of their own; all where there are fewer."""
    return queries[:, max(0, queries.shape[1] - count) :].clone()


class SlidingStore(BoundedStore):
    """Sinks and the most recent entries, for methods that go by positions alone: it makes room before a step.

    A step sees as many entries as the store may hold, and not one more.
    """

    spare = 0

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        self._make_room(keys.shape[1])
        super().append(keys, values, position)

    def stackable(self, position: int) -> Stackable | None:
        self._make_room(1)
        return super().stackable(position)

    def _make_room(self, new: int) -> None:
        if self._capacity is None or self._length + new <= self._capacity:
            return
        sinks = self._method.protected()[0]
        recent = max(self._left - new - sinks, 0)
        entry = torch.arange(self._length, device=self._listed.device)
        kept = torch.cat([entry[:sinks], entry[max(sinks, self._length - recent) :]]).expand(self._heads, -1)
        self.keep(kept, None if self._method.merge is None else self._method.gather(self.as_layer(), kept))


class TrackingStore(BoundedStore):
    """Keeps its method's record of each entry, and adds the attention of every step to it."""

    observes = True

    def __init__(self, layer: LayerContext, kept: Tensor, method: TrackingMethod) -> None:
        super().__init__(layer, kept, method)
        self._tracking = method
        self._state = entries(method.tracked(layer), kept)

    def observe(self, weights: Tensor | list[Tensor] | None) -> None:
        assert isinstance(weights, Tensor)
        new = self._length - self._state.shape[1]
        state = pad(self._state, (0, 0) * (self._state.dim() - 2) + (0, new))
        grouped = weights.unflatten(0, (len(state), -1))
        self._state = self._tracking.track_step(state, grouped, self._all_positions())
        super().observe(weights)

    def as_layer(self) -> LayerContext:
        layer = super().as_layer()
        layer.shared(self._tracking.state_key(), lambda: self._state)
        return layer

    def keep(self, index: Tensor, merged: tuple[Tensor, Tensor] | None = None) -> None:
        self._state = entries(self._state, index)
        super().keep(index, merged)
