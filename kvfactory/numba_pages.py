"""The newest token's attention over the pages it cares for most, on a CPU, compiled by Numba: nothing is gathered."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .growing import Growing
from .numba_entries import NUMBERS, numbers, put, vector
from .numba_kernels import alike
from .numba_loops import compiled, in_threads, run, softmax_sums
from .numba_memory import entries_at
from .numba_vectors import greater, repeated, size, total


def attend(
    query: Tensor, keys: Tensor, values: Tensor, bounds: Growing, short: Tensor, page_size: int, count: int, always: int
) -> tuple[Tensor, list[int]]:
    """Attention of query [query_heads, 1, head_dim] over pages of keys and values [heads, length, head_dim].

    Bounds [heads, pages, 2, head_dim] are the least and the greatest numbers of pages of `page_size` entries, and `short`
    those of the page behind them, if any. Each query head reads the `count` pages that may give it most, of equals the
    earlier ones; those from page `always` on are before all others. Returns the output, shaped like the query, and how many
    entries each query head read.
    """
    alike(query, keys, values, bounds.held, short)
    query = query.contiguous()
    output, read = torch.empty_like(query), np.empty(len(query), np.int64)
    keys, values = (each if each.stride(1) == each.shape[2] else each.contiguous() for each in (keys, values))
    starts = keys.data_ptr(), values.data_ptr(), keys.stride(0), values.stride(0)
    entries = starts, *keys.shape[:2]
    pages = bounds.array, bounds.length, numbers(short), page_size, count, always
    run(_attend, _attend_in_threads, size(query.shape[-1]), numbers(query), *entries, *pages, numbers(output), read)
    return output, read.tolist()


def widened(bounds: Tensor, keys: Tensor) -> Tensor:
    """The least and the greatest numbers of pages, [heads, 1, 2, head_dim], that have keys [heads, 1, head_dim] besides."""
    bounds, keys = bounds.contiguous(), keys.contiguous()
    found = torch.empty_like(bounds)
    heads, _, channels = keys.shape
    _widen(size(channels), bounds.data_ptr(), keys.data_ptr(), found.data_ptr(), heads, channels, NUMBERS[keys.dtype])
    return found


@compiled
def _widen(count: Any, bounds: Any, keys: Any, found: Any, heads: Any, channels: Any, number: Any) -> None:
    """See `widened`, of numbers at these addresses."""
    old, new = entries_at(bounds, 2 * heads, channels, number), entries_at(found, 2 * heads, channels, number)
    for head in range(heads):
        key, none = vector(entries_at(keys, heads, channels, number), head, count), repeated(np.float32(0), count)
        put(new, 2 * head, none - greater(none - vector(old, 2 * head, count), none - key))
        put(new, 2 * head + 1, greater(vector(old, 2 * head + 1, count), key))


@compiled
def _choose(
    channels: Any, query: Any, head: Any, of_head: Any, bounds: Any, full: Any, short: Any, always: Any, best: Any
) -> None:
    """Fill `best` with the pages that a query head reads, ascending; its entries are those of head `of_head`."""
    scores, found = np.empty(len(best), np.float32), 0
    asked = vector(query, head, channels)
    up = greater(asked, repeated(np.float32(0), channels))
    down = asked - up
    for page in range(full + short.shape[1]):
        if page >= always:
            score = np.float32(np.inf)
        elif page < full:
            place = 2 * (of_head * bounds.shape[1] + page)
            score = total(down * vector(bounds, place, channels) + up * vector(bounds, place + 1, channels))
        else:
            score = total(down * vector(short, 2 * of_head, channels) + up * vector(short, 2 * of_head + 1, channels))
        if found == len(best) and score <= scores[found - 1]:
            continue
        at = min(found, len(best) - 1)
        while at and scores[at - 1] < score:
            scores[at], best[at] = scores[at - 1], best[at - 1]
            at -= 1
        scores[at], best[at] = score, page
        found = min(found + 1, len(best))
    best.sort()


@compiled
def _attend(
    thread: Any,
    threads: Any,
    channels: Any,
    query: Any,
    starts: Any,
    kv_heads: Any,
    length: Any,
    bounds: Any,
    full: Any,
    short: Any,
    page_size: Any,
    count: Any,
    always: Any,
    output: Any,
    read: Any,
) -> None:
    """Every `threads`-th query head: its attention, and how many entries it read."""
    keys, values, keys_apart, values_apart = starts
    best, logits = np.empty(count, np.int64), np.empty(count * page_size, np.float32)
    dim, scale = query.shape[-1], repeated(np.float32(1 / math.sqrt(query.shape[-1])), channels)
    for head in range(thread, len(query), threads):
        of_head = head // (len(query) // kv_heads)
        _choose(channels, query, head, of_head, bounds, full, short, always, best)
        of_keys = entries_at(keys + of_head * keys_apart * query.itemsize, length, dim, query)
        of_values = entries_at(values + of_head * values_apart * query.itemsize, length, dim, query)
        own, at = scale * vector(query, head, channels), 0
        for page in best:
            for entry in range(page * page_size, min((page + 1) * page_size, length)):
                logits[at] = total(own * vector(of_keys, entry, channels))
                at += 1
        read[head] = at
        _, whole = softmax_sums(logits[:at])
        mixture, at = repeated(np.float32(0), channels), 0
        for page in best:
            for entry in range(page * page_size, min((page + 1) * page_size, length)):
                mixture = mixture + repeated(logits[at] / whole, channels) * vector(of_values, entry, channels)
                at += 1
        put(output, head, mixture)


@in_threads
def _attend_in_threads(
    threads: Any,
    channels: Any,
    query: Any,
    starts: Any,
    kv_heads: Any,
    length: Any,
    bounds: Any,
    full: Any,
    short: Any,
    page_size: Any,
    count: Any,
    always: Any,
    output: Any,
    read: Any,
) -> None:
    for thread in prange(threads):
        _attend(
            thread,
            threads,
            channels,
            query,
            starts,
            kv_heads,
            length,
            bounds,
            full,
            short,
            page_size,
            count,
            always,
            output,
            read,
        )
