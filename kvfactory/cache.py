"""A sequence's stores, and the transformers `Cache` that the model passes around.

`generate()` takes positions, masks and the slice of `input_ids` from `Cache.get_seq_length()`, so that says how many tokens
were seen; how many entries are stored is the stores' own business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean as mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from .buffers import Stackable
from .clock import now
from .context import LayerContext, Prompt
from .kernels import Kernel, PromptAttention, decode_attention
from .method import Method
from .stacks import stacked
from .stores import Store


@dataclass(eq=False)
class SequenceCache:
    """What one sequence keeps under one method, layer by layer."""

    method: Method
    stores: list[Store] = field(default_factory=list)
    seen: int = 0
    """Tokens that went through the model, stored or not."""
    compress_seconds: float = 0.0
    """Time the method took, as if it had run alone: measures shared with other methods count in full."""
    own_seconds: float = 0.0
    """The part of it that was really spent here, measures that another method paid for left out."""

    @property
    def prompt_attention(self) -> PromptAttention | None:
        """The method, if it attends to its prompt in a way of its own; equal ones may share a prefill."""
        return self.method if isinstance(self.method, PromptAttention) else None

    def compress(self, layer: LayerContext) -> None:
        """Add the next layer's store, and what making it took."""
        measure = layer.measure(lambda: self.method.compress(layer))
        self.stores.append(measure.value)
        self.own_seconds += measure.seconds
        self.compress_seconds += layer.seconds_alone(measure)

    def finish(self, prompt: Prompt) -> None:
        """The prompt has passed through all layers."""
        started = now(prompt.device)
        self.stores = self.method.finish(self.stores, prompt)
        seconds = now(prompt.device) - started
        self.own_seconds += seconds
        self.compress_seconds += seconds + prompt.saved_seconds

    def fork(self) -> SequenceCache:
        """A second cache that starts from here: several questions about one context."""
        stores = [store.fork() for store in self.stores]
        return replace(self, stores=stores)

    def nbytes(self) -> int:
        """Bytes of every tensor that every layer holds."""
        return sum(store.nbytes() for store in self.stores)

    def kept(self) -> list[float]:
        """Entries per stored head, one mean a layer."""
        return [mean(store.lengths()) for store in self.stores]

    def read(self) -> list[float]:
        """Entries that a head read in the latest step, one mean a layer."""
        return [mean(store.read_lengths()) for store in self.stores]


class CompressedCache(Cache):
    """The caches of a batch. Each row of a prefill fills one or more caches, each row of a later pass has exactly one.

    The caches of a row share its prefill, so they have equal `prompt_attention`.
    """

    def __init__(self, rows: list[list[SequenceCache]], kernel: Kernel, window: int | None) -> None:
        """`window` is the sliding window the model's attention has, if any."""
        super().__init__()
        self.rows = rows
        self.kernel = kernel
        self.window = window
        self.inverse_frequencies: Tensor | None = None
        self._padding = [0] * len(rows)  # leading tokens of this pass that are no real tokens, by row
        self._width = max((row[0].seen for row in rows), default=0)  # tokens fed, padding included

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        return self._width

    def get_max_length(self) -> int | None:
        return None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i goes on from where row beam_idx[i] is."""
        self.rows = [[cache.fork() for cache in self.rows[row]] for row in beam_idx.tolist()]

    @property
    def is_empty(self) -> bool:
        return self._width == 0

    def begin(self, attention_mask: Tensor | None, tokens: int) -> None:
        """Before the first layer of a pass over `tokens` columns; the 2-D mask says which of them are padding."""
        if attention_mask is None:
            self._padding = [0] * len(self.rows)
            return
        new = attention_mask[:, -tokens:].bool()
        self._padding = (tokens - new.sum(1)).tolist()
        if not torch.equal(new, torch.arange(tokens, device=new.device) >= (~new).sum(1, keepdim=True)):
            raise ValueError(
                "a row has padding after or between its tokens; pad on the left: tokenizer.padding_side = 'left'"
            )

    def end(self, tokens: int) -> None:
        """After the last layer of the pass."""
        self._width += tokens
        for row, padding in zip(self.rows, self._padding, strict=True):
            for cache in row:
                cache.seen += tokens - padding

    def finish(self, prompts: Tensor, feed: Callable[[Method, int, list[Store], list[int]], None]) -> None:
        """After a prefill of prompts: token ids [rows, tokens], padding among them, or embeddings, which have none.

        `feed` passes more ids through the model, given the method, the tokens seen and the stores to use.
        """
        ids = prompts.tolist() if prompts.dim() == 2 else [[] for _ in prompts]
        for row, padding, tokens in zip(self.rows, self._padding, ids, strict=True):
            shared: dict[Any, Any] = {}
            for cache in row:
                feed_row = partial(feed, cache.method, cache.seen)
                cache.finish(
                    Prompt(tokens[padding:], feed_row, prompts.device, self.inverse_frequencies, _shared=shared)
                )

    def attend(self, layer: LayerBatch, mask: Tensor | None) -> Tensor:
        """Attention output [batch, query_heads, tokens, head_dim] of one layer; fills the stores or reads them."""
        if self.is_empty:
            contexts = [self._context(layer, row) for row in range(len(self.rows))]
            output = self._prefill(layer, contexts, mask)
            for caches, context in zip(self.rows, contexts, strict=True):
                for cache in caches:
                    cache.compress(context)
            return output
        stores = [cache.stores[layer.index] for (cache,) in self.rows]
        stackable = self._stackable(layer, stores)
        if len(stores) == 1 and not stackable:
            return self._decode(0, layer)[None]
        output = layer.query.new_empty(layer.query.shape)
        alone = {*range(len(stores))}
        for stack, held in stacked(stackable, self.kernel):
            weights = stack.step(self.kernel, held, layer, output)
            alone.difference_update(held)
            for place, (row, entries) in enumerate(held.items()):
                if stores[row].acts:  # it hears of its query, and is answered already
                    stores[row].read(layer.query[row])
                    stores[row].observe(None if weights is None else own_weights(weights[place], entries))
        for row in alone:
            output[row] = self._decode(row, layer)
        return output

    def _stackable(self, layer: LayerBatch, stores: list[Store]) -> dict[int, Stackable]:
        """What those rows hold in this layer that may append and attend together."""
        if layer.query.shape[2] > 1 or self.window is not None or any(self._padding):
            return {}
        held = (store.stackable(cache.seen) for store, (cache,) in zip(stores, self.rows, strict=True))
        return {row: entries for row, entries in enumerate(held) if entries is not None}

    def _prefill(self, layer: LayerBatch, contexts: list[LayerContext], mask: Tensor | None) -> Tensor:
        """The kernel's output, or a method's own in the rows that have one, zero where they are padded."""
        own = [self._own_prefill(*each) for each in zip(self.rows, contexts, strict=True)]
        if all(each is not None for each in own):
            output = torch.zeros_like(layer.query)
        else:
            output, log_sums = self.kernel.prefill(layer.query, layer.key, layer.value, mask, self.window)
            if log_sums is not None:
                for row, context in enumerate(contexts):
                    context.log_sums = log_sums[row]
        for row, each in enumerate(own):
            if each is not None:
                output[row] = pad(each, (0, 0, self._padding[row], 0))
        return output

    def _own_prefill(self, caches: list[SequenceCache], context: LayerContext) -> Tensor | None:
        """What the method of a row makes of its prompt, [query_heads, tokens, head_dim], or None for the kernel's way."""
        method = caches[0].prompt_attention
        if method is None or (self.window is not None and self.window < context.num_tokens):
            return None
        return method.prefill_attention(context)

    def _context(self, layer: LayerBatch, row: int) -> LayerContext:
        start = self._padding[row]
        return LayerContext(
            layer_index=layer.index,
            num_layers=layer.num_layers,
            queries=layer.query[row, :, start:],
            keys=layer.key[row, :, start:],
            values=layer.value[row, :, start:],
            hidden=layer.hidden[row, start:],
            inverse_frequencies=self.inverse_frequencies,
        )

    def _decode(self, row: int, layer: LayerBatch) -> Tensor:
        """One row's attention over its store, [query_heads, tokens, head_dim]; what padding attends to is nothing."""
        (cache,), padding = self.rows[row], self._padding[row]
        query, key, value = layer.query[row], layer.key[row], layer.value[row]
        if padding:
            query, key, value = query[:, padding:], key[:, padding:], value[:, padding:]
        if not query.shape[1]:
            return torch.zeros_like(layer.query[row])
        store = cache.stores[layer.index]
        store.append(key, value, cache.seen)
        sees_all = query.shape[1] == 1 and self.window is None and not store.observes
        if sees_all and (attended := store.attend(query)) is not None:
            store.observe(None)
            return attended
        reading = store.read(query)
        output, weights = decode_attention(self.kernel, query, reading, cache.seen, self.window, store.observes)
        whole = isinstance(reading.keys, Tensor)
        store.observe((weights[0] if whole else weights) if store.observes else None)
        return pad(output, (0, 0, padding, 0)) if padding else output


def own_weights(weights: Tensor, held: Stackable) -> Tensor:
    """As `Store.observe` is given them: of weights [stored heads, queries, length], those of the entries that are there."""
    return weights[..., : held.longest].flatten(0, 1)[:, None]


@dataclass
class LayerBatch:
    """What one layer's attention has to work with in one pass; tensors [batch, heads, tokens, head_dim], rotated."""

    index: int
    num_layers: int
    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor
    """[batch, tokens, hidden_size]."""
