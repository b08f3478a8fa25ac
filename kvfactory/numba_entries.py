"""Entries of arrays for compiled loops: how their numbers are read as vectors and written, whatever they are held in.

Arrays are indexed by entries, however many dimensions they have, and nobody looks whether an index is too large.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba import types
from torch import Tensor

from .numba_vectors import FLOAT, FREE, Vector, all_of, chosen, count_of, int32, intrinsic, joined

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
        held = ir.VectorType(context.get_data_type(kind), count_of(count))
        place = place_from(context, builder, signature.args, arguments, held)
        return as_float(builder, builder.load(place, align=kind.bitwidth // 8), kind)

    return Vector(count_of(count))(array, start, count), generate


@intrinsic
def number(typing_context: Any, array: Any, index: Any) -> Any:
    """One number of an array without gaps, float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = load(context, builder, signature.args, arguments, 1)
        return builder.extract_element(as_float(builder, found, signature.args[0].dtype), int32(0))

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
def put_from(typing_context: Any, array: Any, start: Any, value: Any) -> Any:
    """Write a vector as numbers of an array, as `put` does, from one of them on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0].dtype
        held = as_held(builder, arguments[2], kind)
        builder.store(
            held, place_from(context, builder, signature.args, arguments, held.type), align=kind.bitwidth // 8
        )
        return context.get_dummy_value()

    return types.void(array, start, value), generate


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
def rounded_as(typing_context: Any, value: Any, array: Any) -> Any:
    """A vector, float32, as it would be read from an array that it was put into."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[1].dtype
        return as_float(builder, as_held(builder, arguments[0], kind), kind)

    return value(value, array), generate


def place_of(context: Any, builder: Any, kinds: Any, arguments: Any, kind: Any) -> Any:
    """A pointer to an array's entry, one of a vector type; arguments of these kinds are the array and the index."""
    kind_of_array = kinds[0]
    assert kind_of_array.layout == "C", f"{kind_of_array} may have gaps"
    array = context.make_array(kind_of_array)(context, builder, arguments[0])
    index = context.cast(builder, arguments[1], kinds[1], types.intp)
    start = builder.mul(index, ir.Constant(index.type, kind.count))
    return builder.bitcast(builder.gep(array.data, [start]), kind.as_pointer())


def place_from(context: Any, builder: Any, kinds: Any, arguments: Any, kind: Any) -> Any:
    """A pointer to as many numbers as a vector type has from one of an array on; arguments as those of `place_of`."""
    one = ir.VectorType(kind.element, 1)
    return builder.bitcast(place_of(context, builder, kinds, arguments, one), kind.as_pointer())


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
