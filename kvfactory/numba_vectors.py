"""Numbers of an entry as one value in compiled loops: what a processor does to all of them at once is one operation here.

The compiler makes vectors of plain loops too, but only of long ones, whose length it knows when it runs, and not of what is
inside of them. A vector has its size in its type, so that every loop over its numbers is gone before it runs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.extending import models, overload, register_model

intrinsic: Any = extending.intrinsic  # its type forgets that compiled functions leave the first argument out
FLOAT = ir.FloatType()
FREE = ("reassoc", "contract", "nsz", "arcp")
"""As `numba_loops.compiled`."""


@cache
def size(count: int) -> Any:
    """A number that compiled functions know by its type, and so before they run: an array of no records of so many bytes."""
    return np.empty(0, np.dtype([("bytes", np.uint8, (count,))]))


def count_of(kind: Any) -> int:
    """Of the type of what `size` gives, or of that itself in compiled functions."""
    return int(kind.dtype.size)


@overload(count_of, strict=False)
def _count_of(kind: Any) -> Any:
    count = count_of(kind)
    return lambda kind: count


class Vector(types.Type):
    """So many numbers, float32."""

    def __init__(self, count: int) -> None:
        super().__init__(name=f"Vector({count})")
        self.count = count


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(FLOAT, kind.count))


@intrinsic
def greater(typing_context: Any, left: Any, right: Any) -> Any:
    """Of each two numbers of vectors the greater one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return left(left, right), generate


@intrinsic
def total(typing_context: Any, value: Any) -> Any:
    """The sum of a vector's numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _reduced(builder, "fadd", ir.Constant(FLOAT, -0.0), arguments[0])

    return types.float32(value), generate


@intrinsic
def most(typing_context: Any, value: Any) -> Any:
    """The greatest of a vector's numbers, without those that are none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _reduced(builder, "fmax", arguments[0])

    return types.float32(value), generate


@intrinsic
def repeated(typing_context: Any, number: Any, count: Any) -> Any:
    """A vector of one number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        exact = context.cast(builder, arguments[0], signature.args[0], types.float32)
        one = builder.insert_element(ir.Constant(ir.VectorType(FLOAT, 1), ir.Undefined), exact, int32(0))
        return chosen(builder, one, [0] * count_of(count))

    return Vector(count_of(count))(number, count), generate


@intrinsic
def half_turned(typing_context: Any, value: Any) -> Any:
    """The two halves of a vector, (left, right), as (-right, left)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = arguments[0].type.count // 2
        left, right = (chosen(builder, arguments[0], range(start, start + half)) for start in (0, half))
        return joined(builder, [builder.fneg(right), left])

    return value(value), generate


def _between(operation: Callable[..., Any], name: str) -> None:
    """Let compiled functions do this to two vectors."""

    @intrinsic
    def apply(typing_context: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, name)(*arguments, flags=FREE)

        return left(left, right), generate

    @overload(operation, inline="always", strict=False)
    def typed(left: Any, right: Any) -> Any:
        if isinstance(left, Vector) and isinstance(right, Vector) and left.count == right.count:
            return lambda left, right: apply(left, right)
        return None


_between(operator.add, "fadd")
_between(operator.sub, "fsub")
_between(operator.mul, "fmul")


def _reduced(builder: Any, operation: str, *arguments: Any) -> Any:
    """One number for all of a vector, which is the last argument."""
    kinds = [each.type for each in arguments]
    name = f"llvm.vector.reduce.{operation}.v{kinds[-1].count}f32"
    reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOAT, kinds), name)
    return builder.call(reduce, arguments, fastmath=FREE)


def chosen(builder: Any, numbers: Any, places: Any) -> Any:
    """Those of a vector at some places."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), list(places))
    return builder.shuffle_vector(numbers, ir.Constant(numbers.type, ir.Undefined), mask)


def joined(builder: Any, parts: list[Any]) -> Any:
    """Vectors of one length, a power of two of them, behind each other."""
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        mask = ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(count)))
        parts = [builder.shuffle_vector(*pair, mask) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def all_of(like: Any, number: int) -> Any:
    """A vector of one integer, of the type of another's."""
    return ir.Constant(like.type, [number] * like.type.count)


def int32(number: int) -> Any:
    """A constant, such as a place in a vector."""
    return ir.Constant(ir.IntType(32), number)
