"""Quantised storage: what any method keeps, held in fewer bits. Eviction comes first, and goes on among quantised entries.

Everything here but the buffer itself is immutable, so that a fork shares it and neither side can change the other's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor

from .buffers import Buffer
from .context import LayerContext
from .errors import at_least, require
from .indexing import entries
from .packing import Groups, pack, unpack
from .parts import Part

Bits = Literal[2, 3, 4, 8]


@dataclass(frozen=True, kw_only=True)
class Quantisation(Part, ABC):
    """How entries are stored in few bits; its dataclass fields are settings, as a method's are."""

    @abstractmethod
    def buffer(self, layer: LayerContext, keys: Tensor, values: Tensor) -> Buffer:
        """A buffer of these entries [heads, length, head_dim], which a method kept of a layer."""


class Column(ABC):
    """Keys or values in few bits, oldest first; heads hold equally many."""

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


@dataclass(frozen=True)
class UniformColumn(Column):
    """Levels that are equally far apart, between the least and the greatest entry of each group.

    A group is so many consecutive entries of one channel, or so many channels of one entry (asymmetric uniform
    quantisation; a group of equal numbers has a scale of 0 and is exact).
    """

    packed: Tensor
    """[heads, length, head_dim * bits / 8], uint8."""
    scale: Tensor
    """[heads, groups, head_dim] for groups of entries, [heads, length, groups] for groups of channels."""
    least: Tensor
    """As `scale`."""
    groups: Groups | None
    """Of entries, or None for groups of channels."""
    bits: int
    group_size: int

    @classmethod
    def per_channel(cls, x: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> UniformColumn:
        """Groups of consecutive entries of x [heads, length, head_dim]; the last may be short."""
        heads, tokens, _ = x.shape
        groups = Groups.of(heads, tokens, group_size, x.device)
        parts = x.float().split(group_size, 1)
        least = torch.stack([part.amin(1) for part in parts], 1)
        most = torch.stack([part.amax(1) for part in parts], 1)
        scale = (most - least) / (2**bits - 1)
        index = groups.index()
        levels = _levels(x, entries(least, index), entries(scale, index), bits=bits)
        return cls(levels, scale.to(dtype), least.to(dtype), groups, bits, group_size)

    @classmethod
    def per_token(cls, x: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> UniformColumn:
        """Groups of channels of each entry of x [heads, length, head_dim]; the last may be short."""
        parts = x.float().split(group_size, -1)
        least = torch.stack([part.amin(-1) for part in parts], -1)
        most = torch.stack([part.amax(-1) for part in parts], -1)
        scale = (most - least) / (2**bits - 1)
        levels = _levels(x, *(_of_channels(each, group_size, x.shape[-1]) for each in (least, scale)), bits=bits)
        return cls(levels, scale.to(dtype), least.to(dtype), None, bits, group_size)

    def decoded(self) -> Tensor:
        levels, scale, least = unpack(self.packed, self.bits).float(), self.scale.float(), self.least.float()
        if self.groups is None:
            dim = levels.shape[-1]
            return levels * _of_channels(scale, self.group_size, dim) + _of_channels(least, self.group_size, dim)
        index = self.groups.index()
        return levels * entries(scale, index) + entries(least, index)

    def keep(self, index: Tensor) -> UniformColumn:
        packed = entries(self.packed, index)
        if self.groups is None:
            return UniformColumn(packed, entries(self.scale, index), entries(self.least, index), None, *self._form)
        groups, left = self.groups.keep(index)
        return UniformColumn(packed, self.scale[:, left], self.least[:, left], groups, *self._form)

    def heads(self) -> list[UniformColumn]:
        groups = [None] * len(self.packed) if self.groups is None else self.groups.heads()
        parts = zip(self.packed.split(1), self.scale.split(1), self.least.split(1), groups, strict=True)
        return [UniformColumn(p.clone(), s.clone(), m.clone(), group, *self._form) for p, s, m, group in parts]

    def joined(self, later: UniformColumn) -> UniformColumn:
        packed, scale, least = (
            torch.cat(pair, 1)
            for pair in ((self.packed, later.packed), (self.scale, later.scale), (self.least, later.least))
        )
        groups = self.groups and later.groups and self.groups.joined(later.groups)
        return UniformColumn(packed, scale, least, groups, *self._form)

    @property
    def _form(self) -> tuple[int, int]:
        return self.bits, self.group_size

    def nbytes(self) -> int:
        counts = 0 if self.groups is None else self.groups.counts.nbytes
        return self.packed.nbytes + self.scale.nbytes + self.least.nbytes + counts


def _of_channels(x: Tensor, group_size: int, dim: int) -> Tensor:
    """[..., groups of channels] -> [..., dim]."""
    return x.repeat_interleave(group_size, -1)[..., :dim]


def _levels(x: Tensor, least: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """Packed levels of x between the least entry and 2 ** bits - 1 scales above, all [heads, length, head_dim]."""
    steps = torch.where(scale > 0, (x.float() - least) / scale, 0)  # a group of equal numbers has no scale
    return pack(steps.clamp(0, 2**bits - 1).round().to(torch.uint8), bits)


Encode = Callable[[Tensor], Column]


@dataclass(frozen=True)
class Piece:
    """Keys or values of some heads: quantised entries, and the recent ones as they are."""

    encode: Encode
    due: Callable[[int], int]
    """How many of so many recent entries are to be quantised."""
    recent: Tensor
    """[heads, recent, head_dim]."""
    old: Column | None = None
    old_length: int = 0

    def settled(self) -> Piece:
        """With those quantised that are due."""
        count = self.due(self.recent.shape[1])
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
        """Those at index [heads, count]: one piece, or one a head where heads keep different numbers of quantised ones."""
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


class QuantisedBuffer(Buffer):
    """Old entries in few bits, recent ones as they are; keys and values each by a schedule of their own."""

    def __init__(self, keys: Piece, values: Piece) -> None:
        """Pieces whose recent entries are all there is; those that are due are quantised at once."""
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
        """Merged entries are quantised anew, all of them: a merge may have touched any."""
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


@dataclass(frozen=True, kw_only=True)
class WindowedQuantisation(Quantisation):
    """Quantises what is older than a window of recent entries, along channels or along tokens."""

    nbits: Bits = 2
    """Bits of a level."""
    q_group_size: int | None = 32
    """Entries, or channels, that share a scale and a zero point; none: all that are quantised together, or all channels."""
    axis_key: Literal[0, 1] = 0
    """Groups of keys: 0, consecutive entries of one channel; 1, channels of one entry."""
    axis_value: Literal[0, 1] = 1
    """Groups of values, likewise."""
    quant_residual_length: int = 128
    """Recent entries in full precision. Groups of entries wait until there are so many and are quantised together,
    groups of channels leave the window one entry at a time."""
    scale_dtype: Literal["float16", "model"] = "float16"
    """What scales and zero points are stored in: float16, or the model's own type."""

    def __post_init__(self) -> None:
        at_least(self, q_group_size=1, quant_residual_length=1)

    def buffer(self, layer: LayerContext, keys: Tensor, values: Tensor) -> Buffer:
        dim = keys.shape[-1]
        require(dim % 8 == 0, f"quantised storage takes a head_dim that is a multiple of 8, and this model's is {dim}")
        return QuantisedBuffer(self._piece(keys, self.axis_key), self._piece(values, self.axis_value))

    def _piece(self, x: Tensor, axis: int) -> Piece:
        return Piece(lambda part: self.encode(part, axis), partial(self.due, axis), x.clone())

    def due(self, axis: int, recent: int) -> int:
        """How many of so many recent entries are to be quantised."""
        length = self.quant_residual_length
        return recent - recent % length if axis == 0 else max(recent - length, 0)

    def encode(self, x: Tensor, axis: int) -> Column:
        """A column of x [heads, length, head_dim]."""
        quantise = UniformColumn.per_channel if axis == 0 else UniformColumn.per_token
        return quantise(x, self.nbits, self.q_group_size or x.shape[1 + axis], self.stored_dtype(x))

    def stored_dtype(self, x: Tensor) -> torch.dtype:
        """The type of scales and whatever else is stored beside levels."""
        return x.dtype if self.scale_dtype == "model" else torch.float16
