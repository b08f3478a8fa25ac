"""Rotary positions of single tokens on a CPU, compiled by Numba: one call for fourteen operations, to the bit the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .numba_entries import NUMBERS, put, rounded_as, vector
from .numba_loops import compiled
from .numba_memory import entries_at
from .numba_vectors import half_turned, size


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key [rows, heads, 1, head_dim] turned by angles of this cosine and sine [rows or 1, 1, 1, head_dim].

    All are bfloat16, and what a product is rounded to is what is added.
    """
    query, key, cos, sin = query.contiguous(), key.contiguous(), cos.contiguous(), sin.contiguous()
    turned = torch.empty_like(query), torch.empty_like(key)
    angles = len(cos), cos.data_ptr(), sin.data_ptr()
    for x, output in zip((query, key), turned, strict=True):
        rows, heads, _, dim = x.shape
        _rotate(size(dim), NUMBERS[x.dtype], rows, heads, *angles, x.data_ptr(), output.data_ptr())
    return turned


@compiled
def _rotate(
    channels: Any,
    number: Any,
    rows: Any,
    heads: Any,
    angles: Any,
    of_cos: Any,
    of_sin: Any,
    of_x: Any,
    of_turned: Any,
) -> None:
    """See `rotate`, of x, of cosines and sines of one row or all, and output at addresses, of the numbers of an array."""
    dim = channels.itemsize
    cos, sin = entries_at(of_cos, angles, dim, number), entries_at(of_sin, angles, dim, number)
    x, turned = entries_at(of_x, rows * heads, dim, number), entries_at(of_turned, rows * heads, dim, number)
    for row in range(rows):
        cosines, sines = vector(cos, row % angles, channels), vector(sin, row % angles, channels)
        for place in range(row * heads, (row + 1) * heads):
            own = vector(x, place, channels)
            put(turned, place, rounded_as(own * cosines, x) + rounded_as(half_turned(own) * sines, x))
