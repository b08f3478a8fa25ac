"""Products with quantised entries on a CPU, compiled by Numba: levels are unpacked some at a time, in the cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .numba_loops import add_weighted, compiled, in_threads, product, run

WORD = 8
"""Bytes of a word, in which levels are unpacked together."""
ONES = np.uint64(0x0101010101010101)
AT_ONCE = 64
"""Entries whose levels are there together."""
SHARE = 512
"""Entries of a head that a thread works on before another may go on with the rest."""


class Uniform(NamedTuple):
    """Entries of equally distant levels, as `quantisation.UniformColumn` has them."""

    packed: Any
    """[heads, length, words], uint64."""
    scale: Any
    """[heads, groups of entries, head_dim] or [heads, length, groups of channels], float32."""
    least: Any
    ends: Any
    """Where each group of entries ends, [heads, groups], int64; [heads, 0] if groups are of channels."""
    bits: int
    group_size: int
    """Channels of a group, if groups are of channels."""


def uniform(
    packed: Tensor, scale: Tensor, least: Tensor, counts: Tensor | None, bits: int, group_size: int
) -> Uniform | None:
    """The column of packed levels [heads, length, bytes]; `counts` [heads, groups] are of its groups of entries, if any.

    None for levels that are not packed in whole words.
    """
    if packed.shape[-1] * (bits & -bits) % (bits * WORD):
        return None
    ends = np.empty((len(packed), 0), np.int64) if counts is None else counts.long().cumsum(1).numpy()
    scales, leasts = (each.float().contiguous().numpy() for each in (scale, least))
    return Uniform(packed.contiguous().numpy().view(np.uint64), scales, leasts, ends, bits, group_size)


def products(query: Tensor, column: Uniform) -> Tensor:
    """Of query [heads, queries, head_dim] and each entry of a column, [heads, queries, length], all float32."""
    logits = torch.empty(*query.shape[:2], column.packed.shape[1])
    run(_multiply, _multiply_in_threads, column, query.contiguous().numpy(), logits.numpy())
    return logits


def mixed(weights: Tensor, column: Uniform) -> Tensor:
    """Sums of the entries of a column with weights [heads, queries, length], [heads, queries, head_dim], all float32."""
    heads, queries, length = weights.shape
    dim = column.packed.shape[2] * WORD * 8 // column.bits
    mixtures = torch.zeros(heads, -(-length // SHARE), queries, dim)
    run(_mix, _mix_in_threads, column, weights.contiguous().numpy(), mixtures.numpy())
    return mixtures.sum(1)


@compiled
def _room(dim: Any) -> tuple[Any, Any]:
    """Memory to unpack into: as words [entries, words], and as levels [entries, head_dim], uint8."""
    levels = np.empty((AT_ONCE, dim), np.uint8)
    return levels.view(np.uint64), levels


@compiled
def _unpack(packed: Any, bits: Any, levels: Any) -> None:
    """What `packing.pack` was given of some entries, words [entries, words], into words of a byte a level."""
    first = shift = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            count = levels.shape[1] * width // 8
            mask = np.uint64(ONES * np.uint64((1 << width) - 1))
            for place in range(8 // width):
                start, right, left = place * count, np.uint64(place * width), np.uint64(shift)
                for entry in range(len(levels)):
                    for at in range(count):
                        fields = ((packed[entry, first + at] >> right) & mask) << left
                        levels[entry, start + at] = levels[entry, start + at] | fields if shift else fields
            first, shift = first + count, shift + width


@compiled
def _multiply_runs(query: Any, column: Any, head: Any, start: Any, levels: Any, logits: Any) -> None:
    """The products of entries start..., whose groups are runs of entries: scales go to the query."""
    queries, dim = query.shape
    scaled, group, at = np.empty_like(query), 0, 0
    while at < len(levels):
        while column.ends[head, group] <= start + at:
            group += 1
        stop = min(column.ends[head, group] - start, len(levels))
        scales = column.scale[head, group]
        for each in range(queries):
            shared, row = product(query[each], column.least[head, group]), scaled[each]
            for channel in range(dim):
                row[channel] = query[each, channel] * scales[channel]
            result = logits[each][start + at : start + stop]
            for entry in range(stop - at):
                result[entry] = shared + product(row, levels[at + entry])
        at = stop


@compiled
def _scale_channels(column: Any, head: Any, start: Any, levels: Any, numbers: Any) -> None:
    """Write entries start..., whose groups are of channels, as numbers [entries, head_dim]."""
    for entry in range(len(levels)):
        for part in range(column.scale.shape[2]):
            scale, least = column.scale[head, start + entry, part], column.least[head, start + entry, part]
            begin = part * column.group_size
            row = numbers[entry][begin : begin + column.group_size]
            some = levels[entry][begin : begin + column.group_size]
            for channel in range(len(row)):
                row[channel] = np.float32(some[channel]) * scale + least


@compiled
def _multiply_channels(query: Any, column: Any, head: Any, start: Any, levels: Any, logits: Any) -> None:
    """The products of entries start..., whose groups are of channels."""
    numbers = np.empty(levels.shape, np.float32)
    _scale_channels(column, head, start, levels, numbers)
    for each in range(len(query)):
        result = logits[each][start : start + len(levels)]
        for entry in range(len(levels)):
            result[entry] = product(query[each], numbers[entry])


@compiled
def _mix_runs(weights: Any, column: Any, head: Any, start: Any, levels: Any, mixture: Any) -> None:
    """Add entries start..., whose groups are runs of entries: the mixture of a group's levels is scaled."""
    queries, dim = mixture.shape
    of_group, group, at = np.empty(dim, np.float32), 0, 0
    while at < len(levels):
        while column.ends[head, group] <= start + at:
            group += 1
        stop = min(column.ends[head, group] - start, len(levels))
        scales, leasts = column.scale[head, group], column.least[head, group]
        for each in range(queries):
            some, row = weights[each][start + at : start + stop], mixture[each]
            of_group[:] = 0
            add_weighted(of_group, some, levels[at:stop])
            whole = some.sum()
            for channel in range(dim):
                row[channel] += scales[channel] * of_group[channel] + leasts[channel] * whole
        at = stop


@compiled
def _mix_channels(weights: Any, column: Any, head: Any, start: Any, levels: Any, mixture: Any) -> None:
    """Add entries start..., whose groups are of channels."""
    numbers = np.empty(levels.shape, np.float32)
    _scale_channels(column, head, start, levels, numbers)
    for each in range(len(mixture)):
        add_weighted(mixture[each], weights[each][start : start + len(levels)], numbers)


@compiled
def _multiply(thread: Any, threads: Any, column: Any, query: Any, logits: Any) -> None:
    """The products of every `threads`-th share of the entries."""
    heads, _, length = logits.shape
    words, levels = _room(query.shape[2])
    shares = (length + SHARE - 1) // SHARE
    for job in range(thread, heads * shares, threads):
        head, begin = job // shares, job % shares * SHARE
        for start in range(begin, min(begin + SHARE, length), AT_ONCE):
            count = min(AT_ONCE, length - start)
            _unpack(column.packed[head, start : start + count], column.bits, words[:count])
            arguments = query[head], column, head, start, levels[:count], logits[head]
            if column.ends.size:
                _multiply_runs(*arguments)
            else:
                _multiply_channels(*arguments)


@compiled
def _mix(thread: Any, threads: Any, column: Any, weights: Any, mixtures: Any) -> None:
    """The mixtures [heads, shares, queries, head_dim] of every `threads`-th share of the entries."""
    heads, shares, _, dim = mixtures.shape
    length = weights.shape[2]
    words, levels = _room(dim)
    for job in range(thread, heads * shares, threads):
        head, share = job // shares, job % shares
        for start in range(share * SHARE, min((share + 1) * SHARE, length), AT_ONCE):
            count = min(AT_ONCE, length - start)
            _unpack(column.packed[head, start : start + count], column.bits, words[:count])
            arguments = weights[head], column, head, start, levels[:count], mixtures[head, share]
            if column.ends.size:
                _mix_runs(*arguments)
            else:
                _mix_channels(*arguments)


@in_threads
def _multiply_in_threads(threads: Any, column: Any, query: Any, logits: Any) -> None:
    for thread in prange(threads):
        _multiply(thread, threads, column, query, logits)


@in_threads
def _mix_in_threads(threads: Any, column: Any, weights: Any, mixtures: Any) -> None:
    for thread in prange(threads):
        _mix(thread, threads, column, weights, mixtures)
