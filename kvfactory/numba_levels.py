"""Encoded entries for compiled loops: what they are made of, and how a few at a time are written out as numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .growing import Growing
from .numba_entries import number, numbers, put, spread, turned, vector
from .numba_loops import compiled
from .numba_packed import levels, looked_up
from .numba_vectors import repeated, size
from .packing import Sparse, place_bits

HALF = np.float32(0.5)


class Encoded(NamedTuple):
    """Keys or values of some heads for compiled loops, perhaps with room behind them; arrays as `numbers` gives them."""

    length: int
    """Entries that are there."""
    packed: Any
    """[heads, capacity, bytes], uint8."""
    scale: Any
    """[heads or 1, groups of entries, head_dim] or [heads or 1, capacity, groups of channels]."""
    least: Any
    ends: Any
    """Where each group of entries ends, [heads, groups], int64; None if groups are of channels."""
    bits: Any
    """A `size`."""
    group: Any
    """Channels of a group, if groups are of channels; a `size`."""
    table: Any = None
    """What levels stand for, in ranges from `least` to `scale`; None if they are equally far apart."""
    rows: Any = None
    """What is added to entries, as shares of directions, [heads, capacity, directions]; None, as all below, if nothing."""
    directions: Any = None
    """[heads, blocks of entries, directions, head_dim]."""
    block_ends: Any = None
    """Where each block of entries ends, [heads, blocks], int64."""
    where: Any = None
    """Where numbers stand that are stored as they are, as in `packing.Sparse`."""
    what: Any = None
    of_head: int = 0
    """Bits of such a place."""
    of_channel: int = 0
    positions: Any = None
    """By which entries are turned in the end, [heads or 1, length]."""
    cos: Any = None
    """[positions, head_dim / 2]."""
    sin: Any = None


def uniform(
    packed: Growing, scale: Growing, least: Growing, counts: Tensor | None, bits: int, group_size: int
) -> Encoded:
    """Levels that are equally far apart, as `quantisation.UniformColumn` has them.

    `counts` [heads, groups] are of its groups of entries, if any.
    """
    ends = None if counts is None else _ends(counts)
    group = size(1 if counts is not None else group_size)
    return Encoded(packed.length, packed.array, scale.array, least.array, ends, size(bits), group)


def corrected(column: Encoded, rows: Tensor, directions: Tensor, counts: Tensor) -> Encoded:
    """A column with rows [heads, length, directions] times directions [heads, blocks, directions, head_dim] added to it.

    `counts` [heads, blocks] are of the entries of its blocks.
    """
    return column._replace(rows=numbers(rows), directions=numbers(directions), block_ends=_ends(counts))


def tabled(packed: Growing, lower: Tensor, upper: Tensor, of_entries: bool, table: Tensor, bits: int) -> Encoded:
    """Levels of a table [2 ** bits], from -1 to 1, in ranges as `nonuniform.Ranges` has them.

    Ranges are [heads or 1, length, 1], or [heads, 1, head_dim] for all entries.
    """
    heads, _, width = packed.held.shape
    ends = None if of_entries else np.full((heads, 1), packed.length)
    group = size(width * 8 // bits if of_entries else 1)
    ranges = numbers(upper), numbers(lower)
    return Encoded(packed.length, packed.array, *ranges, ends, size(bits), group, table=numbers(table))


def turned_by(column: Encoded, positions: Tensor, cos: Tensor, sin: Tensor) -> Encoded:
    """A column whose entries are turned by positions [heads or 1, length], of which cos and sin are a table."""
    return column._replace(positions=positions.contiguous().numpy(), cos=numbers(cos), sin=numbers(sin))


def with_exact(column: Encoded, exact: Sparse) -> Encoded:
    """A column with other numbers in place of some of its own."""
    heads, _, dim = exact.shape
    where, what = exact.where.read()[0].numpy(), numbers(exact.what.read()[0])
    of_head, of_channel = place_bits(heads, dim)
    return column._replace(where=where, what=what, of_head=of_head, of_channel=of_channel)


def _ends(counts: Tensor) -> Any:
    """Where groups of so many entries [heads, groups] end."""
    return counts.long().cumsum(1).numpy()


@compiled
def write(channels: Any, side: Any, head: Any, start: Any, count: Any, written: Any) -> None:
    """Write entries start... of a head as numbers, float32 [more than `count`, head_dim]; the last row is overwritten."""
    how = side.scale, side.least, side.ends, side.bits, side.group, side.table
    _decode(channels, head, start, count, side.packed, *how, written)
    _add_directions(channels, head, start, count, side.rows, side.directions, side.block_ends, written)
    _put_in_place(head, start, count, side.where, side.what, side.of_head, side.of_channel, written)
    _turn(channels, head, start, count, side.positions, side.cos, side.sin, written)


@compiled
def _decode(
    channels: Any,
    head: Any,
    start: Any,
    count: Any,
    packed: Any,
    scale: Any,
    least: Any,
    ends: Any,
    bits: Any,
    group: Any,
    table: Any,
    written: Any,
) -> None:
    """What the levels of entries start... of a head stand for."""
    first, entry, before = head * packed.shape[1] + start, 0, head % len(scale) * scale.shape[1]
    run_of = start
    if ends is not None:
        run_of = np.searchsorted(ends[head], start, side="right")
    while entry < count:
        place, stop = before + run_of, entry + 1
        if ends is not None:
            stop = min(ends[head, run_of] - start, count)
        apart, low = spread(scale, place, channels, group), spread(least, place, channels, group)
        if table is None:
            while entry < stop:
                put(written, entry, levels(packed, first + entry, channels, bits) * apart + low)
                entry += 1
        else:
            half = repeated(HALF, channels)
            width, middle = half * (apart - low), half * (apart + low)
            while entry < stop:
                put(written, entry, looked_up(packed, first + entry, channels, bits, table) * width + middle)
                entry += 1
        run_of += 1


@compiled
def _add_directions(
    channels: Any, head: Any, start: Any, count: Any, rows: Any, directions: Any, ends: Any, written: Any
) -> None:
    """Add to entries start... of a head what they have of their blocks' directions, if there are any."""
    if directions is not None:
        rank = directions.shape[2]
        block, entry = np.searchsorted(ends[head], start, side="right"), 0
        while entry < count:
            stop, place = min(ends[head, block] - start, count), (head * directions.shape[1] + block) * rank
            while entry < stop:
                whole, first = vector(written, entry, channels), (head * rows.shape[1] + start + entry) * rank
                for each in range(rank):
                    share = repeated(number(rows, first + each), channels)
                    whole = whole + share * vector(directions, place + each, channels)
                put(written, entry, whole)
                entry += 1
            block += 1


@compiled
def _put_in_place(
    head: Any, start: Any, count: Any, where: Any, what: Any, of_head: Any, of_channel: Any, written: Any
) -> None:
    """Write those numbers of entries start... of a head that are stored as they are, if any are."""
    if where is not None:
        bits, nowhere = of_head + of_channel, np.int32(len(written) - 1)
        for at in range(np.searchsorted(where, start << bits), len(where)):
            place, entry = where[at], (where[at] >> bits) - start
            if entry >= count:
                break
            own = place >> of_channel & (1 << of_head) - 1 == head  # no branch: nobody could foresee it
            written[np.uint32(entry if own else nowhere), np.uint32(place & (1 << of_channel) - 1)] = number(what, at)


@compiled
def _turn(channels: Any, head: Any, start: Any, count: Any, positions: Any, cos: Any, sin: Any, written: Any) -> None:
    """Turn entries start... of a head by their positions, if they have any."""
    if positions is not None:
        own = positions[head % len(positions)]
        for entry in range(count):
            put(written, entry, turned(vector(written, entry, channels), cos, sin, own[start + entry]))
