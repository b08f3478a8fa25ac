"""How queries scatter, and what that makes of keys, on a CPU, compiled by Numba: products in float32 that leave no cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.nn.functional import pad

from .numba_entries import entries_of, numbers, put, turned, vector
from .numba_loops import compiled, in_threads, run
from .numba_products import COLUMNS, ROWS, WIDE, add_products
from .numba_vectors import repeated, size, total

PART = 512
"""Queries that one thread sums up."""
AT_ONCE = 64
"""Queries that are turned before they are multiplied."""


def turned_sums(queries: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over queries [heads, tokens, head_dim], turned by angles, of themselves and of their outer products.

    Cosines and sines are [tokens, head_dim / 2]. Returns [heads, head_dim] and [heads, head_dim, head_dim]. All float32.
    """
    heads, tokens, dim = queries.shape
    parts = -(-tokens // PART)
    sums = np.empty((heads, parts, dim), np.float32)
    products = np.zeros((heads, parts, dim // COLUMNS, dim + -dim % ROWS, COLUMNS), np.float32)
    run(_sum, _sum_in_threads, *entries_of(queries), tokens, numbers(cos), numbers(sin), size(dim), sums, products)
    whole = torch.from_numpy(products).sum(1)[:, :, :dim]
    return torch.from_numpy(sums).sum(1), whole.transpose(1, 2).flatten(2)


def quadratic(keys: Tensor, matrices: Tensor, vectors: Tensor) -> Tensor:
    """As `moments.quadratic`."""
    exact = pad(keys.float(), (0, 0, 0, max(ROWS - keys.shape[1], 0)))
    found = np.empty((len(matrices), exact.shape[1]), np.float32)
    run(_square, _square_in_threads, numbers(exact), numbers(matrices), numbers(vectors), found)
    return torch.from_numpy(found)[:, : keys.shape[1]]


@compiled
def _sum(
    thread: Any,
    threads: Any,
    queries: Any,
    head_apart: Any,
    token_apart: Any,
    tokens: Any,
    cos: Any,
    sin: Any,
    channels: Any,
    sums: Any,
    products: Any,
) -> None:
    """Every `threads`-th part of a head's queries; see `turned_sums`."""
    heads, parts, tiles, rows, _ = products.shape
    dim = sums.shape[2]
    some = np.zeros((AT_ONCE + 1, dim), np.float32)  # rows of products behind the last read on
    for job in range(thread, heads * parts, threads):
        head, part = job // parts, job % parts
        whole = repeated(np.float32(0), channels)
        for start in range(part * PART, min((part + 1) * PART, tokens), AT_ONCE):
            count = min(AT_ONCE, (part + 1) * PART - start, tokens - start)
            for at in range(count):
                place = head * head_apart + (start + at) * token_apart
                query = turned(vector(queries, place, channels), cos, sin, start + at)
                whole = whole + query
                put(some, at, query)
            for tile in range(tiles):
                for row in range(0, rows, ROWS):
                    place = (job * tiles + tile) * rows + row
                    add_products(products, place, some, row, 1, dim, some, tile, tiles, count)
        put(sums, job, whole)


@in_threads
def _sum_in_threads(
    threads: Any,
    queries: Any,
    head_apart: Any,
    token_apart: Any,
    tokens: Any,
    cos: Any,
    sin: Any,
    channels: Any,
    sums: Any,
    products: Any,
) -> None:
    for thread in prange(threads):
        _sum(thread, threads, queries, head_apart, token_apart, tokens, cos, sin, channels, sums, products)


@compiled
def _square(thread: Any, threads: Any, keys: Any, matrices: Any, vectors: Any, found: Any) -> None:
    """Every `threads`-th run of keys, of which the last may begin within the one before it; see `quadratic`."""
    tokens, dim = keys.shape[1:]
    group, tiles, runs = len(matrices) // len(keys), dim // COLUMNS, -(-tokens // ROWS)
    tile, sums = np.empty((ROWS, COLUMNS), np.float32), np.empty(ROWS, np.float32)
    for job in range(thread, len(matrices) * runs, threads):
        head, start = job // runs, min(job % runs * ROWS, tokens - ROWS)
        first = head // group * tokens + start
        sums[:] = 0
        for column in range(tiles):
            for row in range(ROWS):
                put(tile, row, vector(vectors, head * tiles + column, WIDE))
            add_products(tile, 0, keys, first * dim, dim, 1, matrices, head * dim * tiles + column, tiles, dim)
            for row in range(ROWS):
                sums[row] += total(vector(tile, row, WIDE) * vector(keys, (first + row) * tiles + column, WIDE))
        found[head, start : start + ROWS] = sums  # at once: another thread may write the same ones


@in_threads
def _square_in_threads(threads: Any, keys: Any, matrices: Any, vectors: Any, found: Any) -> None:
    for thread in prange(threads):
        _square(thread, threads, keys, matrices, vectors, found)
