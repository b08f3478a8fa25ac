"""Rotary positions of single tokens on a CPU, compiled by Numba: one call for fourteen operations, to the bit the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .numba_loops import compiled
from .numba_vectors import half_turned, numbers, put, rounded_as, size, vector


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key [rows, heads, 1, head_dim] turned by angles of this cosine and sine [rows or 1, 1, 1, head_dim].

    All are bfloat16, and what a product is rounded to is what is added.
    """
    query, key = query.contiguous(), key.contiguous()
    turned = torch.empty_like(query), torch.empty_like(key)
    angles = numbers(cos), numbers(sin)
    _rotate(size(query.shape[-1]), numbers(query), numbers(key), *angles, *map(numbers, turned))
    return turned


@compiled
def _rotate(channels: Any, query: Any, key: Any, cos: Any, sin: Any, turned_query: Any, turned_key: Any) -> None:
    """See `rotate`."""
    for row in range(len(query)):
        angle = row % len(cos)
        _turn(channels, row, angle, query, cos, sin, turned_query)
        _turn(channels, row, angle, key, cos, sin, turned_key)


@compiled
def _turn(channels: Any, row: Any, angle: Any, x: Any, cos: Any, sin: Any, turned: Any) -> None:
    """All heads of a row of x."""
    cosines, sines = vector(cos, angle, channels), vector(sin, angle, channels)
    for place in range(row * x.shape[1], (row + 1) * x.shape[1]):
        own = vector(x, place, channels)
        put(turned, place, rounded_as(own * cosines, x) + rounded_as(half_turned(own) * sines, x))
