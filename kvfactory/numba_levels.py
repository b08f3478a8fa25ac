"""The newest token's attention over encoded entries on a CPU, compiled by Numba.

A few entries at a time are written out as numbers, in the nearest cache, and multiplied there: none ever is in memory.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .compiled import WIDEST
from .growing import Growing
from .numba_entries import number, numbers, put, spread, turned, vector
from .numba_kernels import join_parts, parts_of
from .numba_loops import compiled, in_threads, run, softmax_sums
from .numba_packed import levels, looked_up
from .numba_products import products
from .numba_vectors import repeated, size
from .packing import Sparse, place_bits

AT_ONCE = 64
"""Entries that are written out together."""
HALF = np.float32(0.5)
PART = 1024
"""Entries of a head that a thread attends to before another may go on with the rest."""


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
    """Where each group of entries ends, [heads, groups], int64; [heads, 0] if groups are of channels."""
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
    ends = np.empty((len(packed.held), 0), np.int64) if counts is None else _ends(counts)
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
    ends = np.empty((heads, 0), np.int64) if of_entries else np.full((heads, 1), packed.length)
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


def attend(query: Tensor, keys: Encoded, recent_keys: Tensor, values: Encoded, recent_values: Tensor) -> Tensor:
    """Attention of query [heads, queries, head_dim] over encoded entries and the recent ones [heads, recent, head_dim].

    How many are recent may differ between keys and values. Sums are float32, the output is of the query's dtype.
    """
    query = query.contiguous()
    output = torch.empty_like(query)
    sides = keys, numbers(recent_keys), values, numbers(recent_values)
    run(_attend_alone, _attend_in_threads, numbers(query), size(query.shape[2]), *sides, numbers(output))
    return output


@compiled
def _write(side: Any, recent: Any, channels: Any, head: Any, start: Any, count: Any, written: Any) -> None:
    """Write entries start... of a head, encoded and recent ones, as numbers [entries, head_dim]."""
    old = min(max(side.length - start, 0), count)
    if old:
        how = side.scale, side.least, side.ends, side.bits, side.group, side.table
        _decode(channels, head, start, old, side.packed, *how, written)
        _add_directions(channels, head, start, old, side.rows, side.directions, side.block_ends, written)
        _put_in_place(head, start, old, side.where, side.what, side.of_head, side.of_channel, written)
        _turn(channels, head, start, old, side.positions, side.cos, side.sin, written)
    first = head * recent.shape[1] + start - side.length
    for entry in range(old, count):
        put(written, entry, vector(recent, first + entry, channels))


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
    first, entry = head * packed.shape[1] + start, 0
    of_entries, before = ends.shape[1] > 0, head % len(scale) * scale.shape[1]
    run_of = np.searchsorted(ends[head], start, side="right") if of_entries else start
    while entry < count:
        place, stop = before + run_of, min(ends[head, run_of] - start, count) if of_entries else entry + 1
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


@compiled
def _attend_to_parts(
    thread: Any,
    threads: Any,
    query: Any,
    channels: Any,
    keys: Any,
    recent_keys: Any,
    values: Any,
    recent_values: Any,
    highest: Any,
    sums: Any,
    mixtures: Any,
) -> None:
    """Every `threads`-th part: its highest logit, and over it the sums of weights and of weighted values, a query each."""
    heads, parts, queries, dim = mixtures.shape
    length, scale = keys.length + recent_keys.shape[1], repeated(np.float32(1 / math.sqrt(dim)), channels)
    exact, logits = np.empty((queries, dim), np.float32), np.empty((queries, PART), np.float32)
    written = np.empty((AT_ONCE + 1, dim), np.float32)  # the last is nobody's
    for job in range(thread, heads * parts, threads):
        head, part = job // parts, job % parts
        begin, end = part * PART, min((part + 1) * PART, length)
        for each in range(queries):
            put(exact, each, scale * vector(query, head * queries + each, channels))
        for start in range(begin, end, AT_ONCE):
            count = min(AT_ONCE, end - start)
            _write(keys, recent_keys, channels, head, start, count, written)
            for each in range(queries):
                row = vector(exact, each, channels)
                for entry in range(0, count, WIDEST):  # what is behind the last is overwritten or never read
                    place = (each * PART + start - begin + entry) // WIDEST
                    put(logits, place, products(row, written, entry))
        for each in range(queries):
            highest[head, part, each], sums[head, part, each] = softmax_sums(logits[each][: end - begin])
            put(mixtures, job * queries + each, repeated(np.float32(0), channels))
        for start in range(begin, end, AT_ONCE):
            count = min(AT_ONCE, end - start)
            _write(values, recent_values, channels, head, start, count, written)
            for each in range(queries):
                mixture = vector(mixtures, job * queries + each, channels)
                for entry in range(count):
                    weight = repeated(logits[each, start - begin + entry], channels)
                    mixture = mixture + weight * vector(written, entry, channels)
                put(mixtures, job * queries + each, mixture)


@compiled
def _attend_alone(
    thread: Any,
    threads: Any,
    query: Any,
    channels: Any,
    keys: Any,
    recent_keys: Any,
    values: Any,
    recent_values: Any,
    output: Any,
) -> None:
    """The attention of all heads, in one thread."""
    heads = len(query)
    highest, sums, mixtures = parts_of(heads, query, keys.length + recent_keys.shape[1], PART)
    _attend_to_parts(
        thread, threads, query, channels, keys, recent_keys, values, recent_values, highest, sums, mixtures
    )
    join_parts(channels, highest, sums, mixtures, np.arange(heads), output)


@in_threads
def _attend_in_threads(
    threads: Any,
    query: Any,
    channels: Any,
    keys: Any,
    recent_keys: Any,
    values: Any,
    recent_values: Any,
    output: Any,
) -> None:
    heads = len(query)
    highest, sums, mixtures = parts_of(heads, query, keys.length + recent_keys.shape[1], PART)
    for thread in prange(threads):
        _attend_to_parts(
            thread,
            threads,
            query,
            channels,
            keys,
            recent_keys,
            values,
            recent_values,
            highest,
            sums,
            mixtures,
        )
    join_parts(channels, highest, sums, mixtures, np.arange(heads), output)
