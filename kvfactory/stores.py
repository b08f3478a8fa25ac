"""What one layer of one sequence keeps, and everything that happens to it while decoding.

A store never sees a batch, padding or a model: tensors are [heads, tokens, head_dim], and a stored head is a KV head or,
under `query_head` granularity, a query head. Entries stay in ascending position order unless a subclass says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor


class Reading(NamedTuple):
    """What a query may attend to: tensors with equal lengths for all heads, or lists with one entry a head."""

    keys: Tensor | list[Tensor]
    """[heads, length, head_dim], or a list of [length, head_dim]."""
    values: Tensor | list[Tensor]
    positions: Tensor | list[Tensor] | None
    """True positions of the entries, [heads or 1, length], or a list of [length]; None: 0, 1, 2 and so on."""

    def pieces(self, query: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Queries, keys, values and positions that attend in one go: all heads at once, or head by head if ragged."""
        if isinstance(self.keys, Tensor):
            assert isinstance(self.values, Tensor) and not isinstance(self.positions, list)
            return [(query, self.keys, self.values, self.positions)]
        heads = zip(
            query.split(len(query) // len(self.keys)), self.keys, self.values, self.positions or (), strict=True
        )
        return [(part, keys[None], values[None], positions[None]) for part, keys, values, positions in heads]


class Store(ABC):
    """What one layer of one sequence keeps; the place of all state that outlives a call."""

    observes: ClassVar[bool] = False
    """True: `observe` is given the attention weights of every step."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        """Add tokens [kv_heads, tokens, head_dim], rotated, whose first has this true position."""

    @abstractmethod
    def read(self, query: Tensor) -> Reading:
        """The entries that query [query_heads, tokens, head_dim] may attend to; the tokens just appended come last."""

    def observe(self, weights: Tensor | list[Tensor]) -> None:
        """Attention weights [query_heads, tokens, length] over what `read` just gave, float32."""

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

    def nbytes(self) -> int:
        """Bytes of every tensor held, room to grow and bookkeeping included."""
        return sum(x.numel() * x.element_size() for x in vars(self).values() if isinstance(x, Tensor))

    @abstractmethod
    def fork(self) -> Self:
        """A second store that starts from here; appending to one leaves the other alone."""


def room_for(length: int) -> int:
    """Entries to make room for when a full buffer has to grow: an eighth more, so appending stays cheap."""
    return max(16, length // 8)


def spread(kv: Tensor, heads: int) -> Tensor:
    """[kv_heads, tokens, dim] as [heads, tokens, dim]: a KV head stands once for each query head that stores it."""
    return kv if kv.shape[0] == heads else kv.repeat_interleave(heads // kv.shape[0], 0)


def new_positions(first: int, tokens: int, device: torch.device) -> Tensor:
    """[tokens], int64, from `first` on."""
    return torch.arange(first, first + tokens, device=device)


class DenseStore(Store):
    """The same number of entries in every head."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor | None = None) -> None:
        """Keys and values [heads, length, head_dim]; positions [heads or 1, length], int32, ascending.

        Without positions the entries are all tokens from the first on, and nothing is spent on saying so.
        """
        self._keys, self._values, self._positions = keys, values, positions
        self._length = keys.shape[1]
        self._shared = True  # the tensors may be somebody else's too: copy before the first write

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        start, tokens = self._length, keys.shape[1]
        end = start + tokens
        if self._shared or end > self._keys.shape[1]:
            self._grow(end + room_for(end))
        heads = self._keys.shape[0]
        self._keys[:, start:end] = spread(keys, heads)
        self._values[:, start:end] = spread(values, heads)
        if self._positions is not None:
            self._positions[:, start:end] = position if tokens == 1 else new_positions(position, tokens, keys.device)
        self._length = end

    def _grow(self, capacity: int) -> None:
        def grown(old: Tensor) -> Tensor:
            new = old.new_empty(old.shape[0], capacity, *old.shape[2:])
            new[:, : self._length] = old[:, : self._length]
            return new

        self._keys, self._values = grown(self._keys), grown(self._values)
        self._positions = None if self._positions is None else grown(self._positions)
        self._shared = False

    def read(self, query: Tensor) -> Reading:
        length = self._length
        positions = None if self._positions is None else self._positions[:, :length]
        return Reading(self._keys[:, :length], self._values[:, :length], positions)

    def keep(self, index: Tensor) -> None:
        """Evict all entries but index [heads, count], which is ascending in each head."""
        wide = index[..., None].expand(-1, -1, self._keys.shape[-1])
        self._positions = self._all_positions().gather(1, index).int()
        self._keys, self._values = self._keys.gather(1, wide), self._values.gather(1, wide)
        self._length = index.shape[1]
        self._shared = False

    def _all_positions(self) -> Tensor:
        """[heads, length], int64."""
        if self._positions is None:
            return new_positions(0, self._length, self._keys.device).expand(self._keys.shape[0], -1)
        return self._positions[:, : self._length].long().expand(self._keys.shape[0], -1)

    def positions(self) -> list[Tensor]:
        return list(self._all_positions().unbind(0))

    def keys(self) -> list[Tensor]:
        return list(self._keys[:, : self._length].unbind(0))

    def values(self) -> list[Tensor]:
        return list(self._values[:, : self._length].unbind(0))

    def lengths(self) -> list[int]:
        return [self._length] * self._keys.shape[0]

    def fork(self) -> Self:
        self._shared = True
        return copy(self)


class RaggedStore(Store):
    """Each head its own number of entries, one segment of a flat buffer a head: no head pays for another's length."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], positions: Sequence[Tensor]) -> None:
        """One [length, head_dim] key and value tensor and one [length] int32 position tensor a stored head."""
        self._lengths = [len(each) for each in positions]
        self._starts = [sum(self._lengths[:head]) for head in range(len(self._lengths))]
        self._room = 0  # free entries at the end of every segment
        self._keys, self._values = torch.cat(list(keys)), torch.cat(list(values))
        self._positions = torch.cat(list(positions))
        self._shared = True

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        tokens, heads = keys.shape[1], len(self._lengths)
        if self._shared or tokens > self._room:
            self._grow(tokens + room_for(max(self._lengths)))
        ends = torch.tensor(self._starts) + torch.tensor(self._lengths)
        slots = (ends[:, None] + torch.arange(tokens)).flatten().to(keys.device)
        self._keys.index_copy_(0, slots, spread(keys, heads).flatten(0, 1))
        self._values.index_copy_(0, slots, spread(values, heads).flatten(0, 1))
        self._positions.index_copy_(0, slots, new_positions(position, tokens, keys.device).repeat(heads).int())
        self._lengths = [length + tokens for length in self._lengths]
        self._room -= tokens

    def _grow(self, room: int) -> None:
        def grown(old: Tensor) -> Tensor:
            free = old.new_empty(room, *old.shape[1:])
            return torch.cat([part for segment in self._segments(old) for part in (segment, free)])

        self._keys, self._values, self._positions = grown(self._keys), grown(self._values), grown(self._positions)
        self._starts = [start + head * (room - self._room) for head, start in enumerate(self._starts)]
        self._room = room
        self._shared = False

    def _segments(self, flat: Tensor) -> list[Tensor]:
        return [flat[start : start + length] for start, length in zip(self._starts, self._lengths, strict=True)]

    def read(self, query: Tensor) -> Reading:
        return Reading(*(self._segments(flat) for flat in (self._keys, self._values, self._positions)))

    def positions(self) -> list[Tensor]:
        return [each.long() for each in self._segments(self._positions)]

    def keys(self) -> list[Tensor]:
        return self._segments(self._keys)

    def values(self) -> list[Tensor]:
        return self._segments(self._values)

    def lengths(self) -> list[int]:
        return list(self._lengths)

    def fork(self) -> Self:
        self._shared = True
        return copy(self)
