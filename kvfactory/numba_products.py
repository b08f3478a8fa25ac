"""Products of matrices on a CPU whose results are used where they are made, in the registers and the nearest cache.

A tile is some rows of one matrix times `COLUMNS` columns of another: as many sums as the registers hold. Numbers in
bfloat16 are multiplied two at a time where the processor can, or matrices at once, exactly, and summed in float32.
"""

from __future__ import annotations

from functools import partial, reduce
from math import lcm
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import overload
from torch import Tensor
from torch.nn.functional import pad

from .compiled import WIDEST, may_use_matrices
from .numba_entries import as_float, load, place_of, put, vector
from .numba_loops import FEATURES, compiled
from .numba_matrices import SIDE, add_matrices, set_matrices
from .numba_vectors import FREE, Vector, chosen, intrinsic, joined, size

ROWS = 6
COLUMNS = 64 if "+avx512f" in FEATURES else 16
"""Of a tile: 24 registers of 32, or 12 of 16."""
WIDE = size(COLUMNS)
PAIRS = "+avx512bf16" in FEATURES
MATRICES = PAIRS and "+amx-bf16" in FEATURES and may_use_matrices()
"""Whether the processor multiplies matrices in bfloat16, see `numba_matrices`."""


def rows_of(x: Tensor) -> Any:
    """x [..., rows, numbers], an even number of them, for the left side of tiles; rows without numbers fill up the last.

    [..., rows, numbers], float32, or int32 [..., numbers / 2], each of which is two numbers in bfloat16.
    """
    return _held(pad(x, (0, 0, 0, -x.shape[-2] % lcm(ROWS, SIDE)))).numpy()


def columns_of(x: Tensor) -> Any:
    """x [..., columns, numbers] for their right side, [..., tiles, numbers, COLUMNS], with pairs as `rows_of` has them."""
    whole = _held(pad(x, (0, 0, 0, -x.shape[-2] % COLUMNS)))
    return whole.unflatten(-2, (-1, COLUMNS)).transpose(-1, -2).contiguous().numpy()


def _held(x: Tensor) -> Tensor:
    """Numbers as they are multiplied; of pairs, whole matrices where they are."""
    if not PAIRS or x.dtype != torch.bfloat16:
        return x.float().contiguous()
    missing = -x.shape[-1] % (2 * SIDE) if MATRICES else 0
    return (pad(x, (0, missing)) if missing else x).contiguous().view(torch.int32)  # padding by nothing copies


class _BFloat16(ir.types.Type):
    """The compiler has it, and the library that writes for it does not."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


@intrinsic
def add_product(typing_context: Any, sums: Any, left: Any, number: Any, right: Any, index: Any) -> Any:
    """Sums, and one number of `left` times the entry `index` of `right`, an array of entries as wide as the sums.

    Both are float32, or int32, each of which is two numbers in bfloat16; two products are added then, in float32, by what
    processors with `+avx512bf16` have for it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        before, *places = arguments
        width = before.type.count
        kinds = signature.args[1:]
        one = load(context, builder, kinds[:2], places[:2], 1)
        many = load(context, builder, kinds[2:], places[2:], width)
        if kinds[0].dtype == types.float32:
            return builder.fadd(before, builder.fmul(many, chosen(builder, one, [0] * width), FREE), FREE)
        assert kinds[0].dtype == kinds[2].dtype == types.int32, "products are of float32 or of pairs of bfloat16"
        everywhere = chosen(builder, one, [0] * WIDEST)
        parts = []
        for start in range(0, width, WIDEST):
            some = range(start, start + WIDEST)
            parts.append(_add_pairs(builder, chosen(builder, before, some), chosen(builder, many, some), everywhere))
        return joined(builder, parts)

    return sums(sums, left, number, right, index), generate


def _add_pairs(builder: Any, sums: Any, some: Any, others: Any) -> Any:
    """`WIDEST` sums, and to each the products of two numbers in bfloat16 by two others; all are vectors of 64 bytes."""
    pairs = ir.VectorType(_BFloat16(), 2 * WIDEST)
    kind = ir.FunctionType(sums.type, [sums.type, pairs, pairs])
    add = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(add, [sums, builder.bitcast(some, pairs), builder.bitcast(others, pairs)])


@intrinsic
def add_entries(typing_context: Any, sums: Any, left: Any, place: Any, right: Any, index: Any) -> Any:
    """`WIDEST` sums, and the products of an entry of `left` and one of `right`, which have twice as many numbers each.

    Arrays are as `numbers` gives them: float32, or bfloat16, which is multiplied by pairs where the processor can.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        before, *places = arguments
        kinds = signature.args[1:]
        both = [load(context, builder, kinds[at : at + 2], places[at : at + 2], 2 * WIDEST) for at in (0, 2)]
        if PAIRS and kinds[0].dtype == kinds[2].dtype == types.uint16:
            return _add_pairs(builder, before, *both)
        one, other = (as_float(builder, each, kind.dtype) for each, kind in zip(both, kinds[::2], strict=True))
        for start in (0, WIDEST):
            half = (chosen(builder, each, range(start, start + WIDEST)) for each in (one, other))
            before = builder.fadd(before, builder.fmul(*half, flags=FREE), flags=FREE)
        return before

    return sums(sums, left, place, right, index), generate


@intrinsic
def products(typing_context: Any, row: Any, array: Any, first: Any) -> Any:
    """Of a vector of float32 and `WIDEST` entries of an array, from entry `first` on: as many sums of products.

    Each sum by itself would take eight operations within its register; taken together they take three each.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count, kinds = signature.args[0].count, (signature.args[1], types.intp)
        start = context.cast(builder, arguments[2], signature.args[2], types.intp)
        runs = [range(run, run + WIDEST) for run in range(0, count, WIDEST)]
        own, sums = [chosen(builder, arguments[0], run) for run in runs], []
        for entry in range(WIDEST):
            place = builder.add(start, ir.Constant(start.type, entry))
            whole = as_float(builder, load(context, builder, kinds, (arguments[1], place), count), kinds[0].dtype)
            parts = [builder.fmul(chosen(builder, whole, run), one, FREE) for run, one in zip(runs, own, strict=True)]
            sums.append(reduce(partial(builder.fadd, flags=FREE), parts))
        for left, right in FOLDS:
            sums = [_folded(builder, *pair, left, right) for pair in zip(sums[::2], sums[1::2], strict=True)]
        return sums[0]

    assert row.count % WIDEST == 0, "entries fill whole registers"
    return Vector(WIDEST)(row, array, first), generate


def _quarters(*of_both: int) -> list[int]:
    """A choice of four numbers, 4 to 7 those of the other vector, that is made in every quarter of two registers."""
    return [quarter + each % 4 + each // 4 * WIDEST for quarter in range(0, WIDEST, 4) for each in of_both]


def _whole_quarters(*of_both: int) -> list[int]:
    """A choice of four quarters, 4 to 7 those of the other."""
    return [4 * each + number for each in of_both for number in range(4)]


FOLDS = (
    (_quarters(0, 4, 1, 5), _quarters(2, 6, 3, 7)),
    (_quarters(0, 1, 4, 5), _quarters(2, 3, 6, 7)),
    (_whole_quarters(0, 2, 4, 6), _whole_quarters(1, 3, 5, 7)),
    (_whole_quarters(0, 2, 4, 6), _whole_quarters(1, 3, 5, 7)),
)
"""How two vectors become one that has half as many parts of twice as many sums: what is added to what."""


def _folded(builder: Any, one: Any, other: Any, left: list[int], right: list[int]) -> Any:
    """The numbers of both at places `left`, and those at places `right` added to them."""
    masks = (ir.Constant(ir.VectorType(ir.IntType(32), WIDEST), places) for places in (left, right))
    return builder.fadd(*(builder.shuffle_vector(one, other, mask) for mask in masks), flags=FREE)


@intrinsic
def put_rounded(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Write a vector as entry `index` of an array without gaps of what is multiplied: rounded where that is bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = arguments[2]
        if signature.args[0].dtype == types.int32:
            rounded = builder.fptrunc(held, ir.VectorType(_BFloat16(), held.type.count))
            held = builder.bitcast(rounded, ir.VectorType(ir.IntType(32), held.type.count // 2))
        builder.store(held, place_of(context, builder, signature.args, arguments, held.type), align=4)
        return context.get_dummy_value()

    return types.void(array, index, value), generate


def tile_rows(left: Any) -> int:
    """Rows of a tile whose left side is such an array; compiled functions know it before they run."""
    return SIDE if MATRICES and left.dtype == types.int32 else ROWS


def add_tile(tile: Any, at: Any, left: Any, row: Any, right: Any, column: Any) -> None:
    """Add to `tile_rows` rows of sums [..., COLUMNS] from row `at` on the products of rows `row`... and a tile of columns.

    Left [..., numbers] and right [..., numbers, COLUMNS] are as made above, rows and tiles of columns counted through all
    of their dimensions. For compiled functions.
    """


def set_tile(tile: Any, at: Any, left: Any, row: Any, right: Any, column: Any) -> None:
    """As `add_tile`, in place of what is there."""


@overload(tile_rows, strict=False)
def _tile_rows(left: Any) -> Any:
    rows = tile_rows(left)
    return lambda left: rows


@overload(add_tile, strict=False)
def _add_tile(tile: Any, at: Any, left: Any, row: Any, right: Any, column: Any) -> Any:
    def by_products(tile: Any, at: Any, left: Any, row: Any, right: Any, column: Any) -> None:
        count = left.shape[-1]
        add_products(tile, at, left, row * count, count, 1, right, column * count, 1, count)

    def by_matrices(tile: Any, at: Any, left: Any, row: Any, right: Any, column: Any) -> None:
        add_matrices(tile, at, left, row, right, column, left.shape[-1])

    return by_products if tile_rows(left) == ROWS else by_matrices


@overload(set_tile, strict=False)
def _set_tile(tile: Any, at: Any, left: Any, row: Any, right: Any, column: Any) -> Any:
    def by_products(tile: Any, at: Any, left: Any, row: Any, right: Any, column: Any) -> None:
        tile[at : at + ROWS] = 0
        add_tile(tile, at, left, row, right, column)

    def by_matrices(tile: Any, at: Any, left: Any, row: Any, right: Any, column: Any) -> None:
        set_matrices(tile, at, left, row, right, column, left.shape[-1])

    return by_products if tile_rows(left) == ROWS else by_matrices


@compiled
def add_products(
    tile: Any,
    at: Any,
    left: Any,
    first: Any,
    rows_apart: Any,
    left_apart: Any,
    right: Any,
    other: Any,
    right_apart: Any,
    count: Any,
) -> None:
    """As `add_tile`, of matrices that lie anyhow: rows, and `count` numbers of each, are so far apart in `left`.

    `right` is counted in runs of COLUMNS numbers.
    """
    a, b, c = vector(tile, at, WIDE), vector(tile, at + 1, WIDE), vector(tile, at + 2, WIDE)
    d, e, f = vector(tile, at + 3, WIDE), vector(tile, at + 4, WIDE), vector(tile, at + 5, WIDE)
    for each in range(count):
        one, many = first + each * left_apart, other + each * right_apart
        a = add_product(a, left, one, right, many)
        b = add_product(b, left, one + rows_apart, right, many)
        c = add_product(c, left, one + 2 * rows_apart, right, many)
        d = add_product(d, left, one + 3 * rows_apart, right, many)
        e = add_product(e, left, one + 4 * rows_apart, right, many)
        f = add_product(f, left, one + 5 * rows_apart, right, many)
    put(tile, at, a)
    put(tile, at + 1, b)
    put(tile, at + 2, c)
    put(tile, at + 3, d)
    put(tile, at + 4, e)
    put(tile, at + 5, f)
