"""A buffer whose old entries are encoded in fewer bytes, and whose recent ones are as they are.

Everything here but the buffer itself is immutable, so that a fork shares it and neither side can change the other's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from .buffers import Buffer, Positions
from .indexing import entries
from .rotary import angles, rotated

if TYPE_CHECKING:
    from .numba_levels import Encoded


class Column(ABC):
    """Keys or values in fewer bytes, oldest first; heads hold equally many."""

    @abstractmethod
    def decoded(self) -> Tensor:
        """[heads, length, head_dim], float32."""

    def products(self, query: Tensor) -> Tensor:
        """Of query [heads, queries, head_dim] and each entry, [heads, queries, length], all float32."""
        return query @ self.decoded().transpose(1, 2)

    def mixed(self, weights: Tensor) -> Tensor:
        """Sums of the entries with weights [heads, queries, length], [heads, queries, head_dim], all float32."""
        return weights @ self.decoded()

    @property
    def compiled(self) -> Encoded | None:
        """These for compiled loops, which are faster than the two above; None where there are none for them."""
        return None

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


class Encoder(ABC):
    """How keys or values of some heads are encoded, and when."""

    frequencies: Tensor | None = None
    """Rotary angles by which entries are turned back when encoded and anew when read, [head_dim / 2]; None: they are not."""

    @abstractmethod
    def due(self, recent: int, old: int) -> int:
        """Of so many recent entries, behind so many old ones, how many are to be encoded."""

    @abstractmethod
    def encode(self, x: Tensor, positions: Positions) -> Column:
        """A column of the due entries x [heads, tokens, head_dim], which were turned back, and their positions."""

    def extended(self, old: Column, x: Tensor, positions: Positions) -> Column:
        """A column that this has made, and the entries of `encode` behind it."""
        return old.joined(self.encode(x, positions))

    def of_head(self, head: int) -> Encoder:
        """The encoder of one of these heads."""
        return self

    def nbytes(self) -> int:
        """Bytes of what it holds that is this sequence's own; what is the model's does not count."""
        return 0


@dataclass(frozen=True)
class Piece:
    """Keys or values of some heads: encoded entries, and the recent ones as they are."""

    encoder: Encoder
    recent: Tensor
    """[heads, recent, head_dim]."""
    old: Column | None = None
    old_length: int = 0

    def settled(self, positions: Positions) -> Piece:
        """With those encoded that are due."""
        count = self.encoder.due(self.recent.shape[1], self.old_length)
        if not count:
            return self
        end = self.old_length + count

        def of_due() -> Tensor:
            return positions()[:, self.old_length : end]

        x = self.recent[:, :count]
        x = x if self.encoder.frequencies is None else rotated(x, -of_due(), self.encoder.frequencies)
        encoder = self.encoder
        old = encoder.encode(x, of_due) if self.old is None else encoder.extended(self.old, x, of_due)
        return Piece(self.encoder, self.recent[:, count:].clone(), old, end)

    def appended(self, x: Tensor) -> Piece:
        return Piece(self.encoder, torch.cat([self.recent, x], 1), self.old, self.old_length)

    def decoded(self, positions: Positions) -> Tensor:
        """[heads, length, head_dim], in the dtype of the recent entries."""
        if self.old is None:
            return self.recent
        return torch.cat([self._written(self.old, positions).to(self.recent.dtype), self.recent], 1)

    def products(self, query: Tensor, positions: Positions) -> Tensor:
        """As `Column.products`, of all entries."""
        recent = query @ self.recent.float().transpose(1, 2)
        if self.old is None:
            return recent
        as_is = self.encoder.frequencies is None
        old = self.old.products(query) if as_is else query @ self._written(self.old, positions).transpose(1, 2)
        return torch.cat([old, recent], -1)

    def mixed(self, weights: Tensor, positions: Positions) -> Tensor:
        """As `Column.mixed`, of all entries."""
        recent = weights[..., self.old_length :] @ self.recent.float()
        if self.old is None:
            return recent
        of_old = weights[..., : self.old_length]
        as_is = self.encoder.frequencies is None
        return recent + (self.old.mixed(of_old) if as_is else of_old @ self._written(self.old, positions))

    def compiled(self, positions: Positions) -> Encoded | None:
        """The encoded entries for compiled loops, if there are any for them."""
        encoded = None if self.old is None else self.old.compiled
        if encoded is None or self.encoder.frequencies is None:
            return encoded
        from .numba_levels import turned_by  # late: nobody else waits for its import

        at = positions()[:, : self.old_length]
        return turned_by(encoded, at, *angles(self.encoder.frequencies, int(at[:, -1].max()) + 1))

    def _written(self, old: Column, positions: Positions) -> Tensor:
        """The encoded entries as they are read, [heads, length, head_dim], float32."""
        decoded, frequencies = old.decoded(), self.encoder.frequencies
        return decoded if frequencies is None else rotated(decoded, positions()[:, : self.old_length], frequencies)

    def keep(self, index: Tensor) -> list[Piece]:
        """Those at index [heads, count]: one piece, or one a head where heads keep different numbers of encoded ones."""
        counts = (index < self.old_length).sum(1)
        if counts.unique().numel() > 1:
            return [each for head, row in zip(self.heads(), index, strict=True) for each in head.keep(row[None])]
        count = int(counts[0])
        old = self.old.keep(index[:, :count]) if self.old is not None and count else None
        recent = entries(self.recent, index[:, count:] - self.old_length)
        return [Piece(self.encoder, recent, old, count)]

    def heads(self) -> list[Piece]:
        """A piece for each head."""
        rows = self.recent.split(1)
        olds = [None] * len(rows) if self.old is None else self.old.heads()
        return [
            Piece(self.encoder.of_head(head), row.clone(), old, self.old_length)
            for head, (row, old) in enumerate(zip(rows, olds, strict=True))
        ]

    def nbytes(self) -> int:
        return self.recent.nbytes + self.encoder.nbytes() + (0 if self.old is None else self.old.nbytes())


class AgingBuffer(Buffer):
    """Old entries encoded, recent ones as they are; keys and values each by a schedule of their own."""

    def __init__(self, keys: Piece, values: Piece) -> None:
        """Pieces whose recent entries are all there is; those that are due are encoded when the buffer settles."""
        self.length = keys.recent.shape[1]
        self._keys, self._values = [keys], [values]

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._keys = [piece.appended(x) for piece, x in _by_piece(self._keys, keys)]
        self._values = [piece.appended(x) for piece, x in _by_piece(self._values, values)]
        self.length += keys.shape[1]

    def read(self, positions: Positions) -> tuple[Tensor, Tensor]:
        keys, values = (
            torch.cat([piece.decoded(at) for piece, at in _located(side, positions)])
            for side in (self._keys, self._values)
        )
        return keys, values

    def attend(self, query: Tensor, positions: Positions) -> Tensor | None:
        if len(self._keys) > 1 or len(self._values) > 1:
            return None
        (keys,), (values,) = self._keys, self._values
        of_keys, of_values = keys.compiled(positions), values.compiled(positions)
        if of_keys is not None and of_values is not None:
            from .numba_encoded import attend  # late, too

            return attend(query, of_keys, keys.recent, of_values, values.recent)
        exact = query.float() / math.sqrt(query.shape[-1])
        weights = keys.products(exact, positions).softmax(-1)
        return values.mixed(weights, positions).to(query.dtype)

    def keep(self, index: Tensor) -> None:
        self._keys = [kept for piece, part in _by_piece(self._keys, index) for kept in piece.keep(part)]
        self._values = [kept for piece, part in _by_piece(self._values, index) for kept in piece.keep(part)]
        self.length = index.shape[1]

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Merged entries are encoded anew, all of them: a merge may have touched any."""
        self._keys = [Piece(piece.encoder, x) for piece, x in _by_piece(self._keys, keys)]
        self._values = [Piece(piece.encoder, x) for piece, x in _by_piece(self._values, values)]
        self.length = keys.shape[1]

    def settle(self, positions: Positions) -> None:
        self._keys = [piece.settled(at) for piece, at in _located(self._keys, positions)]
        self._values = [piece.settled(at) for piece, at in _located(self._values, positions)]

    def nbytes(self) -> int:
        return sum(piece.nbytes() for piece in (*self._keys, *self._values))

    def fork(self) -> Self:
        return copy(self)


def _by_piece(side: list[Piece], x: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """Pieces and their heads of x [heads, ...]."""
    if len(side) == 1:  # as nearly always
        return iter([(side[0], x)])
    return zip(side, x.split(len(x) // len(side)), strict=True)


def _located(side: list[Piece], positions: Positions) -> Iterator[tuple[Piece, Positions]]:
    """Pieces and what gives the positions of their entries; all heads have one where positions have one row."""
    if len(side) == 1:
        return iter([(side[0], positions)])

    def of(start: int, stop: int) -> Tensor:
        every = positions()
        return every if len(every) == 1 else every[start:stop]

    heads = len(side[0].recent)
    return ((piece, partial(of, start * heads, (start + 1) * heads)) for start, piece in enumerate(side))
