"""Attention of a prompt to itself over chosen keys alone: columns and diagonals, or blocks. Pure torch, no n x n tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

PAIRS = 1 << 20
"""Query-key pairs that are held at once: what bounds memory."""


@dataclass(frozen=True)
class Lines:
    """Columns and diagonals of the attention matrix."""

    columns: Tensor
    """Keys that all later queries see, int64, ascending."""
    slashes: Tensor
    """Whether a key so far behind its query is seen, bool [tokens]."""
    size: int
    """Queries that are worked on together."""

    @cached_property
    def ahead(self) -> Tensor:
        """How far a block of queries is ahead of the blocks of keys that diagonals touch, int64, ascending."""
        behind = self.slashes.nonzero().flatten()
        return torch.cat([behind // self.size, (behind + self.size - 1) // self.size]).unique() * self.size

    @cached_property
    def on_slash(self) -> Tensor:
        """Which of the keys in those blocks each query sees: the same for every block, bool [size, keys]."""
        inside = torch.arange(self.size, device=self.slashes.device)
        behind = (inside[:, None, None] + self.ahead[:, None] - inside).flatten(1)
        return (behind >= 0) & self.slashes[behind.clamp(0, len(self.slashes) - 1)]

    @property
    def width(self) -> int:
        """Keys that a block of queries reads."""
        return len(self.columns) + len(self.ahead) * self.size

    def keys(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """See `Blocks.keys`. A key on a chosen diagonal is seen in its block, any other only as a column: never twice."""
        stop = int(queries[-1, -1]) + 1
        columns = self.columns[self.columns < stop]
        behind = queries[:, :, None] - columns
        in_column = (behind >= 0) & ~self.slashes[behind.clamp(0, len(self.slashes) - 1)]
        ahead = self.ahead[self.ahead < stop]
        runs = (queries[:, None] - ahead[:, None]).flatten(1)
        on_slash = self.on_slash[:, : runs.shape[1]] & (runs >= 0)[:, None]
        return torch.cat([columns.expand(len(queries), -1), runs], 1), torch.cat([in_column, on_slash], 2)


@dataclass(frozen=True)
class Blocks:
    """Blocks of keys for each block of queries."""

    chosen: Tensor
    """Best first, later ones than the queries' own last, int64 [query blocks, chosen]."""
    size: int
    """Tokens of a block."""

    @property
    def width(self) -> int:
        """Keys that a block of queries reads."""
        return self.chosen.shape[1] * self.size

    def keys(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The keys that blocks of queries at positions [blocks, size] read, and which of them each query sees.

        Returns positions [blocks, keys], some of them outside of the prompt, and bool [blocks, size, keys].
        """
        mine = self.chosen[queries[:, 0] // self.size]
        mine = mine[:, : int(queries[-1, 0]) // self.size + 1]  # no more than so many are not later ones
        at = (mine[:, :, None] * self.size + torch.arange(self.size, device=mine.device)).flatten(1)
        return at, queries[:, :, None] >= at[:, None]


Choice = Lines | Blocks


def gathered(choice: Choice, tokens: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The work of one head, some blocks of queries at a time: positions [blocks, size], and `keys` of them.

    Positions may be those of tokens behind the prompt's last, in its last block.
    """
    queries = torch.arange(-(-tokens // choice.size) * choice.size, device=device).view(-1, choice.size)
    for some in queries.split(max(1, PAIRS // (choice.size * choice.width))):
        at, seen = choice.keys(some)
        yield some, at.clamp(0, tokens - 1), seen


def sparse_attention(query: Tensor, key: Tensor, value: Tensor, choice: Choice) -> Tensor:
    """Attention of one head, [tokens, dim] all, over what was chosen alone."""
    tokens = len(query)
    scaled = pad(query / math.sqrt(query.shape[-1]), (0, 0, 0, -tokens % choice.size))
    outputs = []
    for queries, at, seen in gathered(choice, tokens, query.device):
        logits = torch.matmul(scaled[queries], key[at].transpose(1, 2))
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(value.dtype)
        outputs.append(torch.matmul(weights, value[at]).flatten(0, 1))
    return torch.cat(outputs)[:tokens]
