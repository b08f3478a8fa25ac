"""Entries in fewer bytes on a CPU, compiled by Numba: one call for what takes torch dozens, to the bit the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .numba_loops import exact
from .numba_vectors import numbers

HALVES = np.float32(2)


def by_channels(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed levels, scales and least numbers of x [heads, length, head_dim], float32, in groups of channels.

    [heads, length, head_dim * bits / 8], uint8, and [heads, length, groups], float32, to the bit as torch has them.
    """
    *shape, dim = x.shape
    packed = np.zeros((*shape, dim * bits // 8), np.uint8)
    scale, least = np.empty((2, *shape, -(-dim // group_size)), np.float32)
    _encode(x.contiguous().numpy(), packed, scale, least, bits, group_size)
    return torch.from_numpy(packed), torch.from_numpy(scale), torch.from_numpy(least)


@exact
def _encode(x: Any, packed: Any, scale: Any, least: Any, bits: Any, group_size: Any) -> None:
    """See `by_channels`."""
    heads, tokens, dim = x.shape
    most, found = np.float32((1 << bits) - 1), np.empty(dim, np.uint8)
    for head, entry in np.ndindex(heads, tokens):
        for part in range(scale.shape[2]):
            begin, end = part * group_size, min((part + 1) * group_size, dim)
            low = high = x[head, entry, begin]
            for channel in range(begin, end):
                low, high = min(low, x[head, entry, channel]), max(high, x[head, entry, channel])
            apart = (high - low) / most
            scale[head, entry, part], least[head, entry, part] = apart, low
            for channel in range(begin, end):
                step = (x[head, entry, channel] - low) / apart if apart > 0 else np.float32(0)
                found[channel] = np.uint8(np.rint(min(max(step, np.float32(0)), most)))
        _pack(found, packed[head, entry], bits)


def by_table(x: Tensor, lower: Tensor, upper: Tensor, levels: Tensor, bits: int) -> Tensor:
    """Packed places of the levels next to x [heads, length, head_dim] in its ranges, [heads, length, head_dim * bits / 8].

    Ranges are [heads or 1, length or 1, head_dim or 1], and all is float32; to the bit as torch has them.
    """
    *shape, dim = x.shape
    packed = np.zeros((*shape, dim * bits // 8), np.uint8)
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


@exact
def _pack(found: Any, packed: Any, bits: Any) -> None:
    """Levels [head_dim] as `packing.pack` packs them, into bytes that are 0."""
    dim, first, shift = len(found), 0, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            length, mask = dim * width // 8, (1 << width) - 1
            for channel in range(dim):
                field = ((found[channel] >> shift) & mask) << (channel // length * width)
                packed[first + channel % length] |= field
            first, shift = first + length, shift + width
