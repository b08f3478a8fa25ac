"""ThinK: of SnapKV's keys, keep the channels that the last queries use (arXiv 2407.21018).

A channel of a head scores its energy in the last 32 queries of the prompt times that in the kept keys: the size of what it
adds to their products. The weakest 40 % are dropped from all kept keys but the most recent 32; values stay whole, and so do
keys of generated tokens. What is dropped counts as 0 in every product, with any kernel, which is the authors' attention over
fewer channels. Any method's keys may be pruned so: `--key_pruning think`.

The authors store once per query head; here the query heads that share a KV head have their mean energy, as in kvpress, which
zeroes channels and saves nothing. The authors' most recent 32 are the last in their cache, which is in the order of scores;
here they are so by position. A prompt of at most so many kept tokens stays whole (KVCache-Factory fails there).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfactory import LayerContext, at_least, hookimpl, reduce_groups, require
from kvfactory.aging import AgingBuffer
from kvfactory.buffers import Buffer, Positions
from kvfactory.columns import Column, Encoder, Piece
from kvfactory.hookspecs import RegisterKeyPruning, RegisterMethod
from kvfactory.indexing import entries
from kvfactory.storage import KeyPruning

from .snapkv import SnapKV

QUERIES = 32
"""Last queries of the prompt whose energy counts."""


@dataclass(frozen=True, kw_only=True)
class ThinK(KeyPruning):
    """Drops the channels of old keys that matter least to the last queries."""

    aliases: ClassVar[dict[str, str]] = {"recent_size": "whole_size"}

    pruning_ratio: float = 0.4
    """Share of the channels of each head that is dropped."""
    whole_size: int = 32
    """Most recent kept keys, which stay whole."""

    def __post_init__(self) -> None:
        at_least(self, pruning_ratio=0, whole_size=0)
        require(self.pruning_ratio < 1, f"--pruning_ratio is {self.pruning_ratio}; it is a share below 1")

    def buffer(self, layer: LayerContext, keys: Tensor, values: Tensor) -> Buffer:
        channels = kept_channels(channel_scores(layer.queries, keys), self.pruning_ratio)
        prunes = keys.shape[1] > self.whole_size and channels.shape[1] < keys.shape[2]
        pruned = Channels(channels.to(torch.int16), self.whole_size) if prunes else AsItIs()
        return AgingBuffer(Piece(pruned, keys.clone()), Piece(AsItIs(), values.clone()))


class AsItIs(Encoder):
    """Nothing is encoded."""

    def due(self, recent: int, old: int) -> int:
        return 0

    def encode(self, x: Tensor, positions: Positions) -> Column:
        raise AssertionError("nothing is due")


@dataclass(frozen=True)
class Channels(Encoder):
    """Old keys hold some of their channels."""

    channels: Tensor
    """[heads, count], int16, ascending."""
    whole_size: int

    def due(self, recent: int, old: int) -> int:
        """Once, behind the prompt; and again where a merge wrote all keys anew."""
        return 0 if old else max(recent - self.whole_size, 0)

    def encode(self, x: Tensor, positions: Positions) -> Column:
        return PrunedColumn.of(x, self.channels)

    def of_head(self, head: int) -> Channels:
        return Channels(self.channels[head : head + 1].clone(), self.whole_size)

    def nbytes(self) -> int:
        return self.channels.nbytes


@dataclass(frozen=True)
class PrunedColumn(Column):
    """Some channels of keys."""

    kept: Tensor
    """[heads, length, channels]."""
    channels: Tensor
    """Which they are, [heads, channels], int16, ascending: the encoder's, which counts them."""
    dim: int

    @classmethod
    def of(cls, keys: Tensor, channels: Tensor) -> PrunedColumn:
        """Those channels [heads, count], int16, of keys [heads, length, head_dim]."""
        return cls(keys.gather(2, channels.long()[:, None].expand(-1, keys.shape[1], -1)), channels, keys.shape[2])

    def decoded(self) -> Tensor:
        heads, length, _ = self.kept.shape
        whole = self.kept.new_zeros(heads, length, self.dim, dtype=torch.float32)
        return whole.scatter_(2, self.channels.long()[:, None].expand(-1, length, -1), self.kept.float())

    def products(self, query: Tensor) -> Tensor:
        asked = query.gather(2, self.channels.long()[:, None].expand(-1, query.shape[1], -1))
        return asked @ self.kept.float().transpose(1, 2)

    def keep(self, index: Tensor) -> PrunedColumn:
        return PrunedColumn(entries(self.kept, index), self.channels, self.dim)

    def heads(self) -> list[PrunedColumn]:
        parts = zip(self.kept.split(1), self.channels.split(1), strict=True)
        return [PrunedColumn(kept.clone(), channels.clone(), self.dim) for kept, channels in parts]

    def joined(self, later: PrunedColumn) -> PrunedColumn:
        return PrunedColumn(torch.cat([self.kept, later.kept], 1), self.channels, self.dim)

    def nbytes(self) -> int:
        return self.kept.nbytes


def channel_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Energy of each channel in the last queries times that in the keys, [heads, head_dim], float32.

    Queries are [query_heads, tokens, head_dim], keys [heads, length, head_dim].
    """
    asked = reduce_groups(queries[:, -QUERIES:].float().square().mean(1), len(keys), "mean")
    return asked * keys.float().square().mean(1)


def kept_channels(scores: Tensor, pruning_ratio: float) -> Tensor:
    """The best channels of each head, ascending, [heads, count], int64; ties go to the lower one."""
    count = scores.shape[1] - int(scores.shape[1] * pruning_ratio)
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values


@dataclass(frozen=True, kw_only=True)
class SnapKVInThinK(SnapKV):
    """SnapKV's tokens, with pruned keys."""


@hookimpl
def kvfactory_register_key_prunings(register: RegisterKeyPruning) -> None:
    register("think", ThinK)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("think", attention=SnapKVInThinK, key_pruning="think")
