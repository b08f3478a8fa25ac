"""Exponentials of all numbers of a vector, for compiled loops: as `numba_loops.exponential`, which takes one at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .numba_loops import LOG2_E, POWERS
from .numba_vectors import FREE, all_of, intrinsic


@intrinsic
def exponentials(typing_context: Any, value: Any) -> Any:
    """e ** x of each x <= 0, float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (x,) = arguments
        whole_numbers = ir.VectorType(ir.IntType(32), x.type.count)
        add, subtract, times = (partial(getattr(builder, name), flags=FREE) for name in ("fadd", "fsub", "fmul"))

        def constant(number: Any) -> Any:
            return ir.Constant(x.type, [float(number)] * x.type.count)

        power, least = times(x, constant(LOG2_E)), constant(-126)
        power = builder.select(builder.fcmp_ordered("<", power, least), least, power)  # what is no number stays none
        floor = f"llvm.floor.v{x.type.count}f32"
        floor = cgutils.get_or_insert_function(builder.module, ir.FunctionType(x.type, [x.type]), floor)
        whole = builder.call(floor, [add(power, constant(0.5))])
        rest, total = subtract(power, whole), constant(POWERS[-1])
        for each in reversed(POWERS[:-1]):
            total = add(times(total, rest), constant(each))
        exponent = builder.fptosi(whole, whole_numbers)
        bits = builder.shl(builder.add(exponent, all_of(exponent, 127)), all_of(exponent, 23))
        return times(total, builder.bitcast(bits, x.type))

    return value(value), generate
