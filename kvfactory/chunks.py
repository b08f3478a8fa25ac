"""Prefill in chunks: a prompt of any length in bounded memory, because a method evicts after each chunk.

A chunk attends to what is kept of the tokens before it, so its hidden states are not those of a prompt that was read at
once, and neither is what a method keeps in the end. Scores come from the queries of a chunk, or of the last ones of all
chunks where a method looks at a window; records of attention add up over chunks. When the prompt is over the method
compresses what is left as if it had been all.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from .clock import now
from .context import LayerContext
from .decoding import BoundedStore, latest
from .errors import UserError
from .eviction import EvictionMethod
from .method import Method
from .stores import Reading, Store


def take_in_chunks(method: Method) -> None:
    """Raises `UserError` for a method that needs its prompt at once."""
    if reason := method.whole_prompt:
        raise UserError(f"{type(method).__name__} does not go with --prefill_chunk: {reason}; leave one of them out")


def by_chunks(method: Method, tokens: int) -> Method:
    """The method that is given the first chunk of a prompt of so many tokens, of which more follow.

    One that evicts nothing is itself. Raises `UserError` for one that needs its prompt at once.
    """
    take_in_chunks(method)
    whole = method.for_prompt(tokens)
    return ByChunks(method=whole, tokens=tokens) if isinstance(whole, EvictionMethod) else whole


def finished(stores: list[Store]) -> tuple[list[Store], float]:
    """What a method made of its prompt in each layer, now that all chunks were read, and the time that choosing took."""
    seconds = sum(store.seconds for store in stores if isinstance(store, ChunkStore))
    return [store.finished() if isinstance(store, ChunkStore) else store for store in stores], seconds


@dataclass(frozen=True, kw_only=True)
class ByChunks(Method):
    """An eviction method whose prompt comes in chunks; it is given the first of them."""

    method: EvictionMethod
    """Its budget is in entries."""
    tokens: int
    """Of the whole prompt, which has more than one chunk."""

    def compress(self, layer: LayerContext) -> Store:
        store = ChunkStore(layer, self.method, self.tokens)
        store.observe(None)
        return store


class ChunkStore(Store):
    """What is kept of the chunks so far; `finished` when the last of them has been observed."""

    def __init__(self, layer: LayerContext, method: EvictionMethod, tokens: int) -> None:
        every = torch.arange(layer.num_tokens, device=layer.keys.device).expand(method.stored_heads(layer), -1)
        self._method, self._tokens, self._to_come = method, tokens, tokens
        self._kept: BoundedStore = method.open_store(layer, every)
        self._new, self._queries = layer.num_tokens, layer.queries
        self._finished: Store | None = None
        self.observes = self._kept.observes
        self.seconds = 0.0
        """Time that choosing took."""

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        self._new = keys.shape[1]
        self._kept.append(keys, values, position)

    def read(self, query: Tensor) -> Reading:
        self._queries = torch.cat([self._queries, query], 1)
        return self._kept.read(query)

    def observe(self, weights: Tensor | list[Tensor] | None) -> None:
        if weights is not None:
            self._kept.observe(weights)
        self._to_come -= self._new
        layer = self._kept.as_layer()
        gone = self._tokens - self._to_come - layer.num_tokens
        layer = replace(layer, queries=self._queries, evicted_before=gone)
        started = now(layer.keys.device)
        if self._to_come:
            self._evict(layer)
        else:
            self._finished = self._method.compress(layer)
        self._queries = latest(self._queries, self._method.recent_queries)
        self.seconds += now(layer.keys.device) - started

    def _evict(self, layer: LayerContext) -> None:
        kept = self._method.select(layer)
        if isinstance(kept, list):  # heads keep equally many until the prompt is over
            kept = self._method.down_to(sum(map(len, kept)) // len(kept)).select(layer)
        assert isinstance(kept, Tensor)
        if kept.shape[1] < layer.num_tokens:
            self._kept.keep(kept, None if self._method.merge is None else self._method.gather(layer, kept))

    def finished(self) -> Store:
        """What the method made of all there was when the prompt was over."""
        assert self._finished is not None, "chunks are still to come"
        return self._finished

    def positions(self) -> list[Tensor]:
        return self._kept.positions()

    def keys(self) -> list[Tensor]:
        return self._kept.keys()

    def values(self) -> list[Tensor]:
        return self._kept.values()

    def lengths(self) -> list[int]:
        return self._kept.lengths()

    def nbytes(self) -> int:
        return self._kept.nbytes()

    def fork(self) -> Self:
        twin = copy(self)
        twin._kept = self._kept.fork()
        return twin
