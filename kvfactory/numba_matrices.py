"""Matrices that a processor multiplies in one instruction (AMX), for compiled loops: 16 rows of 16 pairs of bfloat16."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .numba_vectors import intrinsic

SIDE = 16
"""Rows of a register, and numbers of four bytes in each."""
LINE = 4 * SIDE
"""Bytes of such a row."""
BYTE, SIZE, PLACE = ir.IntType(8), ir.IntType(64), ir.IntType(8).as_pointer()
LAYOUT = [1, *[0] * 15, *[LINE, 0] * 8, *[0] * 16, *[SIDE] * 8, *[0] * 8]
"""What the processor is told of its eight registers: bytes of a row, and rows."""
SUMS, LEFT, RIGHT = range(4), 4, (5, 6)
"""Which registers are for what: sums of four matrices side by side, one of the left side, and two in turn of the right."""


@intrinsic
def add_matrices(
    typing_context: Any, sums: Any, at: Any, left: Any, row: Any, right: Any, column: Any, pairs: Any
) -> Any:
    """Add to 16 rows of sums [..., 64], float32, from row `at` on, products of pairs of bfloat16, which int32 hold.

    Rows `row`... of left [..., pairs] are multiplied by the matrix `column` of right [..., pairs, 64]; pairs are a multiple
    of 16. All arrays are without gaps, and rows and matrices are counted through all dimensions.
    """
    return _multiply(sums, at, left, row, right, column, pairs, True)


@intrinsic
def set_matrices(
    typing_context: Any, sums: Any, at: Any, left: Any, row: Any, right: Any, column: Any, pairs: Any
) -> Any:
    """As `add_matrices`, in place of what is there: a register that is read from what was just written waits for it."""
    return _multiply(sums, at, left, row, right, column, pairs, False)


def _multiply(
    sums: Any, at: Any, left: Any, row: Any, right: Any, column: Any, pairs: Any, adds: bool
) -> tuple[Any, Any]:
    """The signature of both, and what writes their code."""
    assert left.dtype == right.dtype == types.int32, "matrices are of pairs of bfloat16"

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def number(value: int) -> Any:
            return ir.Constant(SIZE, value)

        def given(place: int) -> Any:
            return context.cast(builder, arguments[place], signature.args[place], types.intp)

        def address(place: int, index: Any, apart: Any) -> Any:
            """Of an array's entry, where entries are so many bytes apart."""
            data = context.make_array(signature.args[place])(context, builder, arguments[place]).data
            return builder.gep(builder.bitcast(data, PLACE), [builder.mul(index, apart)])

        def call(name: str, *operands: Any) -> None:
            kinds = [each.type for each in operands]
            function = ir.FunctionType(ir.VoidType(), kinds)
            builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.x86.{name}"), operands)

        def move(name: str, register: int, start: Any, offset: int, apart: Any) -> None:
            call(name, BYTE(register), builder.gep(start, [number(offset)]), apart)

        wide, row_apart = number(LINE * len(SUMS)), builder.mul(given(6), number(4))
        of_sums = address(0, given(1), wide)
        of_left = address(2, given(3), row_apart)
        of_right = address(4, builder.mul(given(5), given(6)), wide)
        layout = cgutils.global_constant(builder, "matrices", ir.Constant(ir.ArrayType(BYTE, len(LAYOUT)), LAYOUT))
        call("ldtilecfg", builder.bitcast(layout, PLACE))
        for each in SUMS:
            if adds:
                move("tileloadd64", each, of_sums, each * LINE, wide)
            else:
                call("tilezero", BYTE(each))
        with cgutils.for_range(builder, builder.udiv(given(6), number(SIDE))) as loop:
            move("tileloadd64", LEFT, builder.gep(of_left, [builder.mul(loop.index, number(LINE))]), 0, row_apart)
            some = builder.gep(of_right, [builder.mul(loop.index, builder.mul(wide, number(SIDE)))])
            for each in SUMS:
                other = RIGHT[each % len(RIGHT)]
                move("tileloadd64", other, some, each * LINE, wide)
                call("tdpbf16ps", BYTE(each), BYTE(LEFT), BYTE(other))
        for each in SUMS:
            move("tilestored64", each, of_sums, each * LINE, wide)
        call("tilerelease")
        return context.get_dummy_value()

    return types.void(sums, at, left, row, right, column, pairs), generate
