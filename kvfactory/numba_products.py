"""Products of matrices on a CPU whose results are used where they are made, in the registers and the nearest cache.

A tile is `ROWS` rows of one matrix times `WIDE` columns of another: as many sums as the registers hold. Numbers in bfloat16
are multiplied two at a time where the processor can, exactly, and summed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .numba_loops import FEATURES, compiled
from .numba_vectors import add_product, put, size, vector

ROWS = 6
COLUMNS = 64 if "+avx512f" in FEATURES else 16
"""Of a tile: 24 registers of 32, or 12 of 16."""
WIDE = size(COLUMNS)
PAIRS = "+avx512bf16" in FEATURES


def rows_of(x: Tensor) -> Any:
    """x [..., rows, numbers], an even number of them, for the left side of tiles; rows without numbers fill up the last.

    [..., a multiple of ROWS, numbers], float32, or int32 [..., numbers / 2], each of which is two numbers in bfloat16.
    """
    return _held(pad(x, (0, 0, 0, -x.shape[-2] % ROWS))).numpy()


def columns_of(x: Tensor) -> Any:
    """x [..., columns, numbers] for their right side, [..., tiles, numbers, COLUMNS], with pairs as `rows_of` has them."""
    whole = _held(pad(x, (0, 0, 0, -x.shape[-2] % COLUMNS)))
    return whole.unflatten(-2, (-1, COLUMNS)).transpose(-1, -2).contiguous().numpy()


def _held(x: Tensor) -> Tensor:
    """Numbers as they are multiplied."""
    return x.contiguous().view(torch.int32) if PAIRS and x.dtype == torch.bfloat16 else x.float().contiguous()


@compiled
def add_tile(tile: Any, at: Any, left: Any, row: Any, right: Any, column: Any) -> None:
    """Add to ROWS rows of sums [..., COLUMNS] from row `at` on the products of rows `row`... and a tile of columns.

    Left [..., numbers] and right [..., numbers, COLUMNS] are as made above, rows and tiles of columns counted through all
    of their dimensions.
    """
    count = left.shape[-1]
    first, other = row * count, column * count
    a, b, c = vector(tile, at, WIDE), vector(tile, at + 1, WIDE), vector(tile, at + 2, WIDE)
    d, e, f = vector(tile, at + 3, WIDE), vector(tile, at + 4, WIDE), vector(tile, at + 5, WIDE)
    for each in range(count):
        a = add_product(a, left, first + each, right, other + each)
        b = add_product(b, left, first + count + each, right, other + each)
        c = add_product(c, left, first + 2 * count + each, right, other + each)
        d = add_product(d, left, first + 3 * count + each, right, other + each)
        e = add_product(e, left, first + 4 * count + each, right, other + each)
        f = add_product(f, left, first + 5 * count + each, right, other + each)
    put(tile, at, a)
    put(tile, at + 1, b)
    put(tile, at + 2, c)
    put(tile, at + 3, d)
    put(tile, at + 4, e)
    put(tile, at + 5, f)
