"""Numbers of an entry as one value in compiled loops: what a processor does to all of them at once is one operation here.

The compiler makes vectors of plain loops too, but only of long ones, whose length it knows when it runs, and not of what is
inside of them. A vector has its size in its type, so that every loop over its numbers is gone before it runs. Arrays are
indexed by entries, however many dimensions they have, and nobody looks whether an index is too large.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.extending import models, overload, register_model
from torch import Tensor

intrinsic: Any = extending.intrinsic  # its type forgets that compiled functions leave the first argument out
FLOAT = ir.FloatType()
FREE = ("reassoc", "contract", "nsz", "arcp")
"""As `numba_loops.compiled`."""
KINDS = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
    torch.uint8: torch.uint8,
}
"""What numbers of a tensor are in compiled functions, which know none of two bytes but integers."""


def numbers(x: Tensor) -> Any:
    """A tensor as an array without gaps, whose entries are taken by `vector` and `spread`."""
    return x.contiguous().view(KINDS[x.dtype]).numpy()


def entries_of(x: Tensor) -> tuple[Any, int, int]:
    """Numbers of x [heads, tokens, head_dim] from the first on, where they lie if they lie in entries.

    Then how many entries further the next head's is, and the next token's.
    """
    heads, tokens, dim = x.shape
    if x.stride(2) != 1 or x.stride(0) % dim or x.stride(1) % dim:
        x = x.contiguous()
    apart = x.stride(0) // dim, x.stride(1) // dim
    last = (heads - 1) * apart[0] + (tokens - 1) * apart[1]
    return numbers(x.as_strided(((last + 1) * dim,), (1,))), *apart


NUMBERS = {dtype: numbers(torch.empty(0, dtype=dtype)) for dtype in KINDS}
"""None at all, for loops that take entries by their addresses and are to know of what kind they are."""


@cache
def size(count: int) -> Any:
    """A number that compiled functions know by its type, and so before they run: an array of no records of so many bytes."""
    return np.empty(0, np.dtype([("bytes", np.uint8, (count,))]))


def count_of(kind: Any) -> int:
    """Of the type of what `size` gives."""
    return int(kind.dtype.size)


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
def vector(typing_context: Any, array: Any, index: Any, count: Any) -> Any:
    """Entry `index` of an array without gaps whose entries have `count` numbers: as `numbers` gives it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0].dtype
        found = load(context, builder, signature.args, arguments, count_of(count))
        return as_float(builder, found, kind)

    return Vector(count_of(count))(array, index, count), generate


@intrinsic
def vector_from(typing_context: Any, array: Any, start: Any, count: Any) -> Any:
    """`count` numbers of an array without gaps from one of them on, float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0].dtype
        one, many = (ir.VectorType(context.get_data_type(kind), each) for each in (1, count_of(count)))
        place = builder.bitcast(place_of(context, builder, signature.args, arguments, one), many.as_pointer())
        return as_float(builder, builder.load(place, align=kind.bitwidth // 8), kind)

    return Vector(count_of(count))(array, start, count), generate


@intrinsic
def greater(typing_context: Any, left: Any, right: Any) -> Any:
    """Of each two numbers of vectors the greater one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return left(left, right), generate


@intrinsic
def number(typing_context: Any, array: Any, index: Any) -> Any:
    """One number of an array without gaps, float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = load(context, builder, signature.args, arguments, 1)
        return builder.extract_element(as_float(builder, found, signature.args[0].dtype), _int32(0))

    return types.float32(array, index), generate


@intrinsic
def spread(typing_context: Any, array: Any, index: Any, count: Any, group: Any) -> Any:
    """Entry `index` of an array with a number for every `group` channels, of which there are `count`, for each of those."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        parts, dim = -(-count_of(count) // count_of(group)), count_of(count)
        found = load(context, builder, signature.args, arguments, parts)
        exact = as_float(builder, found, signature.args[0].dtype)
        return chosen(builder, exact, [channel // count_of(group) for channel in range(dim)])

    return Vector(count_of(count))(array, index, count, group), generate


@intrinsic
def put(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Write a vector as entry `index` of an array without gaps, of float32 or rounded to the numbers of two bytes there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0].dtype
        held = as_held(builder, arguments[2], kind)
        where = place_of(context, builder, signature.args, arguments, held.type)
        builder.store(held, where, align=kind.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, index, value), generate


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
        one = builder.insert_element(ir.Constant(ir.VectorType(FLOAT, 1), ir.Undefined), exact, _int32(0))
        return chosen(builder, one, [0] * count_of(count))

    return Vector(count_of(count))(number, count), generate


@intrinsic
def turned(typing_context: Any, value: Any, cos: Any, sin: Any, index: Any) -> Any:
    """A vector whose two halves, as pairs, are turned by angles, of which arrays have cosines and sines as entry `index`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole, index = arguments[0], arguments[3]
        half = whole.type.count // 2
        kinds = signature.args[1:]
        cosines, sines = (
            load(context, builder, (kinds[side], kinds[2]), (arguments[1 + side], index), half) for side in range(2)
        )
        left, right = (chosen(builder, whole, range(start, start + half)) for start in (0, half))

        def times(some: Any, others: Any) -> Any:
            return builder.fmul(some, others, flags=FREE)

        new_left = builder.fsub(times(left, cosines), times(right, sines), flags=FREE)
        new_right = builder.fadd(times(right, cosines), times(left, sines), flags=FREE)
        return joined(builder, [new_left, new_right])

    return value(value, cos, sin, index), generate


@intrinsic
def half_turned(typing_context: Any, value: Any) -> Any:
    """The two halves of a vector, (left, right), as (-right, left)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = arguments[0].type.count // 2
        left, right = (chosen(builder, arguments[0], range(start, start + half)) for start in (0, half))
        return joined(builder, [builder.fneg(right), left])

    return value(value), generate


@intrinsic
def rounded_as(typing_context: Any, value: Any, array: Any) -> Any:
    """A vector, float32, as it would be read from an array that it was put into."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[1].dtype
        return as_float(builder, as_held(builder, arguments[0], kind), kind)

    return value(value, array), generate


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


def place_of(context: Any, builder: Any, kinds: Any, arguments: Any, kind: Any) -> Any:
    """A pointer to an array's entry, one of a vector type; arguments of these kinds are the array and the index."""
    kind_of_array = kinds[0]
    assert kind_of_array.layout == "C", f"{kind_of_array} may have gaps"
    array = context.make_array(kind_of_array)(context, builder, arguments[0])
    index = context.cast(builder, arguments[1], kinds[1], types.intp)
    start = builder.mul(index, ir.Constant(index.type, kind.count))
    return builder.bitcast(builder.gep(array.data, [start]), kind.as_pointer())


def load(context: Any, builder: Any, kinds: Any, arguments: Any, count: int) -> Any:
    """An array's entry of `count` numbers as they are; arguments as those of `place_of`."""
    kind = kinds[0].dtype
    held = ir.VectorType(context.get_data_type(kind), count)
    return builder.load(place_of(context, builder, kinds, arguments, held), align=kind.bitwidth // 8)


def as_float(builder: Any, numbers: Any, kind: Any) -> Any:
    """Numbers of an array of this kind as float32."""
    exact = ir.VectorType(FLOAT, numbers.type.count)
    if kind == types.float32:
        return numbers
    if kind == types.int16:
        return builder.fpext(builder.bitcast(numbers, ir.VectorType(ir.HalfType(), numbers.type.count)), exact)
    wide = builder.zext(numbers, ir.VectorType(ir.IntType(32), numbers.type.count))
    if kind == types.uint16:  # bfloat16 is the upper half of a float32
        return builder.bitcast(builder.shl(wide, all_of(wide, 16)), exact)
    return builder.sitofp(wide, exact)


def as_held(builder: Any, numbers: Any, kind: Any) -> Any:
    """Numbers, float32, as an array of this kind holds them: the nearest there is, of two the even one."""
    if kind == types.float32:
        return numbers
    if kind == types.int16:
        half = builder.fptrunc(numbers, ir.VectorType(ir.HalfType(), numbers.type.count))
        return builder.bitcast(half, ir.VectorType(ir.IntType(16), numbers.type.count))
    bits = builder.bitcast(numbers, ir.VectorType(ir.IntType(32), numbers.type.count))
    is_odd = builder.and_(builder.lshr(bits, all_of(bits, 16)), all_of(bits, 1))
    up = builder.add(bits, builder.add(is_odd, all_of(bits, 0x7FFF)))
    none = builder.fcmp_unordered("uno", numbers, numbers)  # what is no number stays none
    upper = builder.lshr(builder.select(none, all_of(bits, 0x7FC00000), up), all_of(bits, 16))
    return builder.trunc(upper, ir.VectorType(ir.IntType(16), numbers.type.count))


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


def _int32(number: int) -> Any:
    return ir.Constant(ir.IntType(32), number)
