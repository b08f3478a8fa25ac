"""What one layer of one sequence keeps, and everything that happens to it while decoding.

A store never sees a batch, padding or a model: tensors are [heads, tokens, head_dim], and a stored head is a KV head or,
under `query_head` granularity, a query head. Entries stay in ascending position order unless a subclass says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import copy
from functools import cache
from typing import NamedTuple, Self

import torch
from torch import Tensor

from .buffers import Buffer, MakeBuffer, PlainBuffer, Stackable
from .errors import UserError


class Reading(NamedTuple):
    """What a query may attend to: tensors with equal lengths for all heads, or lists with one entry a head."""

    keys: Tensor | list[Tensor]
    """[heads, length, head_dim], or a list of [length, head_dim]."""
    values: Tensor | list[Tensor]
    positions: Callable[[], Tensor | list[Tensor]]
    """Gives the true positions of the entries, [heads or 1, length], or a list of [length]; asked only for a mask."""

    def pieces(self, query: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values that attend in one go: all heads at once, or head by head where they are ragged."""
        if isinstance(self.keys, Tensor):
            assert isinstance(self.values, Tensor)
            return [(query, self.keys, self.values)]
        queries = query.split(len(query) // len(self.keys))
        return [
            (part, keys.unsqueeze(0), values.unsqueeze(0))
            for part, keys, values in zip(queries, self.keys, self.values, strict=True)
        ]

    def positions_by_piece(self) -> list[Tensor]:
        """One [heads or 1, length] tensor for each of `pieces`."""
        positions = self.positions()
        return [positions] if isinstance(positions, Tensor) else [each.unsqueeze(0) for each in positions]


class Store(ABC):
    """What one layer of one sequence keeps; the place of all state that outlives a call."""

    observes: bool = False
    """True: `observe` is given the attention weights of every step."""
    acts: bool = False
    """True: `read` and `observe` are called of every step in company too, where they are not otherwise (`stackable`)."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        """Add tokens [kv_heads, tokens, head_dim], rotated, whose first has this true position."""

    @abstractmethod
    def read(self, query: Tensor) -> Reading:
        """The entries that query [query_heads, tokens, head_dim] may attend to; the tokens just appended come last."""

    def stackable(self, position: int) -> Stackable | None:
        """Its entries, for rows that append and attend together; the next is about to have this true position.

        None, the usual answer, where `append` or `read` do more than hold and show all there is, or `observe` does
        anything and the store does not say that it `acts`.
        """
        return None

    def attend(self, query: Tensor) -> Tensor | None:
        """The attention of one new token, [query_heads, 1, head_dim], over what `read` would give; None: by `read`.

        For stores whose entries are better multiplied as they are held than written out.
        """
        return None

    def observe(self, weights: Tensor | list[Tensor] | None) -> None:
        """The step's attention is done: the place to evict.

        Weights are [query_heads, tokens, length] over what `read` just gave, float32, one tensor a head where that was a
        list; None unless `observes`.
        """

    @abstractmethod
    def positions(self) -> list[Tensor]:
        """True positions of the kept entries, one ascending 1-D int64 tensor a stored head."""

    @abstractmethod
    def keys(self) -> list[Tensor]:
        """The kept keys, one [length, head_dim] tensor a stored head, in the order of `positions`."""

    @abstractmethod
    def values(self) -> list[Tensor]:
        """The kept values, as `keys`."""

    @abstractmethod
    def lengths(self) -> list[int]:
        """Entries kept, one number a stored head."""

    def read_lengths(self) -> list[int]:
        """Entries that the latest step's query read, one number a list that `read` gave, or a stored head."""
        return self.lengths()

    def holders(self) -> Iterator[Store]:
        """The stores that hold its entries: itself, or those that it is made of."""
        yield self

    def nbytes(self) -> int:
        """Bytes of every tensor held, room to grow and bookkeeping included."""
        return sum(x.numel() * x.element_size() for x in vars(self).values() if isinstance(x, Tensor))

    @abstractmethod
    def fork(self) -> Self:
        """A second store that starts from here; appending to one leaves the other alone."""

    def pack(self, make: MakeBuffer) -> Store:
        """This store with its entries in buffers that `make` makes of them, or one that holds the same.

        Raises `UserError` for a store that does not hold its entries in buffers.
        """
        raise UserError(
            f"{type(self).__name__} holds entries in a way of its own and takes no --quant_method or --key_pruning; "
            "leave it out"
        )


def spread(kv: Tensor, heads: int) -> Tensor:
    """[kv_heads, ...] as [heads, ...]: a KV head stands once for each query head that stores it."""
    return kv if kv.shape[0] == heads else kv.repeat_interleave(heads // kv.shape[0], 0)


def consecutive(first: int, count: int, device: torch.device) -> Tensor:
    """[count] positions, int64, from `first` on; they are shared, and not to be written to."""
    return _up_to(1 << max(first + count - 1, 1023).bit_length(), device)[first : first + count]


@cache
def _up_to(end: int, device: torch.device) -> Tensor:
    """Positions that every layer of every step asks for several times."""
    return torch.arange(end, device=device)


def whole(store: Store) -> tuple[Tensor, Tensor]:
    """All keys and values of a store that reads everything and whose heads hold equally many, without a copy.

    [heads, length, head_dim] each.
    """
    nothing = torch.empty(0)  # whatever the query
    _, keys, values = store.read(nothing).pieces(nothing)[0]
    return keys, values


@cache
def _has_own_ways(kind: type[DenseStore], acts: bool) -> bool:
    """Whether a class of stores appends or reads in a way that what it inherits as `stackable` knows nothing of."""

    def depth(name: str) -> int:
        return next(depth for depth, each in enumerate(kind.__mro__) if name in vars(each))

    ways = ["append", "read", "attend"] if acts else ["append", "read", "attend", "observe"]
    return min(map(depth, ways)) < depth("stackable")


class DenseStore(Store):
    """The same number of entries in every head."""

    def __init__(
        self, keys: Tensor, values: Tensor, positions: Tensor | None = None, *, limit: int | None = None
    ) -> None:
        """Keys and values [heads, length, head_dim]; positions [heads or 1, length], int32, ascending.

        Without positions the entries are all tokens from the first on, and nothing is spent on saying so. A store that
        evicts gives the `limit` of entries it holds between evictions: no room is made beyond it.
        """
        self._buffer: Buffer = PlainBuffer(keys, values, limit)
        self._heads = keys.shape[0]
        # entries beyond the listed positions follow each other from `_run_start` on
        self._listed = keys.new_empty(1, 0, dtype=torch.int32) if positions is None else positions
        self._run_start = 0

    @property
    def _length(self) -> int:
        return self._buffer.length

    def pack(self, make: MakeBuffer) -> Store:
        self._buffer = make(*self._entries())
        self._buffer.settle(self._all_positions)
        return self

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        self._run_on(position)
        self._buffer.append(spread(keys, self._heads), spread(values, self._heads))

    def stackable(self, position: int) -> Stackable | None:
        buffer = self._buffer
        if not isinstance(buffer, PlainBuffer) or _has_own_ways(type(self), self.acts):
            return None
        if buffer.stack is None or self.acts:  # otherwise there was a step before, and no eviction since
            self._run_on(position)
            buffer.watched = self.observes
        return buffer

    def attend(self, query: Tensor) -> Tensor | None:
        if type(self).read is not DenseStore.read:
            return None
        attended = self._buffer.attend(query.view(self._heads, -1, query.shape[-1]), self._all_positions)
        return None if attended is None else attended.view_as(query)

    def _run_on(self, position: int) -> None:
        """Make sure that an entry at this position can follow the last one."""
        run = self._length - self._listed.shape[1]
        if run and position != self._run_start + run:
            self._listed, run = self._all_positions().int(), 0
        if not run:
            self._run_start = position

    def read(self, query: Tensor) -> Reading:
        return Reading(*self._entries(), self._all_positions)

    def _entries(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [heads, length, head_dim]."""
        return self._buffer.read(self._all_positions)

    def observe(self, weights: Tensor | list[Tensor] | None) -> None:
        self._buffer.settle(self._all_positions)

    def keep(self, index: Tensor, merged: tuple[Tensor, Tensor] | None = None) -> None:
        """Evict all entries but index [heads, count], which is ascending in each head.

        Where something of the evicted is left in those, `merged` has the new keys and values, [heads, count, head_dim].
        """
        self._listed = self._all_positions().expand(len(index), -1).gather(1, index).int()
        if merged is None:
            self._buffer.keep(index)
        else:
            self._buffer.replace(*merged)

    def _all_positions(self) -> Tensor:
        """[heads or 1, length], int64."""
        run = consecutive(self._run_start, self._length - self._listed.shape[1], self._listed.device)
        if not self._listed.shape[1]:
            return run[None]  # eight times a layer and step it is asked for, and a copy is long
        return torch.cat([self._listed, run.expand(len(self._listed), -1)], 1)

    def positions(self) -> list[Tensor]:
        return list(self._all_positions().expand(self._heads, -1).unbind(0))

    def keys(self) -> list[Tensor]:
        return list(self._entries()[0].unbind(0))

    def values(self) -> list[Tensor]:
        return list(self._entries()[1].unbind(0))

    def lengths(self) -> list[int]:
        return [self._length] * self._heads

    def nbytes(self) -> int:
        return super().nbytes() + self._buffer.nbytes()

    def fork(self) -> Self:
        twin = copy(self)
        twin._buffer = self._buffer.fork()
        return twin
