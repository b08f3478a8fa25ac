"""Entries in fewer bytes on a CPU, compiled by Numba: one call for what takes torch dozens, to the bit the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .numba_entries import number, numbers, put
from .numba_loops import exact
from .numba_vectors import repeated, size

HALVES = np.float32(2)


def by_channels(x: Tensor, packed: Any, scale: Any, least: Any, start: int, bits: int, group_size: int) -> None:
    """Write what is made of entries x [heads, tokens, head_dim], in groups of channels, from entry `start` on.

    Levels into packed bytes [heads, length, head_dim * bits / 8], scales and least numbers into [heads, length, groups],
    which are arrays as `numbers` gives them; to the bit as torch has them.
    """
    encode(numbers(x), 0, x.shape[1], packed, scale, least, size(1), start, bits, group_size)


@exact
def encode(
    x: Any,
    first: Any,
    tokens: Any,
    packed: Any,
    scale: Any,
    least: Any,
    one: Any,
    start: Any,
    bits: Any,
    group_size: Any,
) -> None:
    """See `by_channels`: of so many tokens from the first on, in compiled loops."""
    heads, capacity, dim = x.shape
    most, found, numbers = np.float32((1 << bits) - 1), np.empty(dim, np.uint8), np.empty(dim, np.float32)
    for head, entry in np.ndindex(heads, tokens):
        for channel in range(dim):
            numbers[channel] = number(x, (head * capacity + first + entry) * dim + channel)
        for part in range(scale.shape[2]):
            group = numbers[part * group_size : (part + 1) * group_size]
            low = high = group[0]
            for each in group:
                low, high = min(low, each), max(high, each)
            apart = (high - low) / most
            place = (head * scale.shape[1] + start + entry) * scale.shape[2] + part
            put(scale, place, repeated(apart, one))
            put(least, place, repeated(low, one))
            for channel in range(len(group)):
                step = (group[channel] - low) / apart if apart > 0 else np.float32(0)
                found[part * group_size + channel] = np.uint8(np.rint(min(max(step, np.float32(0)), most)))
        _pack(found, packed[head, start + entry], bits)


def by_table(x: Tensor, lower: Tensor, upper: Tensor, levels: Tensor, bits: int) -> Tensor:
    """Packed places of the levels next to x [heads, length, head_dim] in its ranges, [heads, length, head_dim * bits / 8].

    Ranges are [heads or 1, length or 1, head_dim or 1], and all is float32; to the bit as torch has them.
    """
    *shape, dim = x.shape
    packed = np.empty((*shape, dim * bits // 8), np.uint8)
    middles = ((levels[1:] + levels[:-1]) / 2).numpy()
    low, high = (each.expand(-1, -1, dim).contiguous().numpy() for each in (lower, upper))
    _look_up(x.contiguous().numpy(), low, high, middles, packed, bits)
    return torch.from_numpy(packed)


@exact
def _look_up(x: Any, lower: Any, upper: Any, middles: Any, packed: Any, bits: Any) -> None:
    """See `by_table`."""
    heads, tokens, dim = x.shape
    found, inner = np.empty(dim, np.uint8), np.empty(dim, np.float32)
    for head, entry in np.ndindex(heads, tokens):
        low = lower[head % len(lower), entry % lower.shape[1]]
        high = upper[head % len(upper), entry % upper.shape[1]]
        for channel in range(dim):
            half = (high[channel] - low[channel]) / HALVES
            middle = (high[channel] + low[channel]) / HALVES
            inner[channel] = (x[head, entry, channel] - middle) / half if half > 0 else np.float32(0)
        found[:] = 0
        for each in middles:
            for channel in range(dim):
                found[channel] += inner[channel] > each
        _pack(found, packed[head, entry], bits)


def apart(x: Tensor, chosen: Tensor, of_head: int, of_channel: int) -> tuple[Tensor, Tensor]:
    """Those numbers of x [heads, length, head_dim] that a bool of its shape names, and before them their places.

    As `packing.Sparse` has them.
    """
    where, what = _take(numbers(x), chosen.contiguous().numpy(), of_head, of_channel)
    return torch.from_numpy(where), torch.from_numpy(what).view(x.dtype)


@exact
def _take(x: Any, chosen: Any, of_head: Any, of_channel: Any) -> Any:
    """See `apart`."""
    heads, tokens, dim = x.shape
    count = chosen.sum()
    where, what, at = np.empty(count, np.int32), np.empty(count, x.dtype), 0
    for entry in range(tokens):
        for head in range(heads):
            for channel in range(dim):
                if chosen[head, entry, channel]:
                    where[at] = (entry << of_head | head) << of_channel | channel
                    what[at] = x[head, entry, channel]
                    at += 1
    return where, what


def tamed_by_rank(x: Tensor, low: float, middle: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which numbers of vectors x [..., n] lie at or beyond the two outer of three ranks in ascending order, bool.

    Then the least and the greatest of each vector, [..., 1], float32, where those count as what lies at the middle rank.
    """
    outlying, lower = np.empty(x.shape, np.bool_), np.empty((*x.shape[:-1], 1), np.float32)
    upper = np.empty_like(lower)
    flat = (each.reshape(-1) for each in (outlying, lower, upper))
    _tame(numbers(x), np.array([low, middle, high]), *flat)
    return torch.from_numpy(outlying), torch.from_numpy(lower), torch.from_numpy(upper)


@exact
def _tame(x: Any, ranks: Any, outlying: Any, lower: Any, upper: Any) -> None:
    """See `tamed_by_rank`."""
    count = x.shape[-1]
    own, at = np.empty(count, np.float32), np.empty(3, np.float32)
    for each in range(len(lower)):
        for channel in range(count):
            own[channel] = number(x, each * count + channel)
        ascending = np.sort(own)
        for which in range(3):
            below = int(ranks[which])
            weight, least = np.float32(ranks[which] - below), ascending[below]
            most = ascending[min(below + 1, count - 1)]
            near = weight < np.float32(0.5)  # as torch's lerp
            at[which] = least + weight * (most - least) if near else most - (most - least) * (np.float32(1) - weight)
        for channel in range(count):
            is_outlying = own[channel] <= at[0] or own[channel] >= at[2]
            outlying[each * count + channel] = is_outlying
            own[channel] = at[1] if is_outlying else own[channel]
        lower[each], upper[each] = own.min(), own.max()


@exact
def _pack(found: Any, packed: Any, bits: Any) -> None:
    """Levels [head_dim] as `packing.pack` packs them."""
    dim, first, shift = len(found), 0, 0
    packed[:] = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            length, mask = dim * width // 8, (1 << width) - 1
            for channel in range(dim):
                field = ((found[channel] >> shift) & mask) << (channel // length * width)
                packed[first + channel % length] |= field
            first, shift = first + length, shift + width
