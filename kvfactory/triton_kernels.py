"""Kernels in Triton, for what torch could only do by writing all attention weights to the GPU's memory.

Triton comes with torch for CUDA. Without it this module imports all the same, but its functions cannot run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl

    jit = triton.jit
except ImportError:
    triton = None

    def jit(kernel: Callable[..., None]) -> Any:
        """Leaves a kernel as it is: nobody launches it."""
        return kernel


BLOCK_BYTES = 16 * 1024
"""What a block of queries or of keys may take of the memory on the chip: GPUs have 64 KiB of it and more."""
BLOCK_ROWS = {2: 64, 4: 32}
"""Rows of a block at most, by bytes a number: float32 has no tensor cores here, and larger blocks spill registers."""


def attention_mass(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention each key got, summed over all queries, [query_heads, tokens], float32: what H2O calls a token's score.

    `queries` are [query_heads, tokens, head_dim], `keys` [kv_heads, tokens, head_dim], both in float32, float16 or
    bfloat16; query head h looks at KV head h // (query_heads / kv_heads). For query i and key j <= i

        logit[i, j] = queries[i] . keys[j] / sqrt(head_dim)
        lse[i]      = log(sum over j <= i of exp(logit[i, j]))
        mass[j]     = sum over i >= j of exp(logit[i, j] - lse[i])

    which is the column sum of the causal softmax (H2O, arXiv 2306.14048). It takes two passes, as a column cannot be
    added up before its rows are normalised. The first goes along rows with the online softmax of FlashAttention-2
    (arXiv 2307.08691) and keeps `lse` alone; the second computes the logits again and goes down columns. A block of
    columns belongs to one program, which adds in one order: without atomics the result is the same bits every time.
    Products add up in float32, and those of float32 are not rounded to TF32. Logits live on the chip, block by block:
    memory is O(query_heads * tokens).

    Raises `ValueError` where shapes or dtypes do not fit each other.
    """
    query_heads, tokens, dim = queries.shape
    if keys.shape[1:] != (tokens, dim) or query_heads % len(keys) or queries.dtype != keys.dtype:
        raise ValueError(
            f"queries {[*queries.shape]} of {queries.dtype} do not fit keys {[*keys.shape]} of {keys.dtype}"
        )
    queries, keys = queries.contiguous(), keys.contiguous()
    lse = queries.new_empty(query_heads, tokens, dtype=torch.float32)
    mass = torch.empty_like(lse)
    padded = max(16, triton.next_power_of_2(dim))  # the least that a matrix product takes
    block = max(16, min(BLOCK_ROWS[queries.element_size()], BLOCK_BYTES // (padded * queries.element_size())))
    grid = triton.cdiv(tokens, block), query_heads
    sizes = tokens, query_heads // len(keys), math.log2(math.e) / math.sqrt(dim), dim, padded, block
    # not tuned by trial: the block would change from run to run, and with it how sums round
    with torch.cuda.device_of(queries):
        row_log_sums[grid](queries, keys, lse, *sizes)
        column_sums[grid](queries, keys, lse, mass, *sizes)
    return mass


@jit
def row_log_sums(
    queries: tl.tensor,
    keys: tl.tensor,
    lse: tl.tensor,
    tokens: int,
    group: int,
    scale: float,
    dim: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Base-2 logarithms of each row's sum of exponentials, for one block of rows: `scale` has log2(e) in it."""
    head = tl.program_id(1)
    first = tl.program_id(0) * block
    rows = first + tl.arange(0, block)
    query = load_block(queries, head, rows, tokens, dim, padded)
    highest = tl.full([block], -float("inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    for start in range(0, first + block, block):  # all rows see key 0, so `highest` is finite from there on
        columns = start + tl.arange(0, block)
        key = load_block(keys, head // group, columns, tokens, dim, padded)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        logits = tl.where(columns[None, :] <= rows[:, None], logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        highest = higher
    tl.store(lse + head.to(tl.int64) * tokens + rows, highest + tl.log2(total), mask=rows < tokens)


@jit
def column_sums(
    queries: tl.tensor,
    keys: tl.tensor,
    lse: tl.tensor,
    mass: tl.tensor,
    tokens: int,
    group: int,
    scale: float,
    dim: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """What one block of columns gets from all rows that see it; `lse` is of `row_log_sums`."""
    head = tl.program_id(1)
    first = tl.program_id(0) * block
    columns = first + tl.arange(0, block)
    key = load_block(keys, head // group, columns, tokens, dim, padded)
    total = tl.zeros([block, block], tl.float32)  # folded into rows at the end, so that threads meet once
    for start in range(first, tokens, block):
        rows = start + tl.arange(0, block)
        query = load_block(queries, head, rows, tokens, dim, padded)
        normaliser = tl.load(lse + head.to(tl.int64) * tokens + rows, mask=rows < tokens, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = (columns[None, :] <= rows[:, None]) & (rows[:, None] < tokens)
        total += tl.where(seen, tl.exp2(logits - normaliser[:, None]), 0.0)
    tl.store(mass + head.to(tl.int64) * tokens + columns, tl.sum(total, 0), mask=columns < tokens)


@jit
def load_block(
    source: tl.tensor, head: tl.tensor, rows: tl.tensor, tokens: int, dim: tl.constexpr, padded: tl.constexpr
) -> tl.tensor:
    """Rows of one head of [heads, tokens, dim] as [rows, padded], zeros where there is nothing."""
    across = tl.arange(0, padded)
    places = (head.to(tl.int64) * tokens + rows)[:, None] * dim + across[None, :]
    return tl.load(source + places, mask=(rows < tokens)[:, None] & (across < dim)[None, :], other=0.0)
