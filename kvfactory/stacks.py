"""Rows that attend together: entries of about one size lie in one tensor, so that one kernel call serves all rows.

Rows are put side by side in their first common step, which is when each would have copied its prompt's entries anyway. From
then on a step writes all rows' new entries at once. A row that leaves takes its view along, and its slot is
worked on for nothing until so many have left that the rest move to a stack of their own.

What company costs, such as room behind the shorter rows, is no row's: a store counts the bytes it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .buffers import Stackable, room_for

if TYPE_CHECKING:
    from .kernels import Kernel


class Stack:
    """The entries of some rows, a slot each: as many heads in all of them, and the same room in each head."""

    keys: Tensor
    """[slots, heads, capacity, head_dim]; what is behind a head's entries is 0, because weights of 0 meet it."""
    values: Tensor
    room: int
    """Steps that there is room for."""

    def __init__(self, held: Sequence[Stackable]) -> None:
        self.slots = len(held)
        lengths = [each.head_lengths() for each in held]
        longest = max(map(max, lengths))
        self.room = 1 + room_for(longest + 1)
        self.keys, self.values = (
            self._laid_out(sides, longest + self.room)
            for sides in ([each.segments(each.keys) for each in held], [each.segments(each.values) for each in held])
        )
        for slot, each in enumerate(held):
            each.lie_in(self, slot)
        _, heads, capacity, _ = self.keys.shape
        self._at = torch.arange(capacity, device=self.keys.device)
        self._starts = torch.arange(self.slots * heads, device=self.keys.device).view(-1, heads) * capacity
        self._ends = self._starts + torch.tensor(lengths, device=self.keys.device)  # where the next entries belong

    @staticmethod
    def _laid_out(rows: Sequence[Sequence[Tensor]], capacity: int) -> Tensor:
        made = rows[0][0].new_zeros(len(rows), len(rows[0]), capacity, rows[0][0].shape[-1])
        for slot, heads in zip(made, rows, strict=True):
            for lane, entries in zip(slot, heads, strict=True):
                lane[: len(entries)] = entries
        return made

    def step(self, kernel: Kernel, held: Sequence[Stackable], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append and attend for rows whose entries are `held`, in the order of their slots.

        Tensors [rows, heads, 1, head_dim]; returns one shaped like the query.
        """
        slots = None if len(held) == self.slots else index_of(tuple(each.slot for each in held), query.device)
        ends = self._ends if slots is None else self._ends[slots]
        for entries, new in ((self.keys, key), (self.values, value)):
            each_head = spread(new, ends.shape[1])
            entries.view(-1, entries.shape[-1]).index_copy_(0, ends.flatten(), each_head.flatten(0, 2))
        if slots is None:
            self._ends += 1
        else:
            self._ends[slots] = ends + 1
        self.room -= 1
        for each in held:
            each.make_room(1)
            each.count(1)
        if slots is None:
            return self._attend(kernel, held, query)
        everyone = query.new_zeros(self.slots, *query.shape[1:])  # those who left ask for nothing
        return self._attend(kernel, held, everyone.index_copy_(0, slots, query))[slots]

    def _attend(self, kernel: Kernel, held: Sequence[Stackable], query: Tensor) -> Tensor:
        """Attention of query [slots, query_heads, 1, head_dim], shaped like it; a mask where heads differ in length."""
        lengths = {length for each in held for length in each.head_lengths()}
        longest = max(lengths)
        keys, values = self.keys[:, :, :longest], self.values[:, :, :longest]
        own = None
        if len(lengths) > 1:
            own = (self._at[:longest] < (self._ends - self._starts)[..., None])[:, :, None]
        folded = query.reshape(self.slots, keys.shape[1], -1, query.shape[-1])  # a stored head's queries side by side
        return kernel.decode(folded, keys, values, own).reshape(query.shape)


def stack_of(held: Sequence[Stackable]) -> Stack:
    """The stack that these lie in, or a new one: if there is none, if most of its rows have left, or if it is full."""
    stack = held[0].company()
    if isinstance(stack, Stack) and 2 * len(held) > stack.slots:
        return stack
    return Stack(held)


@lru_cache(maxsize=4096)
def index_of(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """These as an int64 tensor; a batch asks for the same ones in each layer and step."""
    return torch.tensor(numbers, device=device)


def spread(new: Tensor, heads: int) -> Tensor:
    """[slots, kv_heads, ...] as [slots, heads, ...]: a KV head stands once for each query head that stores it."""
    return new if new.shape[1] == heads else new.repeat_interleave(heads // new.shape[1], 1)
