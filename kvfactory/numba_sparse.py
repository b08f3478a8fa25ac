"""A prompt's attention to itself over chosen keys alone, on a CPU, compiled by Numba.

Logits and weights are made tile by tile in the nearest cache; tiles of which nothing is seen are left out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.nn.functional import pad

from .numba_entries import put, vector, vector_from
from .numba_exponential import exponentials
from .numba_loops import compiled, exponential, in_threads, run
from .numba_products import COLUMNS, ROWS, WIDE, add_tile, columns_of, put_rounded, rows_of, set_tile, tile_rows
from .numba_vectors import greater, most, repeated, total

QUERIES = 64
"""Queries that are worked on together."""
ROOM = QUERIES + -QUERIES % ROWS
"""Rows of the tiles that hold them."""
UNSEEN = np.float32(-1e30)
"""A logit whose weight is nothing beside any other's."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, slashes: Tensor, columns: Tensor, size: int, width: int
) -> Tensor:
    """Attention of one head, all [tokens, head_dim], over keys on diagonals or in columns; each query sees one at least.

    Slashes [tokens or more] say whether a key so far behind its query is seen. Columns [blocks of `size` queries, blocks of
    `width` keys] say whether queries see all keys of a block that are not later ones. Both are bool. Sums are in float32.
    """
    tokens, dim = query.shape
    left = rows_of(pad(query, (0, 0, 0, QUERIES))[None])
    right = columns_of(key)
    by_tile = pad(value, (0, 0, 0, -tokens % COLUMNS)).unflatten(0, (-1, COLUMNS)).transpose(1, 2)
    values = columns_of(by_tile)
    mixed = np.empty((tokens, dim), np.float32)
    backwards = torch.where(pad(slashes[:tokens].flip(0), (0, COLUMNS + QUERIES)), 0.0, UNSEEN.item()).numpy()
    blocks = columns.contiguous().view(torch.uint8).numpy()
    scale = np.float32(1 / math.sqrt(dim))
    run(_attend, _attend_in_threads, left, right, values, backwards, blocks, size, width, scale, mixed)
    return torch.from_numpy(mixed).to(query.dtype)


@compiled
def _mask(logits: Any, at: Any, scale: Any, in_column: Any, first: Any, slashes: Any, slash: Any, causal: Any) -> None:
    """Scale one query's products with some keys, and add what hides those it does not see; `causal` are not later ones.

    What hides keys begins at `first` in columns and at `slash` on diagonals.
    """
    if causal >= COLUMNS:
        hidden = greater(vector_from(in_column, first, WIDE), vector_from(slashes, slash, WIDE))
        put(logits, at, repeated(scale, WIDE) * vector(logits, at, WIDE) + hidden)
        return
    for key in range(COLUMNS):
        hides = max(in_column[first + key], slashes[slash + key]) if key < causal else UNSEEN
        logits[at, key] = logits[at, key] * scale + hides


@compiled
def _weigh(logits: Any, at: Any, highest: Any, sums: Any) -> Any:
    """Turn one query's logits into weights of 1 at most beside all before; what is summed already is made smaller for it."""
    level = most(vector(logits, at, WIDE))
    smaller = np.float32(1)
    if level > highest[at]:
        smaller = exponential(highest[at] - level)
        for part in range(len(sums)):
            own = sums[part, at]
            for channel in range(COLUMNS):
                own[channel] *= smaller
        highest[at] = level
    else:
        level = highest[at]
    put(logits, at, exponentials(vector(logits, at, WIDE) - repeated(level, WIDE)))
    return smaller


@compiled
def _attend(
    thread: Any,
    threads: Any,
    query: Any,
    key: Any,
    value: Any,
    slashes: Any,
    columns: Any,
    size: Any,
    width: Any,
    scale: Any,
    mixed: Any,
) -> None:
    """Every `threads`-th run of queries: their attention as numbers [tokens, head_dim]."""
    tokens, dim = mixed.shape
    runs = -(-size // QUERIES)
    logits, weights = np.empty((ROOM, COLUMNS), np.float32), np.empty((ROOM, value.shape[2]), query.dtype)
    sums = np.empty((value.shape[1], ROOM, COLUMNS), np.float32)
    highest, totals = np.empty((2, QUERIES), np.float32)
    in_column = np.zeros(tokens + COLUMNS, np.float32)
    for job in range(thread, len(columns) * runs, threads):
        start = job // runs * size + job % runs * QUERIES
        stop = min(start + QUERIES, (job // runs + 1) * size, tokens)
        if start >= stop:
            continue
        for block in range(-(-stop // width)):
            hides = np.float32(0) if columns[job // runs, block] else UNSEEN
            in_column[block * width : min((block + 1) * width, stop)] = hides
        highest[:], totals[:], sums[:] = UNSEEN, 0, 0
        for tile in range((stop - 1) // COLUMNS + 1):
            first = tile * COLUMNS
            touched = slashes[tokens - stop + first : tokens - max(start - first - COLUMNS + 1, 0)]
            if in_column[first : first + COLUMNS].max() < 0 and touched.max() < 0:
                continue
            for row in range(0, stop - start, tile_rows(query)):
                set_tile(logits, row, query, start + row, key, tile)
            for row in range(stop - start):
                ahead = start + row - first
                _mask(logits, row, scale, in_column, first, slashes, tokens - 1 - ahead, ahead + 1)
                smaller = _weigh(logits, row, highest, sums)
                totals[row] = totals[row] * smaller + total(vector(logits, row, WIDE))
                put_rounded(weights, row, vector(logits, row, WIDE))
            for part in range(len(sums)):
                for row in range(0, stop - start, tile_rows(query)):
                    add_tile(sums, part * ROOM + row, weights, row, value, tile * len(sums) + part)
        for row in range(stop - start):
            for channel in range(dim):
                mixed[start + row, channel] = sums[channel // COLUMNS, row, channel % COLUMNS] / totals[row]


@in_threads
def _attend_in_threads(
    threads: Any,
    query: Any,
    key: Any,
    value: Any,
    slashes: Any,
    columns: Any,
    size: Any,
    width: Any,
    scale: Any,
    mixed: Any,
) -> None:
    for thread in prange(threads):
        _attend(thread, threads, query, key, value, slashes, columns, size, width, scale, mixed)
