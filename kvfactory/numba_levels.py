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

from .numba_kernels import join_parts
from .numba_loops import compiled, exact, in_threads, run, softmax_sums
from .numba_vectors import levels, number, numbers, put, repeated, size, spread, total, vector

AT_ONCE = 64
"""Entries that are written out together."""
PART = 1024
"""Entries of a head that a thread attends to before another may go on with the rest."""


class Encoded(NamedTuple):
    """Keys or values of some heads for compiled loops, perhaps with room behind them; arrays as `numbers` gives them."""

    length: int
    """Entries that are there."""
    packed: Any
    """[heads, capacity, bytes], uint8."""
    scale: Any
    """[heads, groups of entries, head_dim] or [heads, capacity, groups of channels]."""
    least: Any
    ends: Any
    """Where each group of entries ends, [heads, groups], int64; [heads, 0] if groups are of channels."""
    bits: Any
    """A `size`."""
    group: Any
    """Channels of a group, if groups are of channels; a `size`."""
    rows: Any = np.empty((0, 0, 0), np.float32)
    """What is added to entries, as shares of directions: [heads, capacity, directions]."""
    directions: Any = np.empty((0, 0, 0, 0), np.float32)
    """[heads, blocks of entries, directions, head_dim]."""
    block_ends: Any = np.empty((0, 0), np.int64)
    """Where each block of entries ends, [heads, blocks], int64."""
    where: Any = np.empty(0, np.int32)
    """Where numbers stand in the entries [heads, length, head_dim] that are stored as they are, ascending."""
    what: Any = np.empty(0, np.float32)


def uniform(
    length: int, packed: Tensor, scale: Tensor, least: Tensor, counts: Tensor | None, bits: int, group_size: int
) -> Encoded:
    """Levels that are equally far apart, as `quantisation.UniformColumn` has them.

    `counts` [heads, groups] are of its groups of entries, if any.
    """
    ends = np.empty((len(packed), 0), np.int64) if counts is None else _ends(counts)
    group = size(1 if counts is not None else group_size)
    return Encoded(length, numbers(packed), numbers(scale), numbers(least), ends, size(bits), group)


def corrected(
    column: Encoded, rows: Tensor, directions: Tensor, counts: Tensor, where: Tensor, what: Tensor
) -> Encoded:
    """A column with rows [heads, length, directions] times directions [heads, blocks, directions, head_dim] added to it.

    `counts` [heads, blocks] are of the entries of its blocks. After that, there is `what` in its numbers at `where`.
    """
    more = numbers(rows), numbers(directions), _ends(counts), where.numpy(), numbers(what)
    return column._replace(**dict(zip(Encoded._fields[-5:], more, strict=True)))


def _ends(counts: Tensor) -> Any:
    """Where groups of so many entries [heads, groups] end."""
    return counts.long().cumsum(1).numpy()


def attend(query: Tensor, keys: Encoded, recent_keys: Tensor, values: Encoded, recent_values: Tensor) -> Tensor:
    """Attention of query [heads, queries, head_dim] over encoded entries and the recent ones [heads, recent, head_dim].

    float32; how many are recent may differ between keys and values.
    """
    exact_query = numbers(query.float() / math.sqrt(query.shape[-1]))
    heads, queries, dim = query.shape
    length = keys.length + recent_keys.shape[1]
    highest = np.empty((heads, -(-length // PART), queries), np.float32)
    sums, mixtures = np.empty_like(highest), np.empty((*highest.shape, dim), np.float32)
    sides = (*keys, numbers(recent_keys)), (*values, numbers(recent_values))
    run(_attend_to_parts, _attend_in_threads, exact_query, size(dim), length, *sides, highest, sums, mixtures)
    join_parts(highest, sums, mixtures, exact_query)
    return torch.from_numpy(exact_query)


def by_channels(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed levels, scales and least numbers of x [heads, length, head_dim], float32, in groups of channels.

    [heads, length, head_dim * bits / 8], uint8, and [heads, length, groups], float32, to the bit as torch has them.
    """
    *shape, dim = x.shape
    packed = np.zeros((*shape, dim * bits // 8), np.uint8)
    scale, least = np.empty((2, *shape, -(-dim // group_size)), np.float32)
    _encode(x.contiguous().numpy(), packed, scale, least, bits, group_size)
    return torch.from_numpy(packed), torch.from_numpy(scale), torch.from_numpy(least)


@exact
def _encode(x: Any, packed: Any, scale: Any, least: Any, bits: Any, group_size: Any) -> None:
    """See `by_channels`."""
    heads, tokens, dim = x.shape
    most, found = np.float32((1 << bits) - 1), np.empty(dim, np.uint8)
    for head, entry in np.ndindex(heads, tokens):
        for part in range(scale.shape[2]):
            begin, end = part * group_size, min((part + 1) * group_size, dim)
            low = high = x[head, entry, begin]
            for channel in range(begin, end):
                low, high = min(low, x[head, entry, channel]), max(high, x[head, entry, channel])
            apart = (high - low) / most
            scale[head, entry, part], least[head, entry, part] = apart, low
            for channel in range(begin, end):
                step = (x[head, entry, channel] - low) / apart if apart > 0 else np.float32(0)
                found[channel] = np.uint8(np.rint(min(max(step, np.float32(0)), most)))
        first = shift = 0
        for width in (8, 4, 2, 1):
            if bits & width:
                length, mask = dim * width // 8, (1 << width) - 1
                for channel in range(dim):
                    field = ((found[channel] >> shift) & mask) << (channel // length * width)
                    packed[head, entry, first + channel % length] |= field
                first, shift = first + length, shift + width


@compiled
def _write(side: Any, channels: Any, head: Any, start: Any, count: Any, written: Any) -> None:
    """Write entries start... of a head, encoded and recent ones, as numbers [entries, head_dim]."""
    length, packed, scale, least, ends, bits, group, rows, directions, block_ends, where, what, recent = side
    old = min(max(length - start, 0), count)
    first = head * packed.shape[1] + start
    if ends.shape[1] == 0:
        for entry in range(old):
            scales = spread(scale, first + entry, channels, group)
            leasts = spread(least, first + entry, channels, group)
            put(written, entry, levels(packed, first + entry, channels, bits) * scales + leasts)
    else:
        run_of, entry = np.searchsorted(ends[head], start, side="right"), 0
        while entry < old:
            stop, place = min(ends[head, run_of] - start, old), head * scale.shape[1] + run_of
            scales, leasts = vector(scale, place, channels), vector(least, place, channels)
            while entry < stop:
                put(written, entry, levels(packed, first + entry, channels, bits) * scales + leasts)
                entry += 1
            run_of += 1
    if directions.shape[2]:
        _add_directions(channels, head, start, old, rows, directions, block_ends, written)
    if len(where):
        _put_in_place((head * length + start) * written.shape[1], old * written.shape[1], where, what, written)
    first = head * recent.shape[1] + start - length
    for entry in range(old, count):
        put(written, entry, vector(recent, first + entry, channels))


@compiled
def _add_directions(
    channels: Any, head: Any, start: Any, count: Any, rows: Any, directions: Any, ends: Any, written: Any
) -> None:
    """Add to entries start... of a head what they have of their blocks' directions."""
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
def _put_in_place(first: Any, count: Any, where: Any, what: Any, written: Any) -> None:
    """Write those of numbers first... that are stored as they are; as many are written."""
    flat, at = written.ravel(), np.searchsorted(where, first)
    while at < len(where) and where[at] < first + count:
        flat[where[at] - first] = number(what, at)
        at += 1


@compiled
def _attend_to_parts(
    thread: Any,
    threads: Any,
    query: Any,
    channels: Any,
    length: Any,
    keys: Any,
    values: Any,
    highest: Any,
    sums: Any,
    mixtures: Any,
) -> None:
    """Every `threads`-th part: its highest logit, and over it the sums of weights and of weighted values, a query each."""
    heads, parts, queries, dim = mixtures.shape
    logits, written = np.empty((queries, PART), np.float32), np.empty((AT_ONCE, dim), np.float32)
    for job in range(thread, heads * parts, threads):
        head, part = job // parts, job % parts
        begin, end = part * PART, min((part + 1) * PART, length)
        for start in range(begin, end, AT_ONCE):
            count = min(AT_ONCE, end - start)
            _write(keys, channels, head, start, count, written)
            for each in range(queries):
                row = vector(query, head * queries + each, channels)
                for entry in range(count):
                    logits[each, start - begin + entry] = total(row * vector(written, entry, channels))
        for each in range(queries):
            highest[head, part, each], sums[head, part, each] = softmax_sums(logits[each][: end - begin])
            put(mixtures, job * queries + each, repeated(np.float32(0), channels))
        for start in range(begin, end, AT_ONCE):
            count = min(AT_ONCE, end - start)
            _write(values, channels, head, start, count, written)
            for each in range(queries):
                mixture = vector(mixtures, job * queries + each, channels)
                for entry in range(count):
                    weight = repeated(logits[each, start - begin + entry], channels)
                    mixture = mixture + weight * vector(written, entry, channels)
                put(mixtures, job * queries + each, mixture)


@in_threads
def _attend_in_threads(
    threads: Any, query: Any, channels: Any, length: Any, keys: Any, values: Any, highest: Any, sums: Any, mixtures: Any
) -> None:
    for thread in prange(threads):
        _attend_to_parts(thread, threads, query, channels, length, keys, values, highest, sums, mixtures)
