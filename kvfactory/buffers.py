"""How a store holds its entries: as they are, or in fewer bytes. What is kept is the store's business."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import Protocol, Self

from torch import Tensor

from .indexing import entries

Positions = Callable[[], Tensor]
"""Gives the true positions of a store's entries, [heads or 1, length], ascending."""


class Buffer(ABC):
    """Keys and values of one store, equally many in every head; oldest first."""

    length: int
    """Entries held, in each head."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add entries [heads, tokens, head_dim]."""

    @abstractmethod
    def read(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """Keys and values [heads, length, head_dim], in the model's dtype; what was just appended is as it came."""

    @abstractmethod
    def keep(self, index: Tensor) -> None:
        """Let go of all entries but index [heads, count], which is ascending in each head."""

    @abstractmethod
    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold these entries [heads, count, head_dim], which are new tensors, in place of all there are."""

    def settle(self, positions: Positions) -> None:
        """A step's attention is done: the place to hold what grew old in fewer bytes."""

    def nbytes(self) -> int:
        """Bytes of every tensor held, room to grow included."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    @abstractmethod
    def fork(self) -> Self:
        """A second buffer that starts from here; writing to one leaves the other alone."""


class MakeBuffer(Protocol):
    """Makes a buffer of keys and values [heads, length, head_dim]: of all heads, or of one of so many."""

    def __call__(self, keys: Tensor, values: Tensor, head: int | None = None, heads: int = 1) -> Buffer: ...


class PlainBuffer(Buffer):
    """Entries as they are, with room behind them."""

    def __init__(self, keys: Tensor, values: Tensor, limit: int | None = None) -> None:
        """Keys and values [heads, length, head_dim]; no room is made beyond the `limit`, if there is one."""
        self.keys, self.values = keys, values
        self.length = keys.shape[1]
        self.limit = limit
        self.shared = True  # the tensors may be somebody else's too: copy before the first write

    def append(self, keys: Tensor, values: Tensor) -> None:
        start, tokens = self.length, keys.shape[1]
        if self.shared or start + tokens > self.keys.shape[1]:
            self.grow(start + tokens)
        self.keys.narrow(1, start, tokens).copy_(keys)
        self.values.narrow(1, start, tokens).copy_(values)
        self.length = start + tokens

    def grow(self, needed: int) -> None:
        """Make room for `needed` entries, in tensors that are nobody else's."""
        capacity = needed + room_for(needed) if self.limit is None else max(needed, self.limit)

        def grown(old: Tensor) -> Tensor:
            new = old.new_empty(old.shape[0], capacity, old.shape[2])
            new[:, : self.length] = old[:, : self.length]
            return new

        self.keys, self.values = grown(self.keys), grown(self.values)
        self.shared = False

    def read(self, positions: Positions) -> tuple[Tensor, Tensor]:
        return self.keys.narrow(1, 0, self.length), self.values.narrow(1, 0, self.length)

    def keep(self, index: Tensor) -> None:
        self.replace(entries(self.keys, index), entries(self.values, index))

    def replace(self, keys: Tensor, values: Tensor) -> None:
        self.length = keys.shape[1]
        if self.shared or self.keys.shape[1] != self.limit or self.length > self.limit:
            self.keys, self.values, self.shared = keys, values, False
        else:  # the room is what it should be
            self.keys[:, : self.length] = keys
            self.values[:, : self.length] = values

    def fork(self) -> Self:
        self.shared = True
        return copy(self)


class Rows:
    """A tensor that grows along its first dimension."""

    def __init__(self, rows: Tensor) -> None:
        self._held, self._length = rows, len(rows)
        self._shared = False

    def append(self, rows: Tensor) -> None:
        needed = self._length + len(rows)
        if self._shared or needed > len(self._held):
            grown = self._held.new_empty(needed + room_for(needed), *self._held.shape[1:])
            grown[: self._length] = self.read()
            self._held, self._shared = grown, False
        self._held[self._length : needed] = rows
        self._length = needed

    def read(self) -> Tensor:
        return self._held[: self._length]

    @property
    def nbytes(self) -> int:
        return self._held.nbytes

    def fork(self) -> Self:
        self._shared = True
        return copy(self)


def room_for(length: int) -> int:
    """Entries to make room for when a full buffer has to grow: an eighth more, so appending stays cheap."""
    return max(16, length // 8)
