"""Rows that attend together: entries that agree in shape lie in one tensor, so that one kernel call serves all rows.

Rows are put side by side in their first common step, which is when each would have copied its prompt's entries anyway. From
then on a step writes all rows' new entries at once. A row that leaves takes its view along, and its slot is
worked on for nothing until so many have left that the rest move to a stack of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from .buffers import PlainBuffer, SegmentBuffer, Stackable, room_for

if TYPE_CHECKING:
    from .kernels import Kernel

S = TypeVar("S", bound=Stackable)


class Stack(ABC, Generic[S]):
    """The entries of some rows, a slot each. All have one shape, and keep to it step by step."""

    keys: Tensor
    """[slots, ...]: a row's buffer has one slot."""
    values: Tensor
    room: int
    """Steps that there is room for."""
    shape: Hashable
    """What the rows agree in; one that was left out of a step does not any more."""

    def __init__(self, held: Sequence[S]) -> None:
        self.slots = len(held)
        self._lay_out(held)
        self.shape = held[0].shape()
        self._places: tuple[list[int], list[int]] | None = None
        self._row_of_slot = self._rows = self._slots = torch.empty(0)

    def step(
        self, kernel: Kernel, held: Sequence[S], rows: list[int], query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Append and attend for those rows of a batch [rows, heads, 1, head_dim] whose entries are `held`.

        Returns the rows, int64, and their output.
        """
        self._place(rows, [each.slot for each in held], query.device)
        self._write(held, *(each.squeeze(2).index_select(0, self._row_of_slot) for each in (key, value)))
        self.shape = held[0].shape()
        output = self._attend(kernel, query.index_select(0, self._row_of_slot))
        return self._rows, output if len(held) == self.slots else output.index_select(0, self._slots)

    def _place(self, rows: list[int], slots: list[int], device: torch.device) -> None:
        """Note which row each slot is of; what a row that left has still here follows another and is for nothing."""
        if self._places == (rows, slots):
            return
        self._places = rows, slots
        row_of_slot = [rows[0]] * self.slots
        for row, slot in zip(rows, slots, strict=True):
            row_of_slot[slot] = row
        in_slots = row_of_slot if len(rows) == self.slots else rows
        self._row_of_slot, self._rows, self._slots = (
            torch.tensor(each, device=device) for each in (row_of_slot, in_slots, slots)
        )

    @abstractmethod
    def _lay_out(self, held: Sequence[S]) -> None:
        """Copy entries into tensors with room behind them, and have each buffer lie in its slot."""

    @abstractmethod
    def _write(self, held: Sequence[S], keys: Tensor, values: Tensor) -> None:
        """Write an entry [slots, kv_heads, head_dim] behind those of each head and slot, and have `held` count it."""

    @abstractmethod
    def _attend(self, kernel: Kernel, query: Tensor) -> Tensor:
        """Attention of query [slots, query_heads, 1, head_dim], shaped like it."""


class DenseStack(Stack[PlainBuffer]):
    """Slots [heads, capacity, head_dim]."""

    def _lay_out(self, held: Sequence[PlainBuffer]) -> None:
        self._length = length = held[0].length
        self.room = 1 + room_for(length + 1)
        heads, _, dim = held[0].keys.shape

        def joined(rows: list[Tensor]) -> Tensor:
            made = rows[0].new_empty(len(rows), heads, length + self.room, dim)
            for slot, row in zip(made, rows, strict=True):
                slot[:, :length] = row[:, :length]
            return made

        self.keys, self.values = joined([each.keys for each in held]), joined([each.values for each in held])
        for slot, each in enumerate(held):
            each.lie_in(self, slot)

    def _write(self, held: Sequence[PlainBuffer], keys: Tensor, values: Tensor) -> None:
        heads = self.keys.shape[1]
        self.keys[:, :, self._length] = spread(keys, heads)
        self.values[:, :, self._length] = spread(values, heads)
        self._length += 1
        self.room -= 1
        for each in held:
            each.length += 1

    def _attend(self, kernel: Kernel, query: Tensor) -> Tensor:
        keys, values = (each[:, :, : self._length].flatten(0, 1) for each in (self.keys, self.values))
        folded = query.reshape(len(keys), -1, query.shape[-1])  # the queries of a stored head side by side
        return kernel.decode(folded, keys, values, None).view_as(query)


class RaggedStack(Stack[SegmentBuffer]):
    """Slots [capacity, head_dim]: all heads of a row attend to all of its entries, and a mask leaves them their own."""

    def _lay_out(self, held: Sequence[SegmentBuffer]) -> None:
        self.room = room = 1 + room_for(held[0].mean_length())
        self.keys = torch.stack([each.laid_out(each.keys, room) for each in held])
        self.values = torch.stack([each.laid_out(each.values, room) for each in held])
        for slot, each in enumerate(held):
            each.room = room
            each.lie_in(self, slot)
        device, capacity = self.keys.device, self.keys.shape[1]
        self._starts = torch.tensor([each.starts() for each in held], device=device)
        self._ends = self._starts + torch.tensor([each.lengths for each in held], device=device)
        self._first_of_slot = capacity * torch.arange(len(held), device=device)[:, None]
        self._at = torch.arange(capacity, device=device)

    def _write(self, held: Sequence[SegmentBuffer], keys: Tensor, values: Tensor) -> None:
        heads, where = self._ends.shape[1], (self._ends + self._first_of_slot).flatten()
        self.keys.view(-1, self.keys.shape[-1]).index_copy_(0, where, spread(keys, heads).flatten(0, 1))
        self.values.view(-1, self.values.shape[-1]).index_copy_(0, where, spread(values, heads).flatten(0, 1))
        self._ends += 1
        self.room -= 1
        for each in held:
            each.advance(1)

    def _attend(self, kernel: Kernel, query: Tensor) -> Tensor:
        slots, query_heads, _, dim = query.shape
        own = (self._at >= self._starts[..., None]) & (self._at < self._ends[..., None])
        allowed = own.repeat_interleave(query_heads // own.shape[1], 1)
        return kernel.decode(query.view(slots, query_heads, dim), self.keys, self.values, allowed).view_as(query)


KINDS: dict[type[Stackable], type[Stack[Any]]] = {PlainBuffer: DenseStack, SegmentBuffer: RaggedStack}


def stack_of(held: Sequence[Stackable]) -> Stack[Any]:
    """The stack that these lie in, or a new one: if there is none, if most of its rows have left, or if it is full."""
    stack = held[0].stack
    together = stack is not None and stack.shape == held[0].shape() and all(each.stack is stack for each in held)
    if stack is None or not together or not stack.room or 2 * len(held) <= stack.slots:
        return KINDS[type(held[0])](held)
    return stack


def spread(new: Tensor, heads: int) -> Tensor:
    """[slots, kv_heads, ...] as [slots, heads, ...]: a KV head stands once for each query head that stores it."""
    return new if new.shape[1] == heads else new.repeat_interleave(heads // new.shape[1], 1)
