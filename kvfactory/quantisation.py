"""Uniform quantisation, by groups, of what is older than a window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .aging import AgingBuffer
from .buffers import Buffer, Positions
from .columns import Column, Encoder, Extensible, Piece
from .compiled import has_numba, has_vectors
from .context import LayerContext
from .errors import at_least, require
from .growing import Growing
from .indexing import entries
from .packing import Groups, pack, unpack
from .storage import Quantisation

if TYPE_CHECKING:
    from .numba_levels import Encoded

Bits = Literal[2, 3, 4, 8]
ENTRIES_AT_ONCE = 4096
"""Of a column that are written out together to be multiplied: more take longer, since their memory is asked for anew."""


@dataclass(frozen=True)
class UniformColumn(Extensible):
    """Levels that are equally far apart, between the least and the greatest entry of each group.

    A group is so many consecutive entries of one channel, or so many channels of one entry (asymmetric uniform
    quantisation; a group of equal numbers has a scale of 0 and is exact).
    """

    packed: Growing
    """[heads, length, head_dim * bits / 8], uint8."""
    scale: Growing
    """[heads, groups, head_dim] for groups of entries, [heads, length, groups] for groups of channels."""
    least: Growing
    """As `scale`."""
    groups: Groups | None
    """Of entries, or None for groups of channels."""
    bits: int
    group_size: int

    @classmethod
    def of(
        cls, packed: Tensor, scale: Tensor, least: Tensor, groups: Groups | None, bits: int, group_size: int
    ) -> UniformColumn:
        """The column of these tensors."""
        return cls(Growing(packed), Growing(scale), Growing(least), groups, bits, group_size)

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
        return cls.of(levels, scale.to(dtype), least.to(dtype), groups, bits, group_size)

    @classmethod
    def per_token(cls, x: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> UniformColumn:
        """Groups of channels of each entry of x [heads, length, head_dim]; the last may be short."""
        if has_numba(x.device):
            from .numba_encoding import by_channels  # late, as elsewhere: nobody else waits for its import

            *shape, dim = x.shape
            packed = Growing(x.new_empty(*shape, dim * bits // 8, dtype=torch.uint8))
            apart, low = (Growing(x.new_empty(*shape, -(-dim // group_size), dtype=dtype)) for _ in range(2))
            by_channels(x, packed.array, apart.array, low.array, 0, bits, group_size)
            return cls(packed, apart, low, None, bits, group_size)
        exact = x.float()
        least, most = (_by_channels(exact, group_size, reduce) for reduce in (torch.amin, torch.amax))
        scale = (most - least) / (2**bits - 1)
        levels = _levels(x, *(_of_channels(each, group_size, x.shape[-1]) for each in (least, scale)), bits=bits)
        return cls.of(levels, scale.to(dtype), least.to(dtype), None, bits, group_size)

    def extended(self, x: Tensor) -> UniformColumn:
        """These and entries x [heads, tokens, head_dim] behind them, where groups are of channels."""
        if not has_numba(x.device):
            return self.joined(UniformColumn.per_token(x, *self._form, self.scale.held.dtype))
        from .numba_encoding import by_channels  # late, too

        longer = self.with_room(x.shape[1])
        held = longer.packed.array, longer.scale.array, longer.least.array
        by_channels(x, *held, self.packed.length, *self._form)
        return longer

    def with_room(self, entries: int) -> UniformColumn:
        packed, scale, least = (each.extended(entries) for each in (self.packed, self.scale, self.least))
        return UniformColumn(packed, scale, least, None, *self._form)

    def first(self, count: int) -> UniformColumn:
        packed, scale, least = (each.first(count) for each in (self.packed, self.scale, self.least))
        return UniformColumn(packed, scale, least, None, *self._form)

    def decoded(self) -> Tensor:
        levels, scale, least = self._levels(), self.scale.read().float(), self.least.read().float()
        if self.groups is None:
            return self._scaled(levels, scale).add_(_of_channels(least, self.group_size, levels.shape[-1]))
        if size := self.groups.size:
            levels.unflatten(1, (-1, size)).mul_(scale[:, :, None]).add_(least[:, :, None])
            return levels
        index = self.groups.index()
        return levels.mul_(entries(scale, index)).add_(entries(least, index))

    def _levels(self, start: int = 0, end: int | None = None) -> Tensor:
        """Those of entries start..end, [heads, entries, head_dim], float32."""
        return unpack(self.packed.read()[:, start:end], self.bits).float()

    def _scaled(self, levels: Tensor, scale: Tensor) -> Tensor:
        """Levels times the scales of groups of channels, both float32; the levels are overwritten."""
        if levels.shape[-1] % self.group_size:
            return levels.mul_(_of_channels(scale, self.group_size, levels.shape[-1]))
        return levels.unflatten(-1, (-1, self.group_size)).mul_(scale[..., None]).flatten(-2)

    def products(self, query: Tensor) -> Tensor:
        if self.groups is None or not self.groups.size:
            return super().products(query)
        return torch.cat([self._products(query, *part) for part in self._parts(self.groups.size)], -1)

    def mixed(self, weights: Tensor) -> Tensor:
        if self.groups is not None:
            return super().mixed(weights)
        return torch.stack([self._mixed(weights, *part) for part in self._parts(1)]).sum(0)

    @cached_property
    def compiled(self) -> Encoded | None:
        packed = self.packed.held
        if not has_vectors(packed.device, packed.shape[2] * 8 // self.bits):
            return None
        from .numba_levels import uniform

        counts = None if self.groups is None else self.groups.counts
        return uniform(self.packed, self.scale, self.least, counts, *self._form)

    def _parts(self, step: int) -> Iterator[tuple[int, int]]:
        """Starts and ends of runs of entries, whole groups of `step`, that are worked on together."""
        length, at_once = self.packed.length, max(ENTRIES_AT_ONCE // step, 1) * step
        return ((start, min(start + at_once, length)) for start in range(0, max(length, 1), at_once))

    def _products(self, query: Tensor, start: int, end: int) -> Tensor:
        """With groups of consecutive entries: scales go to the query, and what all entries of a group share is added."""
        assert self.groups is not None and self.groups.size
        size = self.groups.size
        scale, least = (x.read()[:, start // size : end // size].float() for x in (self.scale, self.least))
        scaled = query[:, None] * scale[:, :, None]
        shared = (query @ least.transpose(1, 2)).transpose(1, 2)
        levels = self._levels(start, end).view(-1, size, query.shape[-1])
        products = torch.baddbmm(shared.flatten(0, 1)[..., None], scaled.flatten(0, 1), levels.transpose(1, 2))
        return products.unflatten(0, scaled.shape[:2]).transpose(1, 2).flatten(2)

    def _mixed(self, weights: Tensor, start: int, end: int) -> Tensor:
        """With groups of channels: what all channels of a group share is mixed by itself."""
        some, levels = weights[..., start:end], self._levels(start, end)
        scale, least = (x.read()[:, start:end].float() for x in (self.scale, self.least))
        shared = _of_channels(some @ least, self.group_size, levels.shape[-1])
        return shared + some @ self._scaled(levels, scale)

    def keep(self, index: Tensor) -> UniformColumn:
        packed, scale, least = entries(self.packed.read(), index), self.scale.read(), self.least.read()
        if self.groups is None:
            return UniformColumn.of(packed, entries(scale, index), entries(least, index), None, *self._form)
        groups, left = self.groups.keep(index)
        return UniformColumn.of(packed, scale[:, left], least[:, left], groups, *self._form)

    def heads(self) -> list[UniformColumn]:
        packed, scale, least = (each.read().split(1) for each in (self.packed, self.scale, self.least))
        groups = [None] * len(packed) if self.groups is None else self.groups.heads()
        return [
            UniformColumn.of(p.clone(), s.clone(), m.clone(), group, *self._form)
            for p, s, m, group in zip(packed, scale, least, groups, strict=True)
        ]

    def joined(self, later: UniformColumn) -> UniformColumn:
        packed, scale, least = (
            earlier.joined(new.read())
            for earlier, new in (
                (self.packed, later.packed),
                (self.scale, later.scale),
                (self.least, later.least),
            )
        )
        groups = self.groups and later.groups and self.groups.joined(later.groups)
        return UniformColumn(packed, scale, least, groups, *self._form)

    @property
    def _form(self) -> tuple[int, int]:
        return self.bits, self.group_size

    def nbytes(self) -> int:
        counts = 0 if self.groups is None else self.groups.counts.nbytes
        return self.packed.nbytes + self.scale.nbytes + self.least.nbytes + counts


def _by_channels(x: Tensor, group_size: int, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """[..., dim] -> [..., groups of channels], of which the last may be short."""
    if x.shape[-1] % group_size == 0:
        return reduce(x.unflatten(-1, (-1, group_size)), -1)
    return torch.stack([reduce(part, -1) for part in x.split(group_size, -1)], -1)


def _of_channels(x: Tensor, group_size: int, dim: int) -> Tensor:
    """[..., groups of channels] -> [..., dim]."""
    return x.repeat_interleave(group_size, -1)[..., :dim]


def _levels(x: Tensor, least: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """Packed levels of x between the least entry and 2 ** bits - 1 scales above, all [heads, length, head_dim]."""
    steps = torch.where(scale > 0, (x.float() - least) / scale, 0)  # a group of equal numbers has no scale
    return pack(steps.clamp(0, 2**bits - 1).round().to(torch.uint8), bits)


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
        sides = (keys, self.axis_key), (values, self.axis_value)
        return AgingBuffer(*(Piece(AlongAxis(self, axis), x.clone()) for x, axis in sides))

    def due(self, axis: int, recent: int) -> int:
        """How many of so many recent entries are to be quantised."""
        length = self.quant_residual_length
        return recent - recent % length if axis == 0 else max(recent - length, 0)

    def encode(self, x: Tensor, axis: int) -> Column:
        """A column of x [heads, length, head_dim]."""
        quantise = UniformColumn.per_channel if axis == 0 else UniformColumn.per_token
        return quantise(x, self.nbits, self.q_group_size or x.shape[1 + axis], self.stored_dtype(x))

    def extended(self, old: Column, x: Tensor, axis: int) -> Column:
        """A column of what is encoded already, and x behind it."""
        plain = self.extensible(old, axis)
        return old.joined(self.encode(x, axis)) if plain is None else plain.extended(x)

    def extensible(self, old: Column, axis: int) -> UniformColumn | None:
        """A column that is levels in groups of channels and nothing else, if that is how entries are encoded."""
        own = type(self).encode is WindowedQuantisation.encode
        return old if own and axis == 1 and isinstance(old, UniformColumn) else None

    def stored_dtype(self, x: Tensor) -> torch.dtype:
        """The type of scales and whatever else is stored beside levels."""
        return stored_dtype(x, self.scale_dtype)


@dataclass(frozen=True)
class AlongAxis(Encoder):
    """Keys or values in groups of entries, axis 0, or of channels, axis 1."""

    quantisation: WindowedQuantisation
    axis: int

    def due(self, recent: int, old: int) -> int:
        return self.quantisation.due(self.axis, recent)

    def encode(self, x: Tensor, positions: Positions) -> Column:
        return self.quantisation.encode(x, self.axis)

    def extended(self, old: Column, x: Tensor, positions: Positions) -> Column:
        return self.quantisation.extended(old, x, self.axis)

    def extensible(self, old: Column) -> Extensible | None:
        return self.quantisation.extensible(old, self.axis)


def stored_dtype(x: Tensor, scale_dtype: str) -> torch.dtype:
    """The type of what is stored beside the levels of x: `model`, that of x, or float16."""
    return x.dtype if scale_dtype == "model" else torch.float16
