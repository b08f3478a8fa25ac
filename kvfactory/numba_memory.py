"""Where numbers lie, for compiled loops: an address costs less to hand over than an array; memory is told what is next."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.core import cgutils

from .numba_entries import place_of
from .numba_loops import compiled
from .numba_vectors import count_of, intrinsic

LINE = 64
"""Bytes that memory sends at once."""
WORD = ir.IntType(32)


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """The address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


@compiled
def entries_at(address: Any, length: Any, dim: Any, number: Any) -> Any:
    """Entries [length, dim] at an address, of the same numbers as those of an array."""
    return carray(_pointer(address), (length, dim), number.dtype)


@intrinsic
def ask_for(typing_context: Any, array: Any, index: Any, count: Any) -> Any:
    """Have memory send entry `index` of an array without gaps ahead of its use; it may lie behind the array's end."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0].dtype
        held = ir.VectorType(context.get_data_type(kind), count_of(count))
        place = place_of(context, builder, signature.args, arguments, held)
        ask(builder, place, count_of(count) * kind.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, index, count), generate


def ask(builder: Any, place: Any, length: int) -> None:
    """Have memory send so many bytes from a place on."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, WORD, WORD, WORD])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    place = builder.bitcast(place, byte)
    for start in range(0, length, LINE):
        line = builder.gep(place, [ir.Constant(ir.IntType(64), start)])
        builder.call(fetch, [line, WORD(0), WORD(2), WORD(1)])  # to read, into the second cache, as data
