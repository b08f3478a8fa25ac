"""The newest token's attention on a CPU, compiled by Numba.

It reads entries once, where they lie, as many as each head has. torch's fused attention takes about twice as long for one
token, and a mask where heads differ in length.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .numba_entries import numbers, put, vector
from .numba_loops import compiled, exponential, in_threads, run, softmax_sums
from .numba_memory import ask_for, entries_at
from .numba_vectors import repeated, size, total

if TYPE_CHECKING:
    from .stacks import Stack

AT_ONCE = 1024
"""Entries of a head that a thread attends to before another may go on with the rest."""
AHEAD = 64
"""Entries between the one that is read and the one that memory is asked for."""


def newest(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None) -> Tensor:
    """As `Kernel.newest`, in bfloat16 or float32 with sums in float32; a head has one entry at least."""
    alike(query, keys, values)
    rows, heads, _, dim = keys.shape
    keys, values = side_by_side(keys), side_by_side(values)
    folded = query.reshape(rows * heads, -1, dim)
    return _attend(folded, starts_of(keys), starts_of(values), lengths_of(keys, lengths)).view_as(query)


def watched(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `Kernel.watched`, under the same conditions."""
    alike(query, keys, values)
    rows, heads, length, dim = keys.shape
    keys, values = side_by_side(keys), side_by_side(values)
    folded = query.reshape(rows * heads, -1, dim).contiguous()
    output, weights = torch.empty_like(folded), np.zeros((*folded.shape[:2], length), np.float32)
    held = starts_of(keys), starts_of(values), lengths_of(keys, lengths), *in_order(len(folded))
    run(_weigh, _weigh_in_threads, size(dim), numbers(folded), held, weights, numbers(output))
    return output.view_as(query), torch.from_numpy(weights).view(rows, heads, -1, length)


def step_together(
    query: Tensor, key: Tensor, value: Tensor, rows: Any, stack: Stack, slots: Any, output: Tensor
) -> Tensor | None:
    """As `Kernel.step_together`, under the same conditions: where rows lie there and here is looked up in one call."""
    alike(query, key, value, stack.keys, stack.values)
    heads, dim = stack.keys.shape[1], query.shape[-1]
    key, value, channels = key.contiguous(), value.contiguous(), size(dim)
    queries, attended = (numbers(each).reshape(-1, query.shape[1] // heads, dim) for each in (query, output))
    tokens, entries = (key.data_ptr(), value.data_ptr()), (stack.keys.data_ptr(), stack.values.data_ptr())
    places = rows, slots, stack.lengths
    held = _append(queries, tokens, key.shape[1], entries, stack.capacity, *places)
    if not stack.watched:
        run(_attend_alone, _attend_in_threads, channels, queries, held, attended)
        return None
    lengths = held[2]
    weights = np.zeros((len(lengths), queries.shape[1], lengths.max()), np.float32)
    run(_weigh, _weigh_in_threads, channels, queries, held, weights, attended)
    return torch.from_numpy(weights).unflatten(0, (-1, heads))


def ragged(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """As `Kernel.ragged`, under the same conditions."""
    alike(query, *keys, *values)
    keys, values = ([each.contiguous() for each in side] for side in (keys, values))
    of_keys, of_values = (np.array([each.data_ptr() for each in side]) for side in (keys, values))
    lengths = np.array([len(each) for each in keys])
    folded = query.reshape(len(keys), -1, query.shape[-1])
    return _attend(folded, of_keys, of_values, lengths).view_as(query)


def side_by_side(x: Tensor) -> Tensor:
    """Entries [rows, heads, length, head_dim] whose numbers follow each other, and each head's entries too."""
    return x if x.stride()[2:] == (x.shape[-1], 1) else x.contiguous()


def starts_of(x: Tensor) -> Any:
    """Where the entries of each head of x [rows, heads, length, head_dim] begin, [rows * heads], int64."""
    size = x.element_size()
    return _addresses(x.data_ptr(), size * x.stride(0), size * x.stride(1), *x.shape[:2])


def lengths_of(x: Tensor, lengths: Tensor | None) -> Any:
    """How many entries each head of x [rows, heads, length, head_dim] has, [rows * heads], int64: all of them if None."""
    return np.full(x.shape[0] * x.shape[1], x.shape[2]) if lengths is None else lengths.numpy().ravel()


def alike(query: Tensor, *sides: Tensor) -> None:
    """See that loops which are told one type read no other's numbers."""
    for each in sides:
        assert each.dtype == query.dtype, f"entries are of {each.dtype}, and the query is of {query.dtype}"


def in_order(heads: int) -> tuple[Any, Any]:
    """The places of heads whose queries follow each other, and no addresses of newest tokens, as none are to be appended."""
    return np.arange(heads), np.zeros((2, heads), np.int64)


def _attend(query: Tensor, keys: Any, values: Any, lengths: Any) -> Tensor:
    """Attention of query [heads, queries, head_dim] over entries at addresses [heads], each head's side by side."""
    query = query.contiguous()
    output = torch.empty_like(query)
    held = keys, values, lengths, *in_order(len(lengths))
    run(_attend_alone, _attend_in_threads, size(query.shape[2]), numbers(query), held, numbers(output))
    return output


@compiled
def _addresses(first: Any, row_apart: Any, head_apart: Any, rows: Any, heads: Any) -> Any:
    """Where the entries of each head begin, [rows * heads], int64."""
    found = np.empty(rows * heads, np.int64)
    for row in range(rows):
        for head in range(heads):
            found[row * heads + head] = first + row * row_apart + head * head_apart
    return found


@compiled
def _append(
    query: Any,
    tokens: Any,
    kv_heads: Any,
    entries: Any,
    capacity: Any,
    rows: Any,
    slots: Any,
    lengths: Any,
) -> tuple[Any, Any, Any, Any, Any]:
    """Make room for keys and values of rows' newest tokens, at these addresses, behind the entries of heads in slots.

    Returns of each of these heads where its keys and its values begin, how many there are now, which of all rows' it is, and
    where its newest key and value are, which whoever attends to it puts behind the others.
    """
    dim, heads = query.shape[-1], lengths.shape[1]
    apart = query.itemsize * dim
    starts, newest = np.empty((2, len(rows) * heads), np.int64), np.empty((2, len(rows) * heads), np.int64)
    counts, places = np.empty(len(rows) * heads, np.int64), np.empty(len(rows) * heads, np.int64)
    for each in range(len(rows)):
        for head in range(heads):
            at, place = each * heads + head, rows[each] * heads + head
            new, lane = rows[each] * kv_heads + head * kv_heads // heads, (slots[each] * heads + head) * capacity
            for side in range(2):
                starts[side, at], newest[side, at] = entries[side] + lane * apart, tokens[side] + new * apart
            lengths[slots[each], head] += 1
            counts[at], places[at] = lengths[slots[each], head], place
    return starts[0], starts[1], counts, places, newest


@compiled
def _put_behind(channels: Any, newest: Any, head: Any, of_keys: Any, of_values: Any) -> None:
    """Write the newest key and value of a head, if there are any, as its last entries."""
    if newest[0, head]:
        last, dim = len(of_keys) - 1, of_keys.shape[1]
        put(of_keys, last, vector(entries_at(newest[0, head], 1, dim, of_keys), 0, channels))
        put(of_values, last, vector(entries_at(newest[1, head], 1, dim, of_values), 0, channels))


@compiled
def parts_of(heads: Any, query: Any, length: Any, at_once: Any) -> tuple[Any, Any, Any]:
    """Room for what heads of so many entries have of each part: highest logit, sum of weights, and of weighted values.

    The query is [..., queries of a head, head_dim].
    """
    parts, queries, dim = -(-length // at_once), query.shape[1], query.shape[2]
    highest, sums = np.empty((heads, parts, queries), np.float32), np.empty((heads, parts, queries), np.float32)
    return highest, sums, np.empty((heads, parts, queries, dim), np.float32)


@compiled
def _attend_to_parts(
    thread: Any, threads: Any, channels: Any, query: Any, held: Any, highest: Any, sums: Any, mixed: Any
) -> None:
    """Every `threads`-th part: its highest logit, and over it the sums of weights and of weighted values, a query each."""
    keys, values, lengths, places, newest = held
    heads, (queries, dim) = len(lengths), query.shape[1:]
    parts, scale = highest.shape[1], repeated(np.float32(1 / math.sqrt(dim)), channels)
    exact, logits = np.empty((queries, dim), np.float32), np.empty((queries, AT_ONCE), np.float32)
    for job in range(thread, heads * parts, threads):
        head, part = job // parts, job % parts
        start, stop = part * AT_ONCE, min((part + 1) * AT_ONCE, lengths[head])
        if start >= stop:
            highest[head, part] = -np.inf
            continue
        of_keys = entries_at(keys[head], lengths[head], dim, query)
        of_values = entries_at(values[head], lengths[head], dim, query)
        if stop == lengths[head]:
            _put_behind(channels, newest, head, of_keys, of_values)
        for each in range(queries):
            put(exact, each, scale * vector(query, places[head] * queries + each, channels))
        for at in range(start, stop):
            ask_for(of_keys, min(at + AHEAD, stop), channels)
            key = vector(of_keys, at, channels)
            for each in range(queries):
                logits[each, at - start] = total(key * vector(exact, each, channels))
        for each in range(queries):
            highest[head, part, each], sums[head, part, each] = softmax_sums(logits[each][: stop - start])
        first, by_three = (head * parts + part) * queries, queries - queries % 3
        for each in range(0, by_three, 3):
            _mix_three(channels, logits[each : each + 3], of_values, start, stop, mixed, first + each)
        for each in range(by_three, queries):
            _mix(channels, logits[each], of_values, start, stop, mixed, first + each)


@compiled
def _mix(channels: Any, weights: Any, of_values: Any, start: Any, stop: Any, mixed: Any, place: Any) -> None:
    """The values of entries from start to stop, weighted by [entries]."""
    mixture = repeated(np.float32(0), channels)
    for at in range(start, stop):
        ask_for(of_values, min(at + AHEAD, stop), channels)
        mixture = mixture + repeated(weights[at - start], channels) * vector(of_values, at, channels)
    put(mixed, place, mixture)


@compiled
def _mix_three(channels: Any, weights: Any, of_values: Any, start: Any, stop: Any, mixed: Any, place: Any) -> None:
    """As `_mix`, by [3, entries] for as many places from the first on: each value is read and made float32 once."""
    none = repeated(np.float32(0), channels)
    a, b, c = none, none, none
    for at in range(start, stop):
        ask_for(of_values, min(at + AHEAD, stop), channels)
        value = vector(of_values, at, channels)
        a = a + repeated(weights[0, at - start], channels) * value
        b = b + repeated(weights[1, at - start], channels) * value
        c = c + repeated(weights[2, at - start], channels) * value
    put(mixed, place, a)
    put(mixed, place + 1, b)
    put(mixed, place + 2, c)


@compiled
def _attend_alone(thread: Any, threads: Any, channels: Any, query: Any, held: Any, output: Any) -> None:
    """The attention of heads as `_append` returns them, in one thread."""
    _, _, lengths, places, _ = held
    highest, sums, mixed = parts_of(len(lengths), query, lengths.max(), AT_ONCE)
    _attend_to_parts(thread, threads, channels, query, held, highest, sums, mixed)
    join_parts(channels, highest, sums, mixed, places, output)


@in_threads
def _attend_in_threads(threads: Any, channels: Any, query: Any, held: Any, output: Any) -> None:
    _, _, lengths, places, _ = held
    highest, sums, mixed = parts_of(len(lengths), query, lengths.max(), AT_ONCE)
    for thread in prange(threads):
        _attend_to_parts(thread, threads, channels, query, held, highest, sums, mixed)
    join_parts(channels, highest, sums, mixed, places, output)


@compiled
def join_parts(channels: Any, highest: Any, sums: Any, mixed: Any, places: Any, output: Any) -> None:
    """The attention of each head, at its place in the output, from that of its parts; one without entries is at -inf."""
    heads, parts, queries = highest.shape
    for head in range(heads):
        for each in range(queries):
            most, whole, mixture = highest[head, 0, each], np.float32(0), repeated(np.float32(0), channels)
            for part in range(1, parts):
                most = max(most, highest[head, part, each])
            for part in range(parts):
                if highest[head, part, each] == -np.inf:
                    continue
                scale = exponential(highest[head, part, each] - most)
                whole += scale * sums[head, part, each]
                own = vector(mixed, (head * parts + part) * queries + each, channels)
                mixture = mixture + repeated(scale, channels) * own
            put(output, places[head] * queries + each, repeated(1 / whole, channels) * mixture)


@compiled
def _weigh(thread: Any, threads: Any, channels: Any, query: Any, held: Any, weights: Any, output: Any) -> None:
    """Every `threads`-th head: its weights [queries, entries] and its attention."""
    keys, values, lengths, places, newest = held
    queries, dim = query.shape[1:]
    scale = repeated(np.float32(1 / math.sqrt(dim)), channels)
    for head in range(thread, len(lengths), threads):
        length = lengths[head]
        of_keys = entries_at(keys[head], length, dim, query)
        of_values = entries_at(values[head], length, dim, query)
        _put_behind(channels, newest, head, of_keys, of_values)
        for each in range(queries):
            place = places[head] * queries + each
            row, own = weights[head, each][:length], scale * vector(query, place, channels)
            for at in range(length):
                row[at] = total(own * vector(of_keys, at, channels))
            _, whole = softmax_sums(row)
            mixture = repeated(np.float32(0), channels)
            for at in range(length):
                row[at] /= whole
                mixture = mixture + repeated(row[at], channels) * vector(of_values, at, channels)
            put(output, place, mixture)


@in_threads
def _weigh_in_threads(threads: Any, channels: Any, query: Any, held: Any, weights: Any, output: Any) -> None:
    for thread in prange(threads):
        _weigh(thread, threads, channels, query, held, weights, output)
