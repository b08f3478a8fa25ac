"""Attention of a prompt to itself over chosen keys alone: columns and diagonals, or blocks. No n x n tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .compiled import has_numba

PAIRS = 1 << 20
"""Query-key pairs that are held at once: what bounds memory."""
MUCH = 0.6
"""Of all keys: where a block of queries reads more, they are masked and not gathered; measured on a CPU."""
LITTLE = 0.2
"""Of the keys in blocks that are touched: where fewer are read, they are gathered, and the blocks not compiled over."""


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

    @property
    def reach(self) -> int:
        """Keys in the blocks of which it reads any."""
        return (len((self.columns // self.size).unique()) + len(self.ahead)) * self.size

    def masks(self) -> tuple[Tensor, Tensor, int, int]:
        """What `numba_sparse.attend` is told: all queries have the same columns, of one key each."""
        columns = torch.zeros_like(self.slashes).index_fill_(0, self.columns, True)
        return self.slashes, columns[None], len(columns), 1

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

    def seen(self, start: int, stop: int) -> Tensor:
        """See `Blocks.seen`."""
        count = stop - start
        # backwards: one row further down is one diagonal on, so rows are views of one vector, each a step ahead
        behind = pad(self.slashes[:stop].flip(0), (0, count - 1))
        on_slash = behind.as_strided((count, stop), (1, 1)).flip(0)
        column = torch.zeros(stop, dtype=torch.bool, device=behind.device)
        column[self.columns[self.columns < stop]] = True
        return on_slash | column


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

    reach = width

    def masks(self) -> tuple[Tensor, Tensor, int, int]:
        """See `Lines.masks`: columns are blocks, and no key is on a diagonal."""
        seen = torch.zeros(len(self.chosen), len(self.chosen), dtype=torch.bool).scatter_(1, self.chosen, True)
        return seen.new_zeros(len(seen) * self.size), seen, self.size, self.size

    def keys(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The keys that blocks of queries at positions [blocks, size] read, and which of them each query sees.

        Returns positions [blocks, keys], some of them outside of the prompt, and bool [blocks, size, keys].
        """
        mine = self.chosen[queries[:, 0] // self.size]
        mine = mine[:, : int(queries[-1, 0]) // self.size + 1]  # no more than so many are not later ones
        at = (mine[:, :, None] * self.size + torch.arange(self.size, device=mine.device)).flatten(1)
        return at, queries[:, :, None] >= at[:, None]

    def seen(self, start: int, stop: int) -> Tensor:
        """Which keys before `stop` the queries start..stop see, bool [queries, stop]; of those behind a query anything."""
        mine = self.chosen[start // self.size : -(-stop // self.size)]
        blocks = torch.zeros(len(mine), len(self.chosen), dtype=torch.bool, device=mine.device).scatter_(1, mine, True)
        return blocks.repeat_interleave(self.size, 0).repeat_interleave(self.size, 1)[: stop - start, :stop]


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
    if has_numba(query.device):
        way = gathered_attention if choice.width < LITTLE * min(choice.reach, len(query)) else compiled_attention
    else:
        way = masked_attention if choice.width > MUCH * len(query) else gathered_attention
    return way(query, key, value, choice)


def compiled_attention(query: Tensor, key: Tensor, value: Tensor, choice: Choice) -> Tensor:
    """As `sparse_attention`, on a CPU with Numba, over all blocks of which anything is chosen."""
    from .numba_sparse import attend  # late: it need not be there

    return attend(query, key, value, *choice.masks())


def gathered_attention(query: Tensor, key: Tensor, value: Tensor, choice: Choice) -> Tensor:
    """As `sparse_attention`, with keys and values gathered for each block of queries."""
    tokens = len(query)
    scaled = pad(query / math.sqrt(query.shape[-1]), (0, 0, 0, -tokens % choice.size))
    outputs = []
    for queries, at, seen in gathered(choice, tokens, query.device):
        logits = torch.matmul(scaled[queries], key[at].transpose(1, 2))
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(value.dtype)
        outputs.append(torch.matmul(weights, value[at]).flatten(0, 1))
    return torch.cat(outputs)[:tokens]


def masked_attention(query: Tensor, key: Tensor, value: Tensor, choice: Choice) -> Tensor:
    """As `sparse_attention`, with a mask over all keys, which pays where most of them are chosen."""
    tokens, outputs = len(query), []
    together = max(1, PAIRS // tokens // choice.size) * choice.size
    for start in range(0, tokens, together):
        stop = min(start + together, tokens)
        seen = choice.seen(start, stop)
        seen[:, start:] &= torch.ones(stop - start, stop - start, dtype=torch.bool, device=seen.device).tril()
        some, keys, values = query[None, None, start:stop], key[None, None, :stop], value[None, None, :stop]
        outputs.append(scaled_dot_product_attention(some, keys, values, attn_mask=seen)[0, 0])
    return torch.cat(outputs)
