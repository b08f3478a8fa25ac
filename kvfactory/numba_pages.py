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
from .numba_kernels import side_by_side, starts_of
from .numba_loops import compiled, in_threads, run, softmax_sums
from .numba_memory import entries_at
from .numba_vectors import repeated, size, total


def attend(
    query: Tensor, keys: Tensor, values: Tensor, bounds: Growing, short: Tensor, page_size: int, count: int, always: int
) -> tuple[Tensor, list[int]]:
    """Attention of query [query_heads, 1, head_dim] over pages of keys and values [heads, length, head_dim].

    Bounds [heads, pages, 2, head_dim] are the least and the greatest numbers of pages of `page_size` entries, and `short`
    those of the page behind them, if any. Each query head reads the `count` pages that may give it most, of equals the
    earlier ones; those from page `always` on are before all others. Returns the output, shaped like the query, and how many
    entries each query head read.
    """
    asked = query[:, 0].float()
    signs = numbers(torch.stack([asked.clamp(max=0), asked.clamp(min=0)], 1))
    mixed = numbers(asked / math.sqrt(query.shape[-1]))
    read = np.empty(len(query), np.int64)
    keys, values = side_by_side(keys[None]), side_by_side(values[None])
    entries = starts_of(keys), starts_of(values), keys.shape[2], NUMBERS[keys.dtype]
    pages = numbers(bounds.held), bounds.length, numbers(short), page_size, count, always
    run(_attend, _attend_in_threads, size(query.shape[-1]), signs, *entries, *pages, mixed, read)
    return torch.from_numpy(mixed).to(query.dtype)[:, None], read.tolist()


@compiled
def _choose(
    signs: Any, channels: Any, head: Any, of_head: Any, bounds: Any, full: Any, short: Any, always: Any, best: Any
) -> None:
    """Fill `best` with the pages that a query head reads, ascending; its entries are those of head `of_head`."""
    scores, found = np.empty(len(best), np.float32), 0
    down, up = vector(signs, 2 * head, channels), vector(signs, 2 * head + 1, channels)
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
    signs: Any,
    keys: Any,
    values: Any,
    length: Any,
    number: Any,
    bounds: Any,
    full: Any,
    short: Any,
    page_size: Any,
    count: Any,
    always: Any,
    mixed: Any,
    read: Any,
) -> None:
    """Every `threads`-th query head: its attention in place of its query, and how many entries it read."""
    best, logits = np.empty(count, np.int64), np.empty(count * page_size, np.float32)
    for head in range(thread, len(mixed), threads):
        of_head = head // (len(mixed) // len(keys))
        _choose(signs, channels, head, of_head, bounds, full, short, always, best)
        of_keys = entries_at(keys[of_head], length, mixed.shape[1], number)
        of_values = entries_at(values[of_head], length, mixed.shape[1], number)
        own, at = vector(mixed, head, channels), 0
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
        put(mixed, head, mixture)


@in_threads
def _attend_in_threads(
    threads: Any,
    channels: Any,
    signs: Any,
    keys: Any,
    values: Any,
    length: Any,
    number: Any,
    bounds: Any,
    full: Any,
    short: Any,
    page_size: Any,
    count: Any,
    always: Any,
    mixed: Any,
    read: Any,
) -> None:
    for thread in prange(threads):
        _attend(
            thread,
            threads,
            channels,
            signs,
            keys,
            values,
            length,
            number,
            bounds,
            full,
            short,
            page_size,
            count,
            always,
            mixed,
            read,
        )
