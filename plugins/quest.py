"""Quest: keep everything, and read at each step only the pages that the query may care for (arXiv 2406.10774).

A page is 16 consecutive entries, of which the least and the greatest number of each key channel are noted. The query times
whichever of the two is larger, summed over channels, bounds what it can give any key of the page; each query head reads the
pages of the highest bounds, `token_budget` tokens of them and never fewer than three pages. The first two layers read
everything, and so does whatever comes more than one token at a time: the prompt, and a question behind it. Any method's
entries may be read so: `--retrieval quest`; pages are then those of what is left, made anew after an eviction, and a
method that goes by attention is shown none for what was not read. Bounds are those of keys as they came, quantised or not.

That is the authors' evaluation, in which no page is read whatever its bound; their kernels always read the newest. Here the
pages that hold the `newest_size` last entries are always read and count as chosen, one entry by default, so that a token
sees itself; 0 is the evaluation. The evaluation counts layers from the wrong end for a model that has not 32; here the first
are the first. KVCache-Factory cuts the chosen pages to an exact number of tokens, which drops the newest ones of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from kvfactory import LayerContext, Reading, Store, at_least, hookimpl
from kvfactory.compiled import has_vectors
from kvfactory.growing import Growing
from kvfactory.hookspecs import RegisterMethod, RegisterRetrieval
from kvfactory.indexing import entries, largest
from kvfactory.storage import Retrieval

from .fullkv import FullKV

LEAST_PAGES = 3


@dataclass(frozen=True, kw_only=True)
class Quest(Retrieval):
    """A step reads the pages whose keys may match its query best."""

    aliases: ClassVar[dict[str, str]] = {"recent_size": "newest_size"}

    token_budget: int = 256
    """Tokens that a query head reads at each step, in whole pages."""
    page_size: int = 16
    """Entries of a page."""
    dense_layers: int = 2
    """First layers, which read everything."""
    newest_size: int = 1
    """Newest entries whose pages are always read."""

    def __post_init__(self) -> None:
        at_least(self, token_budget=1, page_size=1, dense_layers=0, newest_size=0)

    def stored(self, store: Store, layer: LayerContext) -> Store:
        return store if layer.layer_index < self.dense_layers else PagedStore(store, self)

    def choose(self, query: Tensor, pages: Pages) -> Tensor | None:
        """Pages that each query head of query [query_heads, head_dim] reads, [query_heads, count], ascending; None: all."""
        count = self.count(pages)
        if count is None:
            return None
        bounds = page_scores(query, *pages.bounds())
        bounds[:, self.first_always(pages) :] = torch.inf
        return largest(bounds, count).nonzero()[:, 1].view(len(bounds), count)

    def count(self, pages: Pages) -> int | None:
        """How many pages are read; None: all."""
        count = max(self.token_budget // self.page_size, LEAST_PAGES)
        return None if count * self.page_size >= pages.length else count

    def first_always(self, pages: Pages) -> int:
        """The first of the pages that are always read."""
        newest = max(pages.length - self.newest_size, 0) if self.newest_size else pages.length + self.page_size
        return newest // self.page_size


class Pages(NamedTuple):
    """What is noted of the pages of heads that hold equally many entries: the least and the greatest numbers of channels."""

    full: Growing
    """[heads, pages, 2, head_dim]."""
    short: Tensor
    """Of the last page, if it is short, [heads, 1 or 0, 2, head_dim]."""
    length: int

    @classmethod
    def of(cls, keys: Tensor, page_size: int, before: Pages | None = None) -> Pages:
        """Those of keys [heads, length, head_dim]; full pages `before` are as they were."""
        if before is not None:
            new = keys.shape[1] - before.length
            if not new:
                return before
            if new == 1 and before.short.shape[1] and keys.shape[1] % page_size:  # as in most steps
                return before._replace(short=widened(before.short, keys[:, -1:]), length=keys.shape[1])
        known = 0 if before is None else before.length // page_size
        count = keys.shape[1] // page_size
        bounds = torch.stack(page_bounds(keys[:, known * page_size :], page_size), 2)
        new, short = bounds.split([count - known, bounds.shape[1] - (count - known)], 1)
        if before is None:
            return cls(Growing(new.contiguous()), short, keys.shape[1])
        return cls(before.full.joined(new) if count > known else before.full, short, keys.shape[1])

    @classmethod
    def joined(cls, heads: Sequence[Pages]) -> Pages:
        """Those of heads with equally many entries, as one."""
        full, short = torch.cat([each.full.read() for each in heads]), torch.cat([each.short for each in heads])
        return cls(Growing(full), short, heads[0].length)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest numbers, [heads, pages, head_dim] each."""
        least, most = torch.cat([self.full.read(), self.short], 1).unbind(2)
        return least, most

    def entries(self, chosen: Tensor | None, page_size: int, query_heads: int) -> Tensor | list[Tensor]:
        """The entries of chosen pages [query_heads, count], ascending; of all where none are named.

        [query_heads, entries], or a list of [entries] where only some read a last page that is short.
        """
        if chosen is None:
            return torch.arange(self.length, device=self.short.device).expand(query_heads, -1)
        at = (chosen[..., None] * page_size + torch.arange(page_size, device=chosen.device)).flatten(1)
        missing = -self.length % page_size
        reads_last = chosen[:, -1] == self.length // page_size
        if not missing or not reads_last.any():
            return at
        return at[:, :-missing] if reads_last.all() else [each[each < self.length] for each in at]


class PagedStore(Store):
    """A store that is read by pages; what it keeps and evicts is the other store's business.

    Heads with equally many entries are one piece of a reading, and have their pages together.
    """

    def __init__(self, store: Store, quest: Quest) -> None:
        self.observes = store.observes
        self._store, self._quest = store, quest
        heads = store.keys()
        pages = [Pages.of(each[None], quest.page_size) for each in heads]
        ragged = len({each.length for each in pages}) > 1
        self._pages = pages if ragged else [Pages.joined(pages)]  # by pieces; none if entries were evicted since
        self._read: Tensor | list[Tensor] | None = None  # entries that each query head reads in this step; None: all
        self._read_lengths: list[int] | None = None  # how many they were in the latest
        self._is_ragged = ragged

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        grown = [length + keys.shape[1] for length in self._store.lengths()]
        self._store.append(keys, values, position)
        if self._store.lengths() != grown:
            self._pages = []

    def read(self, query: Tensor) -> Reading:
        whole = self._store.read(query)
        pieces = whole.pieces(query)
        self._is_ragged = isinstance(whole.keys, list)
        before: Sequence[Pages | None] = self._pages if len(self._pages) == len(pieces) else [None] * len(pieces)
        self._pages = [
            Pages.of(keys, self._quest.page_size, old) for (_, keys, _), old in zip(pieces, before, strict=True)
        ]
        self._read = index = None if query.shape[1] > 1 else self._choose([part[:, 0] for part, _, _ in pieces])
        self._read_lengths = None if index is None else [len(each) for each in index]
        if index is None:
            return whole
        if isinstance(index, Tensor):
            ((_, held, also),) = pieces
            rows = whole.positions_by_piece
            return Reading(
                entries(held, index), entries(also, index), lambda: entries(rows()[0].expand(len(held), -1), index)
            )

        def by_head(sides: list[Tensor]) -> list[Tensor]:
            """What each query head reads of sides [heads or 1, length, ...], one a piece."""
            rows = [
                side.expand(len(keys), *side.shape[1:])[head * len(keys) // len(part)]
                for side, (part, keys, _) in zip(sides, pieces, strict=True)
                for head in range(len(part))
            ]
            return [row[each] for row, each in zip(rows, index, strict=True)]

        keys, values = by_head([each for _, each, _ in pieces]), by_head([each for _, _, each in pieces])
        return Reading(keys, values, lambda: by_head(whole.positions_by_piece()))

    def attend(self, query: Tensor) -> Tensor | None:
        if len(self._pages) != 1 or not has_vectors(query.device, query.shape[-1]):
            return None
        keys, values, _ = self._store.read(query)
        if isinstance(keys, list) or isinstance(values, list):
            return None
        pages = Pages.of(keys, self._quest.page_size, self._pages[0])
        self._pages, count = [pages], self._quest.count(pages)
        if count is None:
            return None
        from kvfactory.numba_pages import attend  # late: nobody else waits for its import

        always = self._quest.first_always(pages)
        attended, self._read_lengths = attend(query, keys, values, *pages[:2], self._quest.page_size, count, always)
        return attended

    def _choose(self, queries: list[Tensor]) -> Tensor | list[Tensor] | None:
        """Entries that each query head reads, ascending, of queries [query_heads, head_dim] a piece; None: all."""
        chosen = [self._quest.choose(query, pages) for query, pages in zip(queries, self._pages, strict=True)]
        if all(each is None for each in chosen):
            return None
        parts = zip(chosen, self._pages, queries, strict=True)
        index = [pages.entries(each, self._quest.page_size, len(query)) for each, pages, query in parts]
        return index[0] if len(index) == 1 else [row for part in index for row in part]

    def observe(self, weights: Tensor | list[Tensor] | None) -> None:
        held = self._store.lengths()
        self._store.observe(weights if weights is None or self._read is None else self._over_all(weights))
        self._read = None
        if self._store.lengths() != held:
            self._pages = []

    def _over_all(self, weights: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Weights over what each query head read, [1, 1, read], as weights over all there is, 0 elsewhere."""
        assert self._read is not None
        lengths = [
            length for length in self._store.lengths() for _ in range(len(self._read) // len(self._store.lengths()))
        ]
        spread = [
            each.new_zeros(1, 1, length).index_copy_(2, index, each.view(1, 1, -1))
            for each, index, length in zip(weights, self._read, lengths, strict=True)
        ]
        if not self._is_ragged:
            return torch.cat(spread)
        group = len(spread) // len(self._pages)
        return [torch.cat(spread[start : start + group]) for start in range(0, len(spread), group)]

    def read_lengths(self) -> list[int]:
        return self._read_lengths or self.lengths()

    def positions(self) -> list[Tensor]:
        return self._store.positions()

    def keys(self) -> list[Tensor]:
        return self._store.keys()

    def values(self) -> list[Tensor]:
        return self._store.values()

    def lengths(self) -> list[int]:
        return self._store.lengths()

    def holders(self) -> Iterator[Store]:
        return self._store.holders()

    def nbytes(self) -> int:
        return self._store.nbytes() + sum(pages.full.nbytes + pages.short.nbytes for pages in self._pages)

    def fork(self) -> Self:
        twin = copy(self)
        twin._store = self._store.fork()
        return twin


@dataclass(frozen=True, kw_only=True)
class FullByPages(FullKV):
    """Every token, read so."""

    reads: ClassVar[str] = "bounds of each step's query"


def page_bounds(keys: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest number of each channel in each page of keys [heads, length, head_dim].

    [heads, pages, head_dim] each; the last page may be short.
    """
    full = keys.shape[1] - keys.shape[1] % page_size
    pages, short = keys[:, :full].unflatten(1, (-1, page_size)), keys[:, full:]
    least, most = pages.amin(2), pages.amax(2)
    if not short.shape[1]:
        return least, most
    return torch.cat([least, short.amin(1, keepdim=True)], 1), torch.cat([most, short.amax(1, keepdim=True)], 1)


def widened(bounds: Tensor, keys: Tensor) -> Tensor:
    """Bounds [heads, 1, 2, head_dim] of pages that have keys [heads, 1, head_dim] besides."""
    if has_vectors(keys.device, keys.shape[-1]):
        from kvfactory import numba_pages  # late: nobody else waits for its import

        return numba_pages.widened(bounds, keys)
    keys = keys[:, None]
    return torch.cat([torch.minimum(bounds[..., :1, :], keys), torch.maximum(bounds[..., 1:, :], keys)], -2)


def page_scores(query: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """What a query [query_heads, head_dim] can give any key of a page at most, unscaled, [query_heads, pages], float32.

    `least` and `most` are [kv_heads, pages, head_dim]. A product is largest with the greatest number where the query is
    positive and with the least where it is negative.
    """
    grouped = query.float().unflatten(0, (len(least), -1))
    up, down = grouped.clamp(min=0), grouped.clamp(max=0)
    return (up @ most.float().transpose(1, 2) + down @ least.float().transpose(1, 2)).flatten(0, 1)


@hookimpl
def kvfactory_register_retrievals(register: RegisterRetrieval) -> None:
    register("quest", Quest)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("quest", attention=FullByPages, retrieval="quest")
