"""Quest: keep everything, and read at each step only the pages that the query may care for (arXiv 2406.10774).

A page is 16 consecutive entries, of which the least and the greatest number of each key channel are noted. The query times
whichever of the two is larger, summed over channels, bounds what it can give any key of the page; each query head reads the
pages of the highest bounds, `token_budget` tokens of them and never fewer than three pages. The first two layers read
everything, and so does whatever comes more than one token at a time: the prompt, and a question behind it.

That is the authors' evaluation, in which no page is read whatever its bound; their kernels always read the newest. Here the
pages that hold the last `recent_size` entries are always read and count as chosen, one by default, so that a token sees
itself; 0 is the evaluation. The evaluation counts layers from the wrong end for a model that has not 32; here the first are
the first. KVCache-Factory cuts the chosen pages to an exact number of tokens, which drops the newest ones of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfactory import DenseStore, LayerContext, Method, Reading, Store, at_least, hookimpl
from kvfactory.hookspecs import RegisterMethod

LEAST_PAGES = 3


@dataclass(frozen=True, kw_only=True)
class Quest(Method):
    """Keeps every token; a step reads the pages whose keys may match its query best."""

    reads: ClassVar[str] = "bounds of each step's query"

    token_budget: int = 256
    """Tokens that a query head reads at each step, in whole pages."""
    page_size: int = 16
    """Entries of a page."""
    dense_layers: int = 2
    """First layers, which read everything."""
    recent_size: int = 1
    """Newest entries whose pages are always read."""

    def __post_init__(self) -> None:
        at_least(self, token_budget=1, page_size=1, dense_layers=0, recent_size=0)

    def compress(self, layer: LayerContext) -> Store:
        if layer.layer_index < self.dense_layers:
            return DenseStore(layer.keys, layer.values)
        return PagedStore(layer.keys, layer.values, self)


class PagedStore(DenseStore):
    """Everything there is, and of each page the least and the greatest number of each key channel."""

    def __init__(self, keys: Tensor, values: Tensor, method: Quest) -> None:
        """Keys and values [kv_heads, length, head_dim]."""
        super().__init__(keys, values)
        self._method = method
        self._least, self._most = page_bounds(keys, method.page_size)
        self._read: list[int] | None = None

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        open_page = self._length // self._method.page_size  # the pages before it are full, and stay as they are
        super().append(keys, values, position)
        unsettled = self._buffer.read()[0][:, open_page * self._method.page_size :]
        least, most = page_bounds(unsettled, self._method.page_size)
        self._least = torch.cat([self._least[:, :open_page], least], 1)
        self._most = torch.cat([self._most[:, :open_page], most], 1)

    def read(self, query: Tensor) -> Reading:
        whole = super().read(query)
        chosen = self.choose(query)
        if chosen is None:
            self._read = None
            return whole
        assert isinstance(whole.keys, Tensor) and isinstance(whole.values, Tensor)
        group = len(query) // len(whole.keys)
        index = [self.entries_of(pages) for pages in chosen]
        keys = [whole.keys[head // group, each] for head, each in enumerate(index)]
        values = [whole.values[head // group, each] for head, each in enumerate(index)]
        self._read = [len(each) for each in index]
        positions = self._all_positions()[0]
        return Reading(keys, values, lambda: [positions[each] for each in index])

    def read_lengths(self) -> list[int]:
        return self.lengths() if self._read is None else self._read

    def choose(self, query: Tensor) -> Tensor | None:
        """Pages that each query head reads, [query_heads, count], ascending; None for all of them."""
        method = self._method
        pages = self._least.shape[1]
        count = max(method.token_budget // method.page_size, LEAST_PAGES)
        if query.shape[1] > 1 or count >= pages:
            return None
        bounds = page_scores(query[:, 0], self._least, self._most)
        recent = -(-self._length // method.page_size) - max(self._length - method.recent_size, 0) // method.page_size
        if method.recent_size:
            bounds[:, pages - min(recent, pages) :] = torch.inf
        return bounds.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values

    def entries_of(self, pages: Tensor) -> Tensor:
        """The entries of pages [count], ascending."""
        size = self._method.page_size
        entries = (pages[:, None] * size + torch.arange(size, device=pages.device)).flatten()
        return entries[entries < self._length]


def page_bounds(keys: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest number of each channel in each page of keys [heads, length, head_dim].

    [heads, pages, head_dim] each; the last page may be short.
    """
    pages = keys.split(page_size, 1)
    return torch.stack([page.amin(1) for page in pages], 1), torch.stack([page.amax(1) for page in pages], 1)


def page_scores(query: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """What a query [query_heads, head_dim] can give any key of a page at most, unscaled, [query_heads, pages], float32.

    `least` and `most` are [kv_heads, pages, head_dim]. A product is largest with the greatest number where the query is
    positive and with the least where it is negative.
    """
    grouped = query.float().unflatten(0, (len(least), -1))
    up, down = grouped.clamp(min=0), grouped.clamp(max=0)
    return (up @ most.float().transpose(1, 2) + down @ least.float().transpose(1, 2)).flatten(0, 1)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("quest", attention=Quest)
