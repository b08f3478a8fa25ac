"""A buffer whose old entries are encoded in fewer bytes, and whose recent ones are as they are.

Everything here but the buffer itself is immutable, so that a fork shares it and neither side can change the other's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from .buffers import Buffer
from .indexing import entries


class Column(ABC):
    """Keys or values in fewer bytes, oldest first; heads hold equally many."""

    @abstractmethod
    def decoded(self) -> Tensor:
        """[heads, length, head_dim], float32."""

    @abstractmethod
    def keep(self, index: Tensor) -> Self:
        """Those at index [heads, count], as exact as they are here."""

    @abstractmethod
    def heads(self) -> list[Self]:
        """A column for each head."""

    @abstractmethod
    def joined(self, later: Self) -> Self:
        """These and the later ones."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of every tensor held."""


Encode = Callable[[Tensor], Column]


@dataclass(frozen=True)
class Piece:
    """Keys or values of some heads: encoded entries, and the recent ones as they are."""

    encode: Encode
    due: Callable[[int, int], int]
    """Of so many recent entries, behind so many old ones, how many are to be encoded."""
    recent: Tensor
    """[heads, recent, head_dim]."""
    old: Column | None = None
    old_length: int = 0

    def settled(self) -> Piece:
        """With those encoded that are due."""
        count = self.due(self.recent.shape[1], self.old_length)
        if not count:
            return self
        column = self.encode(self.recent[:, :count])
        old = column if self.old is None else self.old.joined(column)
        return replace(self, recent=self.recent[:, count:].clone(), old=old, old_length=self.old_length + count)

    def appended(self, x: Tensor) -> Piece:
        return replace(self, recent=torch.cat([self.recent, x], 1))

    def decoded(self) -> Tensor:
        """[heads, length, head_dim], in the dtype of the recent entries."""
        if self.old is None:
            return self.recent
        return torch.cat([self.old.decoded().to(self.recent.dtype), self.recent], 1)

    def keep(self, index: Tensor) -> list[Piece]:
        """Those at index [heads, count]: one piece, or one a head where heads keep different numbers of encoded ones."""
        counts = (index < self.old_length).sum(1)
        if counts.unique().numel() > 1:
            return [each for head, row in zip(self.heads(), index, strict=True) for each in head.keep(row[None])]
        count = int(counts[0])
        old = self.old.keep(index[:, :count]) if self.old is not None and count else None
        return [
            replace(self, recent=entries(self.recent, index[:, count:] - self.old_length), old=old, old_length=count)
        ]

    def heads(self) -> list[Piece]:
        """A piece for each head."""
        olds = [None] * len(self.recent) if self.old is None else self.old.heads()
        rows = self.recent.split(1)
        return [replace(self, recent=row.clone(), old=old) for row, old in zip(rows, olds, strict=True)]

    def nbytes(self) -> int:
        return self.recent.nbytes + (0 if self.old is None else self.old.nbytes())


class AgingBuffer(Buffer):
    """Old entries encoded, recent ones as they are; keys and values each by a schedule of their own."""

    def __init__(self, keys: Piece, values: Piece) -> None:
        """Pieces whose recent entries are all there is; those that are due are encoded at once."""
        self.length = keys.recent.shape[1]
        self._keys, self._values = [keys], [values]
        self.settle()

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._keys = _appended(self._keys, keys)
        self._values = _appended(self._values, values)
        self.length += keys.shape[1]

    def read(self) -> tuple[Tensor, Tensor]:
        keys, values = (torch.cat([piece.decoded() for piece in side]) for side in (self._keys, self._values))
        return keys, values

    def keep(self, index: Tensor) -> None:
        self._keys, self._values = _kept(self._keys, index), _kept(self._values, index)
        self.length = index.shape[1]

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Merged entries are encoded anew, all of them: a merge may have touched any."""
        self._keys = [replace(self._keys[0], recent=keys, old=None, old_length=0)]
        self._values = [replace(self._values[0], recent=values, old=None, old_length=0)]
        self.length = keys.shape[1]

    def settle(self) -> None:
        self._keys = [piece.settled() for piece in self._keys]
        self._values = [piece.settled() for piece in self._values]

    def nbytes(self) -> int:
        return sum(piece.nbytes() for piece in (*self._keys, *self._values))

    def fork(self) -> Self:
        return copy(self)


def _appended(side: list[Piece], x: Tensor) -> list[Piece]:
    return [piece.appended(part) for piece, part in zip(side, x.split(len(side[0].recent)), strict=True)]


def _kept(side: list[Piece], index: Tensor) -> list[Piece]:
    parts = index.split(len(side[0].recent))
    return [kept for piece, part in zip(side, parts, strict=True) for kept in piece.keep(part)]
