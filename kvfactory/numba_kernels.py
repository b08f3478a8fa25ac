"""Attention on a CPU, compiled by Numba: of the newest token, and of a whole prompt, summed by keys.

The newest token reads entries once, where they lie, as many as each head has. torch's fused attention takes about twice as
long for one token, and a mask where heads differ in length.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import carray, prange, types  # type: ignore[attr-defined]
from numba.extending import intrinsic
from torch import Tensor

from .numba_loops import add_weighted, compiled, exponential, in_threads, product, softmax_sums, threads

AT_ONCE = 1024
"""Entries of a head that a thread attends to before another may go on with the rest."""
QUERIES_AT_ONCE = 256
"""Queries of a prompt whose logits are there together."""
NUMBERS = {torch.bfloat16: np.empty(0, np.uint16), torch.float32: np.empty(0, np.float32)}
"""What a tensor's numbers are to NumPy."""


def newest(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None) -> Tensor:
    """As `Kernel.newest`, in bfloat16 or float32 with sums in float32; a head has one entry at least."""
    rows, heads, capacity, dim = keys.shape
    keys, values = (each if each.stride()[2:] == (dim, 1) else each.contiguous() for each in (keys, values))
    of_keys, of_values = (
        _addresses(each.data_ptr(), *(each.element_size() * apart for apart in each.stride()[:2]), rows, heads)
        for each in (keys, values)
    )
    own = np.full(rows * heads, capacity) if lengths is None else lengths.numpy().ravel()
    return _attend(query.reshape(rows * heads, -1, dim), of_keys, of_values, own, keys.dtype).view_as(query)


def ragged(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """As `Kernel.ragged`, under the same conditions."""
    keys, values = ([each.contiguous() for each in side] for side in (keys, values))
    of_keys, of_values = (np.array([each.data_ptr() for each in side]) for side in (keys, values))
    lengths = np.array([len(each) for each in keys])
    folded = query.reshape(len(keys), -1, query.shape[-1])
    return _attend(folded, of_keys, of_values, lengths, keys[0].dtype).view_as(query)


def _attend(query: Tensor, keys: Any, values: Any, lengths: Any, dtype: torch.dtype) -> Tensor:
    """Attention of query [heads, queries, head_dim] over entries at addresses [heads], each head's side by side."""
    exact = (query.float() / math.sqrt(query.shape[-1])).numpy()
    parts = -(-int(lengths.max()) // AT_ONCE)
    highest = np.empty((len(exact), parts, exact.shape[1]), np.float32)
    sums, mixed = np.empty_like(highest), np.empty((*highest.shape, exact.shape[2]), np.float32)
    arguments = exact, keys, values, lengths, NUMBERS[dtype], highest, sums, mixed
    count = threads()
    if count == 1:
        _attend_to_parts(0, 1, *arguments)
    else:
        _attend_in_threads(count, *arguments)
    _join_parts(lengths, highest, sums, mixed, exact)
    return torch.from_numpy(exact).to(query.dtype)


@compiled
def _addresses(first: Any, row_apart: Any, head_apart: Any, rows: Any, heads: Any) -> Any:
    """Where the entries of each head begin, [rows * heads], int64."""
    found = np.empty(rows * heads, np.int64)
    for row in range(rows):
        for head in range(heads):
            found[row * heads + head] = first + row * row_apart + head * head_apart
    return found


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """The address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


@compiled
def _entries(address: Any, length: Any, dim: Any, number: Any) -> Any:
    """Entries [length, head_dim] at an address."""
    return carray(_pointer(address), (length, dim), number.dtype)  # type: ignore[call-arg]


@compiled
def _attend_to_parts(
    thread: Any,
    threads: Any,
    query: Any,
    keys: Any,
    values: Any,
    lengths: Any,
    number: Any,
    highest: Any,
    sums: Any,
    mixed: Any,
) -> None:
    """Every `threads`-th part: its highest logit, and over it the sums of weights and of weighted values, a query each."""
    heads, queries, dim = query.shape
    parts = highest.shape[1]
    logits = np.empty((queries, AT_ONCE), np.float32)
    for job in range(thread, heads * parts, threads):
        head, part = job // parts, job % parts
        start, stop = part * AT_ONCE, min((part + 1) * AT_ONCE, lengths[head])
        if start >= stop:
            continue
        of_keys = _entries(keys[head], lengths[head], dim, number)[start:stop]
        of_values = _entries(values[head], lengths[head], dim, number)[start:stop]
        for at in range(len(of_keys)):
            for each in range(queries):
                logits[each, at] = product(query[head, each], of_keys[at])
        mixed[head, part] = 0
        for each in range(queries):
            weights = logits[each][: len(of_keys)]
            highest[head, part, each], sums[head, part, each] = softmax_sums(weights)
            add_weighted(mixed[head, part, each], weights, of_values)


@in_threads
def _attend_in_threads(
    threads: Any,
    query: Any,
    keys: Any,
    values: Any,
    lengths: Any,
    number: Any,
    highest: Any,
    sums: Any,
    mixed: Any,
) -> None:
    for thread in prange(threads):
        _attend_to_parts(thread, threads, query, keys, values, lengths, number, highest, sums, mixed)


@compiled
def _join_parts(lengths: Any, highest: Any, sums: Any, mixed: Any, output: Any) -> None:
    """The attention of each head, [heads, queries, head_dim], from that of its parts."""
    for head in range(len(lengths)):
        parts = (lengths[head] + AT_ONCE - 1) // AT_ONCE
        for each in range(output.shape[1]):
            most, total = highest[head, 0, each], np.float32(0)
            for part in range(1, parts):
                most = max(most, highest[head, part, each])
            output[head, each] = 0
            for part in range(parts):
                scale = exponential(highest[head, part, each] - most)
                total += scale * sums[head, part, each]
                for channel in range(output.shape[2]):
                    output[head, each, channel] += scale * mixed[head, part, each, channel]
            for channel in range(output.shape[2]):
                output[head, each, channel] /= total


def attention_mass(queries: Tensor, keys: Tensor, log_sums: Tensor) -> Tensor:
    """Attention that each key got of all queries of a prompt, summed, [query_heads, tokens], float32; memory is O(tokens).

    Queries [query_heads, tokens, head_dim], keys [kv_heads, tokens, head_dim], and `log_sums` as in `Kernel.prefill`, of
    this prompt. Logits are in float32.
    """
    heads, tokens, dim = keys.shape
    group, count = len(queries) // heads, threads()
    exact = (queries.float() / math.sqrt(dim)).unflatten(0, (heads, group))
    mass = torch.zeros(heads, group, tokens)
    work = torch.empty(
        tokens * group * min(QUERIES_AT_ONCE, tokens)
    )  # asking for new memory takes longer than products
    for query, key, sums, received in zip(
        exact, keys.float(), log_sums.unflatten(0, (heads, group)), mass, strict=True
    ):
        for start in range(0, tokens, QUERIES_AT_ONCE):
            some = query[:, start : start + QUERIES_AT_ONCE]
            stop = start + some.shape[1]
            logits = work[: stop * group * some.shape[1]].view(stop, -1)
            torch.mm(key[:stop], some.reshape(-1, dim).T, out=logits)
            own_sums = sums[:, start:stop].contiguous()
            arguments = logits.view(stop, group, -1).numpy(), own_sums.numpy(), start, received.numpy()
            if count == 1:
                _receive(0, 1, *arguments)
            else:
                _receive_in_threads(count, *arguments)
    return mass.flatten(0, 1)


@compiled
def _receive(thread: Any, threads: Any, logits: Any, log_sums: Any, start: Any, received: Any) -> None:
    """Add to what every `threads`-th key received [group, keys] its weights of queries start... of a prompt.

    Logits [keys, group, queries]; a query sees the keys up to itself.
    """
    keys, group, _ = logits.shape
    for key in range(thread, keys, threads):
        for head in range(group):
            first, total = max(key - start, 0), np.float32(0)
            row, sums = logits[key, head][first:], log_sums[head][first:]
            for query in range(len(row)):
                total += exponential(row[query] - sums[query])
            received[head, key] += total


@in_threads
def _receive_in_threads(threads: Any, logits: Any, log_sums: Any, start: Any, received: Any) -> None:
    for thread in prange(threads):
        _receive(thread, threads, logits, log_sums, start, received)
