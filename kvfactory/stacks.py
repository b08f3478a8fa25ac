"""Rows that attend together: entries of about one size lie in one tensor, so that one kernel call serves all rows.

Rows are put side by side in their first common step, which is when each would have copied its prompt's entries anyway. From
then on a step writes all rows' new entries at once. A row that leaves takes its view along, and its slot is
left alone until so many have left that the rest move to a stack of their own.

What company costs, such as room behind the shorter rows, is no row's: a store counts the bytes it would have alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .buffers import Stackable

if TYPE_CHECKING:
    from .cache import LayerBatch
    from .kernels import Kernel


class Stack:
    """The entries of some rows, a slot each: as many heads in all of them, and the same room in each head."""

    keys: Tensor
    """[slots, heads, capacity, head_dim]; what is behind a head's entries is 0 or was one, because weights of 0 meet it."""
    values: Tensor
    lengths: Any
    """Array [slots, heads], int64: on the host, as nobody is to wait for a device."""

    def __init__(self, held: Sequence[Stackable]) -> None:
        self.slots = len(held)
        self.watched = held[0].watched
        self.capacity = max(each.reach for each in held)
        self.lengths = np.array([each.head_lengths() for each in held])
        self._at_most = int(self.lengths.max())
        shape = *self.lengths.shape, self.capacity
        self.keys, self.values = (like.new_zeros(*shape, like.shape[-1]) for like in (held[0].keys, held[0].values))
        for slot, each in enumerate(held):
            each.write_into(self.keys[slot], self.values[slot])
            each.lie_in(self, slot)

    @property
    def is_full(self) -> bool:
        """Whether some head has no room for another entry."""
        if self._at_most == self.capacity:  # unless rows were cut
            self._at_most = int(self.lengths.max())
        return self._at_most == self.capacity

    def cut(self, slot: int, length: int) -> None:
        """The row in this slot has so many entries left in each head, the first ones."""
        self.lengths[slot] = length

    def step(self, kernel: Kernel, held: Mapping[int, Stackable], layer: LayerBatch, output: Tensor) -> Tensor | None:
        """Append and attend for rows of a layer, of which `held` has the entries by row: writes their output.

        Returns if asked for the weights [rows of `held`, stored heads, queries of each, length], float32.
        """
        rows, slots = np.array([*held]), np.array([each.slot for each in held.values()])
        weights = kernel.step_together(layer.query, layer.key, layer.value, rows, self, slots, output)
        self._at_most += 1
        for each in held.values():
            each.make_room(1)
            each.count(1)
        return weights


def stacked(held: Mapping[int, Stackable], kernel: Kernel) -> list[tuple[Stack, dict[int, Stackable]]]:
    """The stacks in which rows of a batch attend, old ones and new, and the entries of each one's rows.

    A row that is better off alone is in one of its own if that takes no more than `Kernel.room_alone`, or in none. `held`
    has the entries of all rows by row.
    """
    old: dict[Stack, dict[int, Stackable]] = {}
    free: dict[tuple[int, bool], dict[int, Stackable]] = {}  # by the number of heads, and whether weights are asked for
    for row, each in held.items():
        if each.stack is not None:
            old.setdefault(each.stack, {})[row] = each
        else:
            free.setdefault((len(each.head_lengths()), each.watched), {})[row] = each
    for stack, rows in [*old.items()]:
        may_have_company = stack.slots == 1 and len(held) > 1
        most_have_left = 2 * len(rows) <= stack.slots
        if may_have_company or most_have_left or stack.is_full:
            free.setdefault((stack.keys.shape[1], stack.watched), {}).update(rows)
            del old[stack]
    found = [*old.items()]
    for alike in free.values():
        groups = divided(alike, kernel)
        together = {row for group in groups for row in group}
        groups += [[row] for row in alike if row not in together and filling(held[row]) <= kernel.room_alone]
        for group in groups:
            rows = {row: held[row] for row in group}
            found.append((_stack_of([*rows.values()]), rows))
    return found


def filling(held: Stackable) -> int:
    """Entries of room behind the shorter heads of a row in a stack of its own."""
    lengths = held.head_lengths()
    return len(lengths) * max(lengths) - sum(lengths)


def _stack_of(held: list[Stackable]) -> Stack:
    """A new stack, or that of a row by itself if it is in one."""
    stack = held[0].stack
    if len(held) == 1 and stack is not None and stack.slots == 1 and not stack.is_full:
        return stack
    return Stack(held)


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
