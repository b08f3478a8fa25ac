"""Rows that attend together: entries of about one size lie in one tensor, so that one kernel call serves all rows.

Rows are put side by side in their first common step, which is when each would have copied its prompt's entries anyway. From
then on a step writes all rows' new entries at once. A row that leaves takes its view along, and its slot is
worked on for nothing until so many have left that the rest move to a stack of their own.

What company costs, such as room behind the shorter rows, is no row's: a store counts the bytes it would have alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .buffers import Stackable

if TYPE_CHECKING:
    from .kernels import Kernel


class Stack:
    """The entries of some rows, a slot each: as many heads in all of them, and the same room in each head."""

    keys: Tensor
    """[slots, heads, capacity, head_dim]; what is behind a head's entries is 0 or was one, because weights of 0 meet it."""
    values: Tensor

    def __init__(self, held: Sequence[Stackable]) -> None:
        self.slots = len(held)
        self.watched = held[0].watched
        self.capacity = max(each.reach for each in held)
        # of each head, on the host: nobody is to wait for a device
        self._lengths = torch.tensor([each.head_lengths() for each in held])
        shape = *self._lengths.shape, self.capacity
        self.keys, self.values = (like.new_zeros(*shape, like.shape[-1]) for like in (held[0].keys, held[0].values))
        for slot, each in enumerate(held):
            each.write_into(self.keys[slot], self.values[slot])
            each.lie_in(self, slot)
        self._starts = torch.arange(self._lengths.numel()).view_as(self._lengths) * self.capacity

    @property
    def is_full(self) -> bool:
        """Whether some head has no room for another entry."""
        return int(self._lengths.max()) == self.capacity

    def cut(self, slot: int, length: int) -> None:
        """The row in this slot has so many entries left in each head, the first ones."""
        self._lengths[slot] = length

    def step(
        self, kernel: Kernel, held: Sequence[Stackable], query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Append and attend for rows whose entries are `held`, in the order of their slots.

        Tensors [rows, heads, 1, head_dim]; returns one shaped like the query, and if asked for the weights
        [rows, stored heads, queries of each, length], float32.
        """
        slots = None if len(held) == self.slots else torch.tensor([each.slot for each in held])
        self._append(key, value, slots)
        for each in held:
            each.make_room(1)
            each.count(1)
        if slots is None:
            return self._attend(kernel, query)
        slots = slots.to(query.device)
        everyone = query.new_zeros(self.slots, *query.shape[1:])  # those who left ask for nothing
        output, weights = self._attend(kernel, everyone.index_copy_(0, slots, query))
        return output[slots], None if weights is None else weights[slots]

    def _append(self, key: Tensor, value: Tensor, slots: Tensor | None) -> None:
        """An entry for each head of these slots, or of all if None."""
        which = slice(None) if slots is None else slots
        ends = (self._starts + self._lengths)[which].flatten().to(key.device)
        for entries, new in ((self.keys, key), (self.values, value)):
            each_head = spread(new, entries.shape[1])
            entries.view(-1, entries.shape[-1]).index_copy_(0, ends, each_head.flatten(0, 2))
        self._lengths[which] += 1

    def _attend(self, kernel: Kernel, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attention of query [slots, query_heads, 1, head_dim], shaped like it, and weights as in `step`."""
        shortest, longest = map(int, self._lengths.aminmax())
        keys, values = self.keys[:, :, :longest], self.values[:, :, :longest]
        folded = query.reshape(self.slots, keys.shape[1], -1, query.shape[-1])  # a stored head's queries side by side
        own = None if shortest == longest else self._lengths.to(query.device)
        if not self.watched:
            return kernel.newest(folded, keys, values, own).reshape(query.shape), None
        output, weights = kernel.watched(folded, keys, values, own)
        return output.reshape(query.shape), weights


def stacked(held: Mapping[int, Stackable], kernel: Kernel) -> list[tuple[Stack, list[int]]]:
    """The stacks in which rows of a batch attend, old ones and new, and the rows of each in the order of their slots.

    A row that is better off alone is in none. `held` has the entries of all rows by row.
    """
    old: dict[Stack, dict[int, int]] = {}  # rows by slot
    free: dict[tuple[int, bool], list[int]] = {}  # by the number of heads, and whether weights are asked for
    for row, each in held.items():
        if each.stack is not None:
            old.setdefault(each.stack, {})[each.slot] = row
        else:
            free.setdefault((len(each.head_lengths()), each.watched), []).append(row)
    for stack, rows in [*old.items()]:
        if stack.is_full or 2 * len(rows) <= stack.slots:  # or most have left
            free.setdefault((stack.keys.shape[1], stack.watched), []).extend(rows.values())
            del old[stack]
    found = [(stack, [rows[slot] for slot in sorted(rows)]) for stack, rows in old.items()]
    for alike in free.values():
        groups = divided({row: held[row] for row in alike}, kernel)
        found += [(Stack([held[row] for row in group]), group) for group in groups]
    return found


def divided(held: Mapping[int, Stackable], kernel: Kernel) -> list[list[int]]:
    """Rows of equally many heads in groups that are worth a stack each, at the least cost of calls and of filling up.

    A kernel without masks gets rows of one length alone, as it would leave others to another kernel.
    """
    lengths = {row: each.head_lengths() for row, each in held.items()}
    rows = sorted(held, key=lambda row: max(lengths[row]), reverse=True)
    cost, ends = [0.0] * (len(rows) + 1), [0] * len(rows)  # of all rows from this one on, and where its group ends
    for first in reversed(range(len(rows))):
        longest = max(lengths[rows[first]])
        cost[first], ends[first] = held[rows[first]].calls * kernel.call + cost[first + 1], 0  # alone
        group = float(kernel.call)
        for end, row in enumerate(rows[first:], first + 1):
            group += sum(longest - length for length in lengths[row])
            if group >= cost[first] or (group > kernel.call and not kernel.masks):
                break
            if end > first + 1 and group + cost[end] < cost[first]:  # a row alone is to hold nothing but its own
                cost[first], ends[first] = group + cost[end], end
    groups, first = [], 0
    while first < len(rows):
        if ends[first]:
            groups.append(rows[first : ends[first]])
        first = ends[first] or first + 1
    return groups


def spread(new: Tensor, heads: int) -> Tensor:
    """[slots, kv_heads, ...] as [slots, heads, ...]: a KV head stands once for each query head that stores it."""
    return new if new.shape[1] == heads else new.repeat_interleave(heads // new.shape[1], 1)
