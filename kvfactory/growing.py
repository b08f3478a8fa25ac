"""Tensors that grow: what has room behind it is not copied to put something there."""

from __future__ import annotations

from copy import copy
from typing import Any, Self

from torch import Tensor


class Rows:
    """A tensor that grows along its first dimension."""

    def __init__(self, rows: Tensor) -> None:
        self._held, self._length = rows, len(rows)
        self._shared = False

    def append(self, rows: Tensor) -> None:
        needed = self._length + len(rows)
        if self._shared or needed > len(self._held):
            grown = self._held.new_empty(needed + room_for(needed), *self._held.shape[1:])
            grown[: self._length] = self.read()
            self._held, self._shared = grown, False
        self._held[self._length : needed] = rows
        self._length = needed

    def read(self) -> Tensor:
        return self._held[: self._length]

    @property
    def nbytes(self) -> int:
        return self._held.nbytes

    def fork(self) -> Self:
        self._shared = True
        return copy(self)


class Growing:
    """A tensor [heads, length, ...] that never changes, with room behind it for what follows.

    Whoever is first to put something behind it writes there; another, as after a fork, copies.
    """

    __slots__ = ("_array", "_used", "held", "length")

    def __init__(
        self, held: Tensor, length: int | None = None, used: list[int] | None = None, array: Any = None
    ) -> None:
        """The first entries of what is held, or all; `used` has how many there are of all who share it.

        So is the `array` of all of them, if somebody asked for it.
        """
        self.held = held
        self.length = held.shape[1] if length is None else length
        self._used = [self.length] if used is None else used
        self._array = array

    @property
    def array(self) -> Any:
        """What is held as compiled loops take it, looked at once for all who share it.

        Where there is room behind the entries nothing has gaps, and what is written to one is in the other.
        """
        if self._array is None:
            from .numba_entries import numbers  # late: nobody else waits for its import

            self._array = numbers(self.held)
        return self._array

    def joined(self, later: Tensor) -> Growing:
        """This and the entries of another tensor, of the same heads."""
        grown = self.extended(later.shape[1])
        grown.held.narrow(1, self.length, later.shape[1]).copy_(later)
        return grown

    def extended(self, tokens: int) -> Growing:
        """This and room for so many entries, which whoever asks writes at once."""
        held, length, used, array = self.held, self.length, self._used, self._array
        if used[0] != length or length + tokens > held.shape[1]:
            needed = length + tokens
            held = held.new_empty(held.shape[0], needed + needed // 32, *held.shape[2:])  # what it copies is small
            held.narrow(1, 0, length).copy_(self.read())
            used, array = [length], None
        used[0] = length + tokens
        return Growing(held, used[0], used, array)

    def first(self, count: int) -> Growing:
        """So many of its entries."""
        return Growing(self.held, count, self._used, self._array)

    def read(self) -> Tensor:
        """[heads, length, ...], without the room."""
        return self.held.narrow(1, 0, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes held, room included."""
        return self.held.nbytes


def room_for(length: int) -> int:
    """Entries to make room for when a full buffer has to grow: an eighth more, so appending stays cheap."""
    return max(16, length // 8)
