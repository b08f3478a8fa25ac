"""Products of encoded entries with queries, and their mixtures by weights, in compiled loops.

A few entries at a time are written out as numbers, in the nearest cache, and multiplied there: none ever is in memory. Where
levels are equally far apart and the processor multiplies bytes, they are not even written out: scales go to the queries and
the weights, and levels are multiplied as the integers that they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from .compiled import WIDEST
from .numba_entries import number, put, put_from, spread, vector, vector_from
from .numba_integers import (
    FOUR,
    INTEGERS,
    among_first,
    fits,
    greatest_multiple,
    level_products,
    put_apart,
    put_channels,
    put_digits,
    put_entries,
)
from .numba_levels import write
from .numba_loops import compiled
from .numba_products import products
from .numba_vectors import count_of, greater, most, repeated, size, total

AT_ONCE = 64
"""Entries that are written out, or mixed, together."""
ALL, LANES, FOURS = size(AT_ONCE), size(WIDEST), size(AT_ONCE // FOUR)
LEAST = np.float32(1e-30)
"""Of what is greatest in a vector, to be told from nothing."""


def score(channels: Any, digits: Any, keys: Any, head: Any, start: Any, stop: Any, exact: Any, logits: Any) -> None:
    """Write the products of queries [queries, head_dim] and encoded entries start... of a head into logits [queries, ...].

    There is room for `AT_ONCE` more. For compiled functions.
    """


def mix(
    channels: Any, digits: Any, values: Any, head: Any, start: Any, stop: Any, weights: Any, mixtures: Any, place: Any
) -> None:
    """Add encoded entries start... of a head, weighted by [queries, ...], to mixtures, one a query, from `place` on.

    There is room for `AT_ONCE` more weights. For compiled functions.
    """


def _of(side: Any, field: str) -> Any:
    """The type of a field of `Encoded`."""
    return side.types[side.fields.index(field)]


def _is_plain(side: Any, channels: Any) -> bool:
    """Whether entries are nothing but levels that are equally far apart, and can be multiplied as integers."""
    others = ("table", "rows", "where", "positions")
    alone = all(_of(side, each) == types.none for each in others)
    return INTEGERS and alone and fits(count_of(channels), count_of(_of(side, "bits")))


@overload(score, strict=False)
def _score(channels: Any, digits: Any, keys: Any, head: Any, start: Any, stop: Any, exact: Any, logits: Any) -> Any:
    as_integers = _is_plain(keys, channels) and _of(keys, "ends") != types.none
    return _score_levels if as_integers else _score_written


@overload(mix, strict=False)
def _mix(
    channels: Any, digits: Any, values: Any, head: Any, start: Any, stop: Any, weights: Any, mixtures: Any, place: Any
) -> Any:
    group = count_of(_of(values, "group"))
    by_lanes = group % WIDEST == 0 or group >= count_of(channels)
    as_integers = _is_plain(values, channels) and _of(values, "ends") == types.none and by_lanes
    return _mix_levels if as_integers else _mix_written


def _score_written(
    channels: Any, digits: Any, keys: Any, head: Any, start: Any, stop: Any, exact: Any, logits: Any
) -> None:
    """See `score`: entries become numbers first."""
    written = np.empty((AT_ONCE + 1, exact.shape[1]), np.float32)  # the last is nobody's
    for begin in range(start, stop, AT_ONCE):
        count = min(AT_ONCE, stop - begin)
        write(channels, keys, head, begin, count, written)
        for each in range(len(exact)):
            row, first = vector(exact, each, channels), each * logits.shape[1] + begin - start
            for entry in range(0, count, WIDEST):  # what is behind the last is overwritten or never read
                put_from(logits, first + entry, products(row, written, entry))


def _mix_written(
    channels: Any, digits: Any, values: Any, head: Any, start: Any, stop: Any, weights: Any, mixtures: Any, place: Any
) -> None:
    """See `mix`: entries become numbers first."""
    written = np.empty((AT_ONCE + 1, mixtures.shape[-1]), np.float32)
    for begin in range(start, stop, AT_ONCE):
        count = min(AT_ONCE, stop - begin)
        write(channels, values, head, begin, count, written)
        for each in range(len(weights)):
            mixture = vector(mixtures, place + each, channels)
            for entry in range(count):
                weight = repeated(weights[each, begin - start + entry], channels)
                mixture = mixture + weight * vector(written, entry, channels)
            put(mixtures, place + each, mixture)


def _score_levels(
    channels: Any, digits: Any, keys: Any, head: Any, start: Any, stop: Any, exact: Any, logits: Any
) -> None:
    """See `score`: a query times the scales of a group is multiples of a unit, which are multiplied by levels."""
    if start == stop:
        return
    (queries, dim), places, before = exact.shape, count_of(digits), head % len(keys.scale) * keys.scale.shape[1]
    ends, length = keys.ends[head], keys.packed.shape[1]
    first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop)
    groups = last + 1 - first
    apart, low = np.empty((groups, dim), np.float32), np.empty((groups + WIDEST, dim), np.float32)
    widest = repeated(np.float32(0), channels)
    for group in range(groups):
        own = spread(keys.scale, before + first + group, channels, keys.group)
        widest = greater(widest, own)
        put(apart, group, own)
        put(low, group, spread(keys.least, before + first + group, channels, keys.group))
    multiples = np.empty((queries * groups * places, dim), np.int8)
    units, shared = np.empty(queries, np.float32), np.empty((queries, groups + WIDEST), np.float32)
    for each in range(queries):
        row = vector(exact, each, channels)
        units[each] = _unit_of(row * widest, channels, digits)
        scaled = row * repeated(1 / units[each], channels)
        for group in range(groups):
            put_digits(multiples, (each * groups + group) * places, scaled * vector(apart, group, channels), digits)
        for group in range(0, groups, WIDEST):  # what is behind the last is never read
            put_from(shared, each * shared.shape[1] + group, products(row, low, group))
    levels, spare = np.empty((dim // FOUR, WIDEST), np.int32), np.empty((WIDEST, keys.packed.shape[2]), np.uint8)
    packed, entry = keys.packed.reshape(-1, keys.packed.shape[2]), start
    for group in range(groups):
        end = min(ends[first + group], stop)
        for begin in range(entry, end, WIDEST):  # what is behind the last is overwritten or never read
            place = head * length + begin
            if place + WIDEST > len(packed):  # nothing is read that lies behind the array
                spare[: len(packed) - place] = packed[place:]
                put_channels(levels, 0, spare, 0, channels, keys.bits)
            else:
                put_channels(levels, 0, packed, place, channels, keys.bits)
            for each in range(queries):
                own = level_products(levels, 0, multiples, (each * groups + group) * places, channels, digits)
                logit = own * repeated(units[each], LANES) + repeated(shared[each, group], LANES)
                put_from(logits, each * logits.shape[1] + begin - start, logit)
        entry = end


def _mix_levels(
    channels: Any, digits: Any, values: Any, head: Any, start: Any, stop: Any, weights: Any, mixtures: Any, place: Any
) -> None:
    """See `mix`: weights times the scales of entries are multiples of a unit, which are multiplied by levels."""
    group, dim, queries = count_of(values.group), mixtures.shape[-1], len(weights)
    packed, before = values.packed.reshape(-1, values.packed.shape[2]), head % len(values.scale) * values.scale.shape[1]
    runs, quads, parts, places = dim // WIDEST, AT_ONCE // FOUR, -(-dim // group), count_of(digits)
    multiples, levels = np.empty((parts * places, AT_ONCE), np.int8), np.empty((runs * quads, WIDEST), np.int32)
    apart, low = np.empty((parts, AT_ONCE), np.float32), np.empty((parts, AT_ONCE), np.float32)
    shared, spare = np.zeros((queries * parts, AT_ONCE), np.float32), np.empty((FOUR, packed.shape[1]), np.uint8)
    for begin in range(start, stop, AT_ONCE):
        count = min(AT_ONCE, stop - begin)
        _put_apart(apart, values.scale, before + begin, count, channels, values.group)
        _put_apart(low, values.least, before + begin, count, channels, values.group)
        for quad in range(-(-count // FOUR)):
            entry = head * values.packed.shape[1] + begin + quad * FOUR
            if entry + FOUR > len(packed):  # as above
                spare[: len(packed) - entry] = packed[entry:]
                put_entries(levels, quad, spare, 0, channels, values.bits, FOURS)
            else:
                put_entries(levels, quad, packed, entry, channels, values.bits, FOURS)
        for each in range(queries):
            row = among_first(vector_from(weights, each * weights.shape[1] + begin - start, ALL), count)
            widest = row * vector(apart, 0, ALL)
            for part in range(1, parts):
                widest = greater(widest, row * vector(apart, part, ALL))
            unit = _unit_of(widest, ALL, digits)
            for part in range(parts):
                own = each * parts + part
                put_digits(multiples, part * places, row * vector(apart, part, ALL) * repeated(1 / unit, ALL), digits)
                put(shared, own, vector(shared, own, ALL) + row * vector(low, part, ALL))
            for run_of in range(runs):
                part, at = run_of * WIDEST // group, (place + each) * runs + run_of
                own_sums = level_products(levels, run_of * quads, multiples, part * places, ALL, digits)
                put(mixtures, at, vector(mixtures, at, LANES) + own_sums * repeated(unit, LANES))
    for each in range(queries):
        for run_of in range(runs):
            at, own = (place + each) * runs + run_of, each * parts + run_of * WIDEST // group
            put(mixtures, at, vector(mixtures, at, LANES) + repeated(total(vector(shared, own, ALL)), LANES))


@compiled
def _unit_of(widest: Any, count: Any, digits: Any) -> Any:
    """What vectors of `count` numbers, none of which is larger, are to be multiples of."""
    highest = most(greater(widest, repeated(np.float32(0), count) - widest))
    return max(highest, LEAST) / np.float32(greatest_multiple(count_of(digits)))


@compiled
def _put_apart(target: Any, array: Any, index: Any, count: Any, channels: Any, group: Any) -> None:
    """Write numbers of `count` entries, one for each group of channels, from `index` on, in rows; 0 behind."""
    if count == AT_ONCE:
        put_apart(target, array, index, ALL, channels, group)
    else:
        target[:] = 0
        for entry in range(count):
            for part in range(len(target)):
                target[part, entry] = number(array, (index + entry) * len(target) + part)
