"""Stores of layers whose heads differ: in how many entries they hold, or in what they do while decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from functools import partial
from typing import Self

import torch
from torch import Tensor

from .buffers import MakeBuffer, SegmentBuffer, Stackable
from .stores import DenseStore, Reading, Store, consecutive, spread


class RaggedStore(Store):
    """Each head its own number of entries, one segment of a flat buffer a head: no head pays for another's length."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], positions: Sequence[Tensor]) -> None:
        """One [length, head_dim] key and value tensor and one [length] int32 position tensor a stored head.

        Raises ValueError where lengths differ within a head.
        """
        self._listed_lengths = [len(each) for each in positions]
        for held in (keys, values):
            if [len(each) for each in held] != self._listed_lengths:
                raise ValueError(
                    f"heads of {self._listed_lengths} positions have {[len(each) for each in held]} entries"
                )
        self._buffer = SegmentBuffer(keys, values)
        self._listed = torch.cat(list(positions))
        # entries beyond the listed positions follow each other from `_run_start` on, in every head
        self._run_start = 0

    @property
    def _run(self) -> int:
        return self._buffer.lengths[0] - self._listed_lengths[0]

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        self._run_on(position)
        heads = len(self._listed_lengths)
        self._buffer.append(spread(keys, heads), spread(values, heads))

    def stackable(self, position: int) -> Stackable | None:
        if type(self) is not RaggedStore:
            return None
        self._run_on(position)
        return self._buffer

    def _run_on(self, position: int) -> None:
        """Make sure that an entry at this position can follow the last one."""
        run = self._run
        if run and position != self._run_start + run:
            self._listed, self._listed_lengths, run = torch.cat(self.positions()).int(), self.lengths(), 0
        if not run:
            self._run_start = position

    def pack(self, make: MakeBuffer) -> Store:
        held = zip(self.keys(), self.values(), self.positions(), strict=True)
        heads = [DenseStore(keys[None], values[None], positions[None].int()) for keys, values, positions in held]
        return HeadwiseStore(heads).pack(make)

    def read(self, query: Tensor) -> Reading:
        return Reading(self.keys(), self.values(), self.positions)

    def positions(self) -> list[Tensor]:
        run = consecutive(self._run_start, self._run, self._listed.device)
        return [torch.cat([listed.long(), run]) for listed in self._listed.split(self._listed_lengths)]

    def keys(self) -> list[Tensor]:
        return self._buffer.segments(self._buffer.keys)

    def values(self) -> list[Tensor]:
        return self._buffer.segments(self._buffer.values)

    def lengths(self) -> list[int]:
        return list(self._buffer.lengths)

    def nbytes(self) -> int:
        return super().nbytes() + self._buffer.nbytes()

    def fork(self) -> Self:
        twin = copy(self)
        twin._buffer = self._buffer.fork()
        return twin


class HeadwiseStore(Store):
    """A store of its own for each head, so that heads of one layer may act differently while decoding."""

    def __init__(self, stores: Sequence[Store]) -> None:
        """One store a stored head, with that head alone in it."""
        self._stores = list(stores)
        self.observes = any(store.observes for store in stores)

    def pack(self, make: MakeBuffer) -> Store:
        heads = len(self._stores)
        self._stores = [store.pack(partial(make, head=head, heads=heads)) for head, store in enumerate(self._stores)]
        return self

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        heads = len(self._stores)
        parts = zip(spread(keys, heads).split(1), spread(values, heads).split(1), strict=True)
        for store, (key, value) in zip(self._stores, parts, strict=True):
            store.append(key, value, position)

    def read(self, query: Tensor) -> Reading:
        queries = query.split(len(query) // len(self._stores))
        readings = [store.read(part) for store, part in zip(self._stores, queries, strict=True)]
        keys, values = [reading.keys[0] for reading in readings], [reading.values[0] for reading in readings]
        return Reading(keys, values, lambda: [reading.positions()[0] for reading in readings])

    def observe(self, weights: Tensor | list[Tensor] | None) -> None:
        for head, store in enumerate(self._stores):
            store.observe(weights[head] if weights is not None and store.observes else None)

    def positions(self) -> list[Tensor]:
        return [store.positions()[0] for store in self._stores]

    def keys(self) -> list[Tensor]:
        return [store.keys()[0] for store in self._stores]

    def values(self) -> list[Tensor]:
        return [store.values()[0] for store in self._stores]

    def lengths(self) -> list[int]:
        return [store.lengths()[0] for store in self._stores]

    def holders(self) -> Iterator[Store]:
        return (holder for store in self._stores for holder in store.holders())

    def nbytes(self) -> int:
        return sum(store.nbytes() for store in self._stores)

    def fork(self) -> Self:
        twin = copy(self)
        twin._stores = [store.fork() for store in self._stores]
        return twin
