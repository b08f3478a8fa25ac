"""Keys or values of which the old ones are encoded in fewer bytes, and the recent ones are as they are.

Everything here is immutable, so that a fork shares it and neither side can change the other's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from .buffers import Positions
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


class Extensible(Column):
    """One that compiled loops may write to: levels, equally far apart in groups of channels."""

    @abstractmethod
    def with_room(self, entries: int) -> Self:
        """These and so many more, which are written at once or never read."""

    @abstractmethod
    def first(self, count: int) -> Self:
        """So many of them."""


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

    def extensible(self, old: Column) -> Extensible | None:
        """A column, if entries are encoded as it is and by nothing else, so that compiled loops may go on with it."""
        return None

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

    def unturned(self, dtype: torch.dtype) -> Encoded | None:
        """The encoded entries as loops go on with them: those that are read as they lie, beside recent ones of this type."""
        as_is = self.encoder.frequencies is None and self.recent.dtype == dtype
        return self.old.compiled if as_is and self.old is not None else None

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
