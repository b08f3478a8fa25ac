"""What keys receive of a whole prompt's attention on a CPU, compiled by Numba: logits are summed up tile by tile."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .numba_entries import put, vector
from .numba_exponential import exponentials
from .numba_loops import compiled, exponential, in_threads, run
from .numba_products import COLUMNS, WIDE, columns_of, rows_of, set_tile, tile_rows
from .numba_vectors import repeated


def attention_mass(queries: Tensor, keys: Tensor, log_sums: Tensor) -> Tensor:
    """Attention that each key got of all queries of a prompt, summed, [query_heads, tokens], float32; memory is O(tokens).

    Queries [query_heads, tokens, head_dim], keys [kv_heads, tokens, head_dim], and `log_sums` as in `Kernel.prefill`, of
    this prompt. Logits are in float32.
    """
    left, right = rows_of(queries), columns_of(keys)
    scale = np.float32(1 / math.sqrt(queries.shape[-1]))
    received = np.zeros((len(left), right.shape[1] * COLUMNS), np.float32)
    run(_receive, _receive_in_threads, left, right, log_sums.contiguous().numpy(), scale, received)
    return torch.from_numpy(received)[:, : keys.shape[1]]


@compiled
def _receive(thread: Any, threads: Any, queries: Any, keys: Any, log_sums: Any, scale: Any, received: Any) -> None:
    """What the keys of every `threads`-th tile receive; a query sees the keys up to itself."""
    heads, tiles = len(queries), keys.shape[1]
    tokens, rows, group = log_sums.shape[1], queries.shape[1], heads // len(keys)
    tall = tile_rows(queries)
    logits = np.empty((tall, COLUMNS), np.float32)
    for job in range(thread, heads * tiles, threads):
        head, tile = job // tiles, job % tiles
        first = tile * COLUMNS
        own, mass = received[head][first : first + COLUMNS], repeated(np.float32(0), WIDE)
        for start in range(first - first % tall, tokens, tall):
            set_tile(logits, 0, queries, head * rows + start, keys, head // group * tiles + tile)
            for row in range(min(tall, tokens - start)):
                log_sum, seen = log_sums[head, start + row], start + row + 1 - first
                if seen >= COLUMNS:
                    logit = repeated(scale, WIDE) * vector(logits, row, WIDE)
                    mass = mass + exponentials(logit - repeated(log_sum, WIDE))
                else:
                    for key in range(seen):
                        own[key] += exponential(logits[row, key] * scale - log_sum)
        put(logits, 0, mass)
        own += logits[0]


@in_threads
def _receive_in_threads(threads: Any, queries: Any, keys: Any, log_sums: Any, scale: Any, received: Any) -> None:
    for thread in prange(threads):
        _receive(thread, threads, queries, keys, log_sums, scale, received)
