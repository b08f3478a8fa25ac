"""How a store holds its entries: as they are, or in fewer bytes. What is kept is the store's business."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor

from .compiled import has_numba
from .growing import room_for
from .indexing import entries

if TYPE_CHECKING:
    from .stacks import Stack

Positions = Callable[[], Tensor]
"""Gives the true positions of a store's entries, [heads or 1, length], ascending."""


class Buffer(ABC):
    """Keys and values of one store, equally many in every head; oldest first."""

    length: int
    """Entries held, in each head."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add entries [heads, tokens, head_dim]."""

    @abstractmethod
    def read(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """Keys and values [heads, length, head_dim], in the model's dtype; what was just appended is as it came."""

    def attend(self, query: Tensor, positions: Positions) -> Tensor | None:
        """Attention of query [heads, queries, head_dim] over all entries; None: what `read` gives is to be attended to."""
        return None

    @abstractmethod
    def keep(self, index: Tensor) -> None:
        """Let go of all entries but index [heads, count], which is ascending in each head."""

    @abstractmethod
    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold these entries [heads, count, head_dim], which are new tensors, in place of all there are."""

    def settle(self, positions: Positions) -> None:
        """A step's attention is done: the place to hold what grew old in fewer bytes."""

    def nbytes(self) -> int:
        """Bytes of every tensor held, room to grow included."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    @abstractmethod
    def fork(self) -> Self:
        """A second buffer that starts from here; writing to one leaves the other alone."""


class MakeBuffer(Protocol):
    """Makes a buffer of keys and values [heads, length, head_dim]: of all heads, or of one of so many."""

    def __call__(self, keys: Tensor, values: Tensor, head: int | None = None, heads: int = 1) -> Buffer: ...


class Stackable(ABC):
    """Entries as they are, with room behind them, which may lie in one tensor with those of other rows (`stacks`).

    Its own room is what it would have by itself, whatever there is in a stack: what company costs is no row's. A write by
    itself takes a row out of its stack: it copies what it has, as it does wherever tensors are shared.
    """

    keys: Tensor
    values: Tensor
    shared: bool = True
    """What is behind its entries may be somebody else's too: copy before the first write."""
    stack: Stack | None = None
    slot: int = 0
    """Which row of the stack this is."""
    calls: int = 1
    """How many kernel calls these entries take by themselves."""
    watched: bool = False
    """Whether somebody asks for the weights of its attention."""

    @abstractmethod
    def head_lengths(self) -> list[int]:
        """Entries of each head."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """The most of them."""

    @property
    def reach(self) -> int:
        """Entries of a head that a new tensor is to have room for."""
        return self.longest + 1 + room_for(self.longest + 1)

    @abstractmethod
    def write_into(self, keys: Tensor, values: Tensor) -> None:
        """Write its entries to the front of tensors that have room for more, [heads, capacity, head_dim]."""

    @abstractmethod
    def make_room(self, tokens: int) -> bool:
        """See that its own room is enough for more entries of each head; whether that is new, in tensors to be made."""

    @abstractmethod
    def count(self, tokens: int) -> None:
        """There are more entries in each head."""

    def lie_in(self, stack: Stack, slot: int) -> None:
        """Hold a row of a stack's tensors, which has these entries in it."""
        self.stack, self.slot = stack, slot
        self.keys, self.values = stack.keys[slot], stack.values[slot]

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Hold tensors that are nobody else's."""
        self.keys, self.values, self.shared, self.stack = keys, values, False, None

    def fork(self) -> Self:
        """See `Buffer.fork`. The stack goes on with this one, whose further entries are behind those of the other."""
        self.shared = True
        twin = copy(self)
        twin.stack = None
        return twin


class PlainBuffer(Stackable, Buffer):
    """All heads have equally many entries."""

    def __init__(self, keys: Tensor, values: Tensor, limit: int | None = None) -> None:
        """Keys and values [heads, length, head_dim]; no room is made beyond the `limit`, if there is one."""
        self.keys, self.values = keys, values
        self.length = self.capacity = keys.shape[1]
        self.limit = limit

    def head_lengths(self) -> list[int]:
        return [self.length] * len(self.keys)

    @property
    def longest(self) -> int:
        return self.length

    @property
    def reach(self) -> int:
        return super().reach if self.limit is None else max(self.length + 1, self.limit)

    def write_into(self, keys: Tensor, values: Tensor) -> None:
        keys[:, : self.length] = self.keys[:, : self.length]
        values[:, : self.length] = self.values[:, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> None:
        start, tokens = self.length, keys.shape[1]
        if self.make_room(tokens) or self.stack is not None:
            self.hold(self._with_room(self.keys), self._with_room(self.values))
        self.keys.narrow(1, start, tokens).copy_(keys)
        self.values.narrow(1, start, tokens).copy_(values)
        self.count(tokens)

    def make_room(self, tokens: int) -> bool:
        needed = self.length + tokens
        if not self.shared and needed <= self.capacity:
            return False
        self.capacity = needed + room_for(needed) if self.limit is None else max(needed, self.limit)
        self.shared = False
        return True

    def count(self, tokens: int) -> None:
        self.length += tokens

    def _with_room(self, old: Tensor) -> Tensor:
        new = old.new_empty(old.shape[0], self.capacity, old.shape[2])
        new[:, : self.length] = old[:, : self.length]
        return new

    def read(self, positions: Positions) -> tuple[Tensor, Tensor]:
        return self.keys.narrow(1, 0, self.length), self.values.narrow(1, 0, self.length)

    def keep(self, index: Tensor) -> None:
        if not self._stays(index.shape[1]) or not has_numba(index.device):
            self.replace(entries(self.keys, index), entries(self.values, index))
            return
        from .numba_keeping import move_to_front  # late: nobody else waits for its import

        move_to_front(self.keys, self.values, index)
        self._cut(index.shape[1])

    def replace(self, keys: Tensor, values: Tensor) -> None:
        length = keys.shape[1]
        if self._stays(length):
            self.keys[:, :length] = keys
            self.values[:, :length] = values
            self._cut(length)
        else:
            self.hold(keys, values)
            self.length = self.capacity = length

    def _stays(self, length: int) -> bool:
        """Whether so many entries are to lie where others lay: in tensors of its own that have the room they should."""
        return not self.shared and self.capacity == self.limit and length <= self.limit

    def _cut(self, length: int) -> None:
        """Only the first entries are left."""
        self.length = length
        if self.stack is not None:
            self.stack.cut(self.slot, length)

    def fork(self) -> Self:
        twin = super().fork()
        if self.stack is not None and self.limit is not None:  # one that evicts in place leaves the twin its own
            twin.keys, twin.values = (each[:, : self.length].clone() for each in (self.keys, self.values))
        return twin

    def nbytes(self) -> int:
        return _nbytes(self, len(self.keys) * self.capacity)


class SegmentBuffer(Stackable):
    """Each head has its own number of entries: a segment of a flat tensor a head, all with the same room behind them."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """One [length, head_dim] tensor a head."""
        self.lengths = [len(each) for each in keys]
        self.calls = len(keys)
        self.room = 0
        self.keys, self.values = torch.cat(list(keys)), torch.cat(list(values))
        self.starts = self._starts_with(0)
        """Where each head's segment begins in the flat tensor."""

    def head_lengths(self) -> list[int]:
        return self.lengths

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def segments(self, side: Tensor) -> list[Tensor]:
        """Of its keys or its values, the entries of each head, [length, head_dim], without the room behind them."""
        return [side.narrow(0, start, length) for start, length in zip(self.starts, self.lengths, strict=True)]

    def write_into(self, keys: Tensor, values: Tensor) -> None:
        for into, side in ((keys, self.keys), (values, self.values)):
            for lane, segment in zip(into, self.segments(side), strict=True):
                lane[: len(segment)] = segment

    def lie_in(self, stack: Stack, slot: int) -> None:
        super().lie_in(stack, slot)
        heads, capacity, _ = self.keys.shape
        self.keys, self.values = self.keys.flatten(0, 1), self.values.flatten(0, 1)
        self.starts = list(range(0, heads * capacity, capacity))

    def _starts_with(self, room: int) -> list[int]:
        """Where segments begin that have so much room behind them."""
        return list(accumulate((length + room for length in self.lengths[:-1]), initial=0))

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add entries [heads, tokens, head_dim]."""
        tokens = keys.shape[1]
        if self.make_room(tokens) or self.stack is not None:
            self.hold(self._with_room(self.keys), self._with_room(self.values))
            self.starts = self._starts_with(self.room)
        ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
        slots = torch.tensor([slot for end in ends for slot in range(end, end + tokens)], device=self.keys.device)
        self.keys.index_copy_(0, slots, keys.flatten(0, 1))
        self.values.index_copy_(0, slots, values.flatten(0, 1))
        self.count(tokens)

    def make_room(self, tokens: int) -> bool:
        if not self.shared and tokens <= self.room:
            return False
        self.room = tokens + room_for(sum(self.lengths) // len(self.lengths))
        self.shared = False
        return True

    def count(self, tokens: int) -> None:
        self.lengths = [length + tokens for length in self.lengths]
        self.room -= tokens

    def _with_room(self, side: Tensor) -> Tensor:
        free = side.new_empty(self.room, side.shape[1])
        return torch.cat([part for segment in self.segments(side) for part in (segment, free)])

    def nbytes(self) -> int:
        """Bytes of both, room to grow included."""
        return _nbytes(self, sum(self.lengths) + len(self.lengths) * self.room)


def _nbytes(held: Stackable, entries: int) -> int:
    """Bytes of so many keys and values, room included: those of its tensors, where it does not lie in a stack."""
    return entries * sum(each.shape[-1] * each.element_size() for each in (held.keys, held.values))
