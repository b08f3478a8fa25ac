"""Evictions on a CPU, compiled by Numba: what is kept moves to the front, where it lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .numba_loops import compiled


def move_to_front(keys: Tensor, values: Tensor, index: Tensor) -> None:
    """Write the entries at index [heads, count], ascending in each head, in place of the first ones, in that order.

    Keys and values [heads, length, head_dim], of any numbers, without gaps.
    """
    _move(keys.view(torch.uint8).numpy(), values.view(torch.uint8).numpy(), index.contiguous().numpy())


@compiled
def _move(keys: Any, values: Any, index: Any) -> None:
    """See `move_to_front`: what is written over was moved before, since no entry moves back."""
    heads, count = index.shape
    for head in range(heads):
        for at in range(count):
            place = index[head, at]
            if place > at:
                keys[head, at] = keys[head, place]
                values[head, at] = values[head, place]
