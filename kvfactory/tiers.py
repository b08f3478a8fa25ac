"""A store that sets entries aside, on its own device or on the host, and takes them back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .stores import DenseStore, Reading


@dataclass(frozen=True)
class Aside:
    """Entries that are held and not read; every tensor is replaced, never written to."""

    keys: Tensor
    """[heads, length, head_dim]."""
    values: Tensor
    positions: Tensor
    """[length], int64."""
    records: Tensor
    """[length, ...]."""

    def __len__(self) -> int:
        return len(self.positions)

    def only(self, index: Tensor) -> Aside:
        """Those at index [count], or where a bool [length] is true."""
        return Aside(self.keys[:, index], self.values[:, index], self.positions[index], self.records[index])

    def joined(self, more: Aside) -> Aside:
        return Aside(
            torch.cat([self.keys, more.keys], 1),
            torch.cat([self.values, more.values], 1),
            torch.cat([self.positions, more.positions]),
            torch.cat([self.records, more.records]),
        )

    def to(self, device: torch.device) -> Aside:
        return Aside(*(each.to(device) for each in (self.keys, self.values, self.positions, self.records)))

    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.keys, self.values, self.positions, self.records))


@dataclass(frozen=True)
class Moves:
    """Entries that changed places so far, each counted once whatever the number of heads, and bytes of keys and values."""

    out: int = 0
    """Set aside."""
    back: int = 0
    """Taken back."""
    gone: int = 0
    """Let go for good."""
    bytes_out: int = 0
    """Copied to the host; on a machine without an accelerator, to the pool that stands for it."""
    bytes_back: int = 0


class TieredStore(DenseStore):
    """Entries to read and entries set aside; its heads agree about each, and a record of each goes where it goes.

    `records` [length, ...] are those of the entries to read, in their order. Rows for new tokens are a subclass's business.
    """

    observes = True

    def __init__(
        self, keys: Tensor, values: Tensor, records: Tensor, *, on_host: bool, limit: int | None = None
    ) -> None:
        """Starts with all tokens of a prompt, keys and values [heads, tokens, head_dim], and nothing aside.

        What is set aside goes to the host, or stays on the device. For `limit` see `DenseStore`.
        """
        super().__init__(keys, values, limit=limit)
        self.records = records
        self.moves = Moves()
        self._on_host = on_host
        nothing = Aside(keys[:, :0], values[:, :0], torch.empty(0, dtype=torch.int64, device=keys.device), records[:0])
        self.aside = nothing.to(torch.device("cpu")) if on_host else nothing
        self._query: Tensor | None = None

    def entry_positions(self) -> Tensor:
        """True positions of the entries to read, [length], int64."""
        return self._all_positions()[0]

    def set_aside(self, chosen: Tensor) -> None:
        """Hold those entries aside that chosen [length], bool, names."""
        index = chosen.nonzero()[:, 0]
        if not len(index):
            return
        entries = Aside(*self._entries(), self.entry_positions(), self.records).only(index)
        self._count(out=len(index))
        self.aside = self.aside.joined(entries.to(self.aside.keys.device))
        self._keep(~chosen)

    def let_go(self, chosen: Tensor) -> None:
        """Let go of those entries that chosen [length], bool, names."""
        if count := int(chosen.sum()):
            self._count(gone=count)
            self._keep(~chosen)

    def let_go_aside(self, chosen: Tensor) -> None:
        """The same for entries aside."""
        if count := int(chosen.sum()):
            self._count(gone=count)
            self.aside = self.aside.only(~chosen)

    def take_back(self, chosen: Tensor) -> None:
        """Read those entries again that chosen [entries aside], bool, names; packed buffers encode all entries anew."""
        if not chosen.any():
            return
        keys, values = self._entries()
        back = self.aside.only(chosen)
        self.aside = self.aside.only(~chosen)
        self._count(back=len(back))
        both = Aside(keys, values, self.entry_positions(), self.records).joined(back.to(keys.device))
        both = both.only(both.positions.argsort())
        self._listed, self.records = both.positions[None].int(), both.records
        self._buffer.replace(both.keys, both.values)

    def _keep(self, chosen: Tensor) -> None:
        index = chosen.nonzero()[:, 0]
        self._listed = self.entry_positions()[index][None].int()
        self.records = self.records[index]
        self._buffer.keep(index.expand(self._heads, -1))

    def _count(self, out: int = 0, back: int = 0, gone: int = 0) -> None:
        moves, entry = self.moves, self.entry_bytes() if self._on_host else 0
        self.moves = Moves(
            moves.out + out,
            moves.back + back,
            moves.gone + gone,
            moves.bytes_out + out * entry,
            moves.bytes_back + back * entry,
        )

    def entry_bytes(self) -> int:
        """Bytes of an entry's keys and values in all heads, as they are set aside."""
        keys, values = self.aside.keys, self.aside.values
        return self._heads * (keys.shape[2] * keys.itemsize + values.shape[2] * values.itemsize)

    def read(self, query: Tensor) -> Reading:
        self._query = query if len(self.aside) else None
        return super().read(query)

    def observe(self, weights: Tensor | list[Tensor] | None) -> None:
        self._query = None
        super().observe(weights)

    def weights_aside(self, weights: Tensor) -> Tensor:
        """What the step's queries would have given each entry aside, [query_heads, tokens, entries aside], float32.

        `weights` [query_heads, tokens, length] are what they gave those that were read: the same scale, so weights of both
        may be compared. To be asked before the step is observed.
        """
        assert self._query is not None
        host, scale = self.aside.keys.device, math.sqrt(self._query.shape[-1])
        queries = self._query.float().unflatten(0, (self._heads, -1)).flatten(1, 2) / scale
        most, at = weights.unflatten(0, (self._heads, -1)).flatten(1, 2).max(-1)
        keys = self._entries()[0].float()
        strongest = keys.gather(1, at[..., None].expand(-1, -1, keys.shape[2]))
        normaliser = (queries * strongest).sum(-1) - most.log()  # the logarithm of the softmax's sum
        logits = queries.to(host) @ self.aside.keys.float().transpose(1, 2)
        return (logits - normaliser.to(host)[..., None]).exp().reshape(*weights.shape[:2], -1)

    def nbytes(self) -> int:
        return super().nbytes() + self.aside.nbytes()
