"""Products of levels as they are packed, small integers, on processors that multiply 64 bytes at once.

One side are levels, bytes without a sign. The other are numbers as multiples of a unit, whose digits to the base 256 are
bytes with a sign: two digits are as exact as 15 bits, three as 23. Four bytes of either side are multiplied and summed at
once, for `WIDEST` sums, so levels lie in rows of as many fours. Sums of integers are exact.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .compiled import WIDEST
from .numba_entries import as_float, place_of
from .numba_loops import FEATURES, compiled
from .numba_memory import ask
from .numba_vectors import FLOAT, FREE, Vector, chosen, count_of, intrinsic, joined
from .packing import PLANES

INTEGERS = {"+avx512vnni", "+avx512vbmi"} <= FEATURES
"""Whether the processor has what this takes."""
AHEAD = 128
"""Entries between the one that is read and the one that memory is asked for."""
FOUR = 4
"""Bytes that are multiplied by as many others into one sum."""
BASE = 256
BYTE, WORD = ir.IntType(8), ir.IntType(32)
WORDS = ir.VectorType(WORD, WIDEST)


def fits(channels: int, bits: int) -> bool:
    """Whether levels of so many bits, of entries with so many channels, can be put in rows."""
    words = [channels * width // 8 // FOUR for width in PLANES[bits]]
    return channels % (8 * FOUR) == 0 and all(count & (count - 1) == 0 for count in words)


@compiled
def greatest_multiple(digits: Any) -> Any:
    """Of the unit, that so many digits can say, and a little more for what is rounded."""
    return (BASE // 2 - 1) * BASE ** (digits - 1)


@intrinsic
def put_digits(typing_context: Any, array: Any, index: Any, value: Any, digits: Any) -> Any:
    """Write the digits of a vector's numbers, rounded, as entries of an array of int8 from `index` on, the lowest first.

    Entries have as many bytes as the vector has numbers, which are at most `greatest_multiple`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count, places = value.count, count_of(digits)
        whole, entry = ir.VectorType(WORD, count), ir.VectorType(BYTE, count)
        kind = ir.FunctionType(arguments[2].type, [arguments[2].type])
        nearest = cgutils.get_or_insert_function(builder.module, kind, f"llvm.nearbyint.v{count}f32")
        multiple = builder.fptosi(builder.call(nearest, [arguments[2]]), whole)
        # digits that are negative borrow from the next: half of the base is added to each but the last, and taken away again
        half = [BASE // 2 * (place + 1 < places) for place in range(places)]
        up = builder.add(
            multiple, ir.Constant(whole, [sum(BASE**place * more for place, more in enumerate(half))] * count)
        )
        bytes_ = builder.bitcast(up, ir.VectorType(BYTE, FOUR * count))
        kinds, index = (array, types.intp), context.cast(builder, arguments[1], signature.args[1], types.intp)
        for place, more in enumerate(half):
            held = builder.sub(
                chosen(builder, bytes_, range(place, FOUR * count, FOUR)), ir.Constant(entry, [more] * count)
            )
            at = builder.add(index, index.type(place))
            builder.store(held, place_of(context, builder, kinds, (arguments[0], at), entry), align=1)
        return context.get_dummy_value()

    return types.void(array, index, value, digits), generate


@intrinsic
def level_products(typing_context: Any, levels: Any, row: Any, digits: Any, index: Any, count: Any, places: Any) -> Any:
    """`WIDEST` sums over rows of levels, int32 [..., WIDEST], from `row` on, each times the next four digits of each place.

    Digits are entries of `count` bytes as `put_digits` writes them, from `index` on; so there are a quarter as many rows.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        fours = count_of(count) // FOUR
        kinds, total = signature.args, None
        rows = place_of(context, builder, kinds[:2], arguments[:2], WORDS)
        entry = ir.VectorType(BYTE, FOUR * fours)
        own = builder.bitcast(place_of(context, builder, kinds[2:4], arguments[2:4], entry), WORD.as_pointer())
        multiply = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(WORDS, [WORDS] * 3), "llvm.x86.avx512.vpdpbusd.512"
        )
        sums = [ir.Constant(WORDS, None)] * count_of(places)
        for each in range(fours):
            some = builder.load(builder.gep(rows, [WORD(each)]), align=FOUR)
            for place in range(len(sums)):
                four = builder.load(builder.gep(own, [WORD(place * fours + each)]), align=1)
                sums[place] = builder.call(multiply, [sums[place], some, _everywhere(builder, four)])
        for place, whole in enumerate(sums):
            exact = builder.sitofp(whole, ir.VectorType(FLOAT, WIDEST))
            worth = ir.Constant(exact.type, [float(BASE**place)] * WIDEST)
            scaled = builder.fmul(exact, worth, FREE)
            total = scaled if total is None else builder.fadd(total, scaled, FREE)
        return total

    return Vector(WIDEST)(levels, row, digits, index, count, places), generate


@intrinsic
def put_channels(typing_context: Any, levels: Any, row: Any, packed: Any, index: Any, channels: Any, bits: Any) -> Any:
    """Write the levels of `WIDEST` packed entries from `index` on into rows from `row` on.

    A row has four channels, and an entry in each lane.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, size = _start(context, builder, signature, arguments)
        ask(builder, builder.gep(start, [WORD(AHEAD * size)]), WIDEST * size)
        planes = []
        for first, width, shift in _planes(count_of(channels), count_of(bits)):
            length = count_of(channels) * width // 8
            held = _loaded(builder, start, [entry * size + first for entry in range(WIDEST)], length, size)
            planes.append((_turned(builder, held), width, shift))
        for four in range(count_of(channels) // FOUR):
            parts = [
                _fields(builder, words[four % len(words)], [four // len(words) * width] * WIDEST, width, shift)
                for words, width, shift in planes
            ]
            _put_row(context, builder, signature, arguments, four, parts)
        return context.get_dummy_value()

    return types.void(levels, row, packed, index, channels, bits), generate


@intrinsic
def put_entries(
    typing_context: Any, levels: Any, row: Any, packed: Any, index: Any, channels: Any, bits: Any, apart: Any
) -> Any:
    """Write the levels of four packed entries from `index` on into row `row`, the one `apart` rows further, and so on.

    A row has four entries, and one of `WIDEST` channels in each lane.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, size = _start(context, builder, signature, arguments)
        ask(builder, builder.gep(start, [WORD(AHEAD * size)]), FOUR * size)
        for part in range(0, count_of(channels), WIDEST):
            parts = []
            for first, width, shift in _planes(count_of(channels), count_of(bits)):
                length = count_of(channels) * width // 8
                read = min(length, WIDEST)
                begin = first + part % length
                held = _loaded(builder, start, [entry * size + begin for entry in range(FOUR)], read, size)
                lanes = [(part + lane) % length - part % length for lane in range(WIDEST)]
                bytes_ = builder.bitcast(held, ir.VectorType(BYTE, FOUR * read))
                fours = chosen(builder, bytes_, [entry * read + lane for lane in lanes for entry in range(FOUR)])
                amounts = [(part + lane) // length * width for lane in range(WIDEST)]
                parts.append(_fields(builder, builder.bitcast(fours, WORDS), amounts, width, shift))
            _put_row(context, builder, signature, arguments, part // WIDEST * count_of(apart), parts)
        return context.get_dummy_value()

    return types.void(levels, row, packed, index, channels, bits, apart), generate


@intrinsic
def put_apart(typing_context: Any, target: Any, array: Any, index: Any, count: Any, channels: Any, group: Any) -> Any:
    """Write numbers of `count` entries from `index` on, one for each `group` channels, into float32 [groups, count]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        parts, many = -(-count_of(channels) // count_of(group)), count_of(count)
        kinds, kind = signature.args[1:3], signature.args[1].dtype
        entry, whole = (ir.VectorType(context.get_data_type(kind), each) for each in (parts, parts * many))
        where = builder.bitcast(place_of(context, builder, kinds, arguments[1:3], entry), whole.as_pointer())
        held = builder.load(where, align=kind.bitwidth // 8)
        start = (arguments[0], ir.IntType(64)(0))
        row = place_of(context, builder, (signature.args[0], types.intp), start, ir.VectorType(FLOAT, many))
        for part in range(parts):
            own = as_float(builder, chosen(builder, held, range(part, parts * many, parts)), kind)
            builder.store(own, builder.gep(row, [WORD(part)]), align=FOUR)
        return context.get_dummy_value()

    return types.void(target, array, index, count, channels, group), generate


@intrinsic
def among_first(typing_context: Any, value: Any, count: Any) -> Any:
    """The first numbers of a vector, and 0 for those behind them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = ir.VectorType(WORD, value.count)
        limit = builder.trunc(context.cast(builder, arguments[1], signature.args[1], types.intp), WORD)
        limits = chosen(
            builder,
            builder.insert_element(ir.Constant(ir.VectorType(WORD, 1), ir.Undefined), limit, WORD(0)),
            [0] * value.count,
        )
        is_first = builder.icmp_signed("<", ir.Constant(whole, [*range(value.count)]), limits)
        return builder.select(is_first, arguments[0], ir.Constant(arguments[0].type, None))

    return value(value, count), generate


def _start(context: Any, builder: Any, signature: Any, arguments: Any) -> tuple[Any, int]:
    """Where the packed entries begin that the arguments of `put_channels` name, and how many bytes one has."""
    size = count_of(signature.args[4]) * count_of(signature.args[5]) // 8
    entry = ir.VectorType(BYTE, size)
    return builder.bitcast(
        place_of(context, builder, signature.args[2:4], arguments[2:4], entry), BYTE.as_pointer()
    ), size


def _planes(channels: int, bits: int) -> list[tuple[int, int, int]]:
    """First byte of an entry, width in bits, and least bit of each plane, as `packing.pack` has them."""
    found, first, shift = [], 0, 0
    for width in PLANES[bits]:
        found.append((first, width, shift))
        first, shift = first + channels * width // 8, shift + width
    return found


def _loaded(builder: Any, start: Any, firsts: list[int], length: int, size: int) -> Any:
    """As many bytes from each of some places on, behind each other, as a vector of integers."""
    words = length // FOUR
    if length == size:  # nothing lies between them
        firsts, words = firsts[:1], words * len(firsts)
    kind = ir.VectorType(WORD, words).as_pointer()
    places = (builder.bitcast(builder.gep(start, [WORD(first)]), kind) for first in firsts)
    return joined(builder, [builder.load(place, align=1) for place in places])


def _turned(builder: Any, held: Any) -> list[Any]:
    """Of the integers of `WIDEST` entries, one entry behind the other, a vector of the first of each, of the second, ..."""
    rows = [chosen(builder, held, range(start, start + WIDEST)) for start in range(0, held.type.count, WIDEST)]
    for _ in range((len(rows) - 1).bit_length()):
        pairs = [*zip(rows[::2], rows[1::2], strict=True)]
        rows = [
            builder.shuffle_vector(*pair, ir.Constant(WORDS, [*range(first, 2 * WIDEST, 2)]))
            for first in range(2)
            for pair in pairs
        ]
    return rows


def _fields(builder: Any, words: Any, amounts: list[int], width: int, shift: int) -> Any:
    """Fields of bytes, those that are so many bits up in each word, as the bits of levels from `shift` on."""
    mask = int.from_bytes(bytes([2**width - 1] * FOUR), "little")
    low = builder.and_(builder.lshr(words, ir.Constant(WORDS, amounts)), ir.Constant(WORDS, [mask] * WIDEST))
    return builder.shl(low, ir.Constant(WORDS, [shift] * WIDEST)) if shift else low


def _put_row(context: Any, builder: Any, signature: Any, arguments: Any, further: int, parts: list[Any]) -> None:
    """Write the levels of which these are some bits, so many rows behind the one that the arguments name."""
    whole = parts[0]
    for part in parts[1:]:
        whole = builder.or_(whole, part)
    first = place_of(context, builder, signature.args[:2], arguments[:2], WORDS)
    builder.store(whole, builder.gep(first, [WORD(further)]), align=FOUR)


def _everywhere(builder: Any, word: Any) -> Any:
    """One integer in all lanes."""
    one = builder.insert_element(ir.Constant(ir.VectorType(WORD, 1), ir.Undefined), word, WORD(0))
    return chosen(builder, one, [0] * WIDEST)
