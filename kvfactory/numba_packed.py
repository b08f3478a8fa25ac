"""Levels in packed bytes as vectors, in compiled loops."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .compiled import WIDEST
from .numba_entries import as_float, load
from .numba_loops import FEATURES
from .numba_vectors import FLOAT, Vector, all_of, chosen, count_of, intrinsic, joined
from .packing import PLANES


@intrinsic
def levels(typing_context: Any, packed: Any, index: Any, count: Any, bits: Any) -> Any:
    """What `packing.pack` was given of entry `index` of packed bytes, whose levels have so many bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return as_float(builder, _unpacked(context, builder, signature, arguments), types.uint8)

    return Vector(count_of(count))(packed, index, count, bits), generate


@intrinsic
def looked_up(typing_context: Any, packed: Any, index: Any, count: Any, bits: Any, table: Any) -> Any:
    """The numbers that a table, float32, has for `levels`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = _unpacked(context, builder, signature, arguments)
        start = context.make_array(signature.args[4])(context, builder, arguments[4]).data
        at_once = "+avx512f" in FEATURES and 2 ** count_of(bits) <= WIDEST
        look_up = _permuted if at_once else _one_by_one
        return look_up(builder, found, start, 2 ** count_of(bits))

    return Vector(count_of(count))(packed, index, count, bits, table), generate


def _unpacked(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """A vector of bytes, of what the arguments of `levels` name."""
    dim, bits = (count_of(kind) for kind in signature.args[2:4])
    found = load(context, builder, signature.args, arguments, dim * bits // 8)
    planes, first, shift = [], 0, 0
    for width in PLANES[bits]:
        length = dim * width // 8
        some = chosen(builder, found, range(first, first + length))
        fields = [
            builder.and_(builder.lshr(some, all_of(some, place)), all_of(some, 2**width - 1))
            for place in range(0, 8, width)
        ]
        plane = joined(builder, fields)
        planes.append(builder.shl(plane, all_of(plane, shift)))
        first, shift = first + length, shift + width
    whole = planes[0]
    for plane in planes[1:]:
        whole = builder.or_(whole, plane)
    return whole


def _permuted(builder: Any, places: Any, table: Any, count: int) -> Any:
    """A table that fits a register, at all places of a vector of bytes."""
    numbers, integers = ir.VectorType(FLOAT, WIDEST), ir.VectorType(ir.IntType(32), WIDEST)
    few = builder.load(builder.bitcast(table, ir.VectorType(FLOAT, count).as_pointer()), align=4)
    whole = chosen(builder, few, [each % count for each in range(WIDEST)])
    kind = ir.FunctionType(numbers, [numbers, integers])
    permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
    parts = []
    for start in range(0, places.type.count, WIDEST):
        some = builder.zext(chosen(builder, places, range(start, start + WIDEST)), integers)
        parts.append(builder.call(permute, [whole, some]))
    return joined(builder, parts)


def _one_by_one(builder: Any, places: Any, table: Any, count: int) -> Any:
    """As `_permuted`, on any processor."""
    found = ir.Constant(ir.VectorType(FLOAT, places.type.count), ir.Undefined)
    for each in range(places.type.count):
        channel = ir.Constant(ir.IntType(32), each)
        place = builder.zext(builder.extract_element(places, channel), ir.IntType(64))
        found = builder.insert_element(found, builder.load(builder.gep(table, [place])), channel)
    return found
