"""Attention of the newest token on a CPU, compiled by Numba: it reads entries once, where they lie, as many as a head has.

torch's fused attention takes about twice as long for one token, and a mask where heads differ in length.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, njit, prange, types
from numba.extending import intrinsic, overload
from torch import Tensor

AT_ONCE = 1024
"""Entries of a head that a thread attends to before another may go on with the rest."""
LANES = 64
"""Numbers that are compared at once."""
ROWS_AT_ONCE = 256
"""Queries of a head whose logits are there together."""

NUMBERS = {torch.bfloat16: np.empty(0, np.uint16), torch.float32: np.empty(0, np.float32)}
"""What a tensor's numbers are to NumPy, which has no bfloat16: that is the upper half of a float32."""


compiled = njit(fastmath=True, cache=True, nogil=True)
"""Sums in any order, but infinities and what is no number stay what they are."""


def newest(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None) -> Tensor:
    """As `Kernel.newest`, in bfloat16 or float32 with sums in float32; a head has one entry at least."""
    rows, heads, capacity, dim = keys.shape
    keys, values = (each if each.stride()[2:] == (dim, 1) else each.contiguous() for each in (keys, values))
    row, head = np.arange(rows)[:, None], np.arange(heads)
    starts = (
        (each.data_ptr() + each.element_size() * (each.stride(0) * row + each.stride(1) * head)).ravel()
        for each in (keys, values)
    )
    own = np.full(rows * heads, capacity) if lengths is None else lengths.numpy().ravel()
    return _attend(query.reshape(rows * heads, -1, dim), *starts, own, keys.dtype).view_as(query)


def ragged(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """As `Kernel.ragged`."""
    keys, values = ([each.contiguous() for each in side] for side in (keys, values))
    starts = (np.array([each.data_ptr() for each in side]) for side in (keys, values))
    folded = query.reshape(len(keys), -1, query.shape[-1])
    return _attend(folded, *starts, np.array([len(each) for each in keys]), keys[0].dtype).view_as(query)


def _attend(query: Tensor, keys: Any, values: Any, lengths: Any, dtype: torch.dtype) -> Tensor:
    """Attention of query [heads, queries, head_dim] over entries at addresses [heads], each head's side by side."""
    exact = (query.float() / math.sqrt(query.shape[-1])).numpy()
    parts = -(-int(lengths.max()) // AT_ONCE)
    highest = np.empty((*exact.shape[:1], parts, exact.shape[1]), np.float32)
    sums, mixed = np.empty_like(highest), np.empty((*highest.shape, exact.shape[2]), np.float32)
    arguments = exact, keys, values, lengths, NUMBERS[dtype], highest, sums, mixed
    if threads() == 1:
        _attend_to_parts(0, 1, *arguments)
    else:
        _attend_in_threads(threads(), *arguments)
    _join_parts(lengths, highest, sums, mixed, exact)
    return torch.from_numpy(exact).to(query.dtype)


def attention_mass(queries: Tensor, keys: Tensor, log_sums: Tensor) -> Tensor:
    """Attention that each key got of all queries of a prompt, summed, [query_heads, tokens], float32; memory is O(tokens).

    Queries [query_heads, tokens, head_dim], keys [kv_heads, tokens, head_dim], and what the logarithm of each query's sum of
    exponentials is, [query_heads, tokens], float32. Logits are in float32.
    """
    heads, tokens, dim = keys.shape
    group, count = len(queries) // heads, threads()
    exact = (queries.float() / math.sqrt(dim)).unflatten(0, (heads, group))
    mass = torch.zeros(heads, group, tokens)
    work = torch.empty(tokens * group * min(ROWS_AT_ONCE, tokens))  # asking for new memory takes longer than products
    for query, key, sums, received in zip(exact, keys.float(), log_sums.unflatten(0, (heads, group)), mass, strict=True):
        for start in range(0, tokens, ROWS_AT_ONCE):
            rows = query[:, start : start + ROWS_AT_ONCE]
            stop = start + rows.shape[1]
            logits = work[: stop * group * rows.shape[1]].view(stop, -1)
            torch.mm(key[:stop], rows.reshape(-1, dim).T, out=logits)
            some_sums = sums[:, start:stop].contiguous()
            arguments = logits.view(stop, group, -1).numpy(), some_sums.numpy(), start, received.numpy()
            if count == 1:
                _receive(0, 1, *arguments)
            else:
                _receive_in_threads(count, *arguments)
    return mass.flatten(0, 1)


def threads() -> int:
    """As many as torch has, and Numba is told to use."""
    count = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(count)
    return count


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """The address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


def _widened(number: Any) -> Any:
    """A number of a tensor as float32: of a bfloat16 one, seen as uint16, or of a level."""


@overload(_widened, strict=False, inline="always")  # strict, it wants annotations in the lambdas too
def _typed_widened(number: Any) -> Any:
    if number == types.uint8:
        return lambda number: np.float32(number)
    if isinstance(number, types.Integer):
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: number


POWERS = tuple(np.float32(math.log(2) ** n / math.factorial(n)) for n in range(7))
"""2 ** x is the sum of POWERS[n] * x ** n, to float32's precision where x is at most 1/2."""


@compiled
def exponential(x: Any) -> Any:
    """e ** x for x <= 0, in steps that a processor takes for many numbers at once; libraries' own takes one by one."""
    power = max(x * np.float32(1 / math.log(2)), np.float32(-126))
    whole = np.floor(power + np.float32(0.5))
    rest = power - whole
    total = POWERS[6]
    for n in (5, 4, 3, 2, 1, 0):
        total = total * rest + POWERS[n]
    return total * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def greatest(numbers: Any) -> Any:
    """The greatest of numbers [count], one at least, by lanes: a single maximum would wait for itself at every number."""
    lanes = np.full(LANES, numbers[0])
    whole = len(numbers) - len(numbers) % LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] = max(lanes[lane], numbers[start + lane])
    most = lanes[0]
    for number in lanes:
        most = max(most, number)
    for number in numbers[whole:]:
        most = max(most, number)
    return most


@compiled
def softmax_sums(logits: Any) -> tuple[Any, Any]:
    """Turns logits [entries] into weights of 1 at most; returns the highest logit and the sum of weights."""
    highest, total = greatest(logits), np.float32(0)
    for at in range(len(logits)):
        logits[at] = exponential(logits[at] - highest)
        total += logits[at]
    return highest, total


@compiled
def add_weighted(mixture: Any, weights: Any, entries: Any) -> None:
    """Add entries [entries, head_dim] times weights [entries] to a mixture [head_dim], which is written every eight entries."""
    count, dim = entries.shape
    eights = count - count % 8
    for at in range(0, eights, 8):
        w0, w1, w2, w3, w4, w5, w6, w7 = weights[at : at + 8]
        for channel in range(dim):
            mixture[channel] += (
                w0 * _widened(entries[at, channel])
                + w1 * _widened(entries[at + 1, channel])
                + w2 * _widened(entries[at + 2, channel])
                + w3 * _widened(entries[at + 3, channel])
                + w4 * _widened(entries[at + 4, channel])
                + w5 * _widened(entries[at + 5, channel])
                + w6 * _widened(entries[at + 6, channel])
                + w7 * _widened(entries[at + 7, channel])
            )
    for at in range(eights, count):
        for channel in range(dim):
            mixture[channel] += weights[at] * _widened(entries[at, channel])


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
        of_part_keys = carray(_pointer(keys[head]), (lengths[head], dim), number.dtype)[start:stop]
        of_part_values = carray(_pointer(values[head]), (lengths[head], dim), number.dtype)[start:stop]
        for at in range(stop - start):
            for each in range(queries):
                logit = np.float32(0)
                for channel in range(dim):
                    logit += query[head, each, channel] * _widened(of_part_keys[at, channel])
                logits[each, at] = logit
        mixed[head, part] = 0
        for each in range(queries):
            weights = logits[each][: stop - start]
            highest[head, part, each], sums[head, part, each] = softmax_sums(weights)
            add_weighted(mixed[head, part, each], weights, of_part_values)


@njit(parallel=True, cache=True)
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
                scale = math.exp(highest[head, part, each] - most)
                total += scale * sums[head, part, each]
                for channel in range(output.shape[2]):
                    output[head, each, channel] += scale * mixed[head, part, each, channel]
            for channel in range(output.shape[2]):
                output[head, each, channel] /= total


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


@njit(parallel=True, cache=True)
def _receive_in_threads(threads: Any, logits: Any, log_sums: Any, start: Any, received: Any) -> None:
    for thread in prange(threads):
        _receive(thread, threads, logits, log_sums, start, received)
