"""Stores of layers whose heads differ: in how many entries they hold, or in what they do while decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from functools import partial
from typing import Self

import torch
from torch import Tensor

from .buffers import MakeBuffer, room_for
from .stores import DenseStore, Reading, Store, consecutive, spread


class RaggedStore(Store):
    """Each head its own number of entries, one segment of a flat buffer a head: no head pays for another's length."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], positions: Sequence[Tensor]) -> None:
        """One [length, head_dim] key and value tensor and one [length] int32 position tensor a stored head."""
        self._listed_lengths = [len(each) for each in positions]
        self._listed = torch.cat(list(positions))
        # entries beyond the listed positions follow each other from `_run_start` on, in every head
        self._run_start, self._run = 0, 0
        self._room = 0  # free entries at the end of every segment
        self._keys, self._values = torch.cat(list(keys)), torch.cat(list(values))
        self._ends = torch.tensor(self._listed_lengths, device=self._keys.device).cumsum(0)
        self._shared = True

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        tokens, heads = keys.shape[1], len(self._listed_lengths)
        self._run_on(position)
        if self._shared or tokens > self._room:
            self._grow(tokens + room_for(max(self.lengths())))
        slots = self._ends
        if tokens > 1:
            slots = (slots[:, None] + consecutive(0, tokens, slots.device)).flatten()
        self._keys.index_copy_(0, slots, spread(keys, heads).flatten(0, 1))
        self._values.index_copy_(0, slots, spread(values, heads).flatten(0, 1))
        self._ends = self._ends + tokens
        self._run += tokens
        self._room -= tokens

    def _run_on(self, position: int) -> None:
        """Make sure that an entry at this position can follow the last one."""
        if self._run and position != self._run_start + self._run:
            self._listed, self._listed_lengths, self._run = torch.cat(self.positions()).int(), self.lengths(), 0
        if not self._run:
            self._run_start = position

    def _grow(self, room: int) -> None:
        def grown(old: Tensor) -> Tensor:
            free = old.new_empty(room, old.shape[1])
            return torch.cat([part for segment in self._segments(old) for part in (segment, free)])

        self._keys, self._values = grown(self._keys), grown(self._values)
        more = room - self._room
        self._ends = self._ends + more * consecutive(0, len(self._listed_lengths), self._ends.device)
        self._room = room
        self._shared = False

    def _segments(self, flat: Tensor) -> list[Tensor]:
        """The entries of each head, [length, head_dim], without the room behind them."""
        with_room = flat.split([length + self._room for length in self.lengths()])
        return [segment.narrow(0, 0, len(segment) - self._room) for segment in with_room]

    def pack(self, make: MakeBuffer) -> Store:
        held = zip(self.keys(), self.values(), self.positions(), strict=True)
        heads = [DenseStore(keys[None], values[None], positions[None].int()) for keys, values, positions in held]
        return HeadwiseStore(heads).pack(make)

    def read(self, query: Tensor) -> Reading:
        return Reading(self._segments(self._keys), self._segments(self._values), self.positions)

    def positions(self) -> list[Tensor]:
        run = consecutive(self._run_start, self._run, self._listed.device)
        return [torch.cat([listed.long(), run]) for listed in self._listed.split(self._listed_lengths)]

    def keys(self) -> list[Tensor]:
        return self._segments(self._keys)

    def values(self) -> list[Tensor]:
        return self._segments(self._values)

    def lengths(self) -> list[int]:
        return [length + self._run for length in self._listed_lengths]

    def fork(self) -> Self:
        self._shared = True
        return copy(self)


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
