"""KVzip: keep what the model needs to repeat the prompt, whatever it will be asked about it (arXiv 2505.23416).

The prompt is fed again behind itself, chunk by chunk, and each key of a chunk scores the most attention that any query of
its repetition pays it: a softmax over the sinks, the chunk and the repetition, the latter causal. Nothing fed stays. Places
go to the best scores of all heads of all layers (`scope=model`) or within each layer (`scope=layer`), where any allocator
may split the budget.

References differ: the authors' threshold is the k-th largest score and strict, so that k - 1 entries survive and ties with
it fall; here all places are filled, ties going to the earlier layer, head and token. They put a sentence in front of each
repetition that asks for it; a method has no tokenizer, so the cue is what precedes the chunk, its last 8 tokens. They keep
the system prompt; here it is `sink_size` first tokens and the `recent_size` last, on which the answer stands. Under a
model's sliding window a score may rest on keys that the window hides.

Until a prompt has been read again every layer holds all of it, and that is what `compress` alone gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfactory import (
    DenseStore,
    EvictionMethod,
    LayerContext,
    Reading,
    Store,
    at_least,
    hookimpl,
    reduce_groups,
    require,
)
from kvfactory.budget import Uniform
from kvfactory.context import QUERY_CHUNK, Prompt
from kvfactory.hookspecs import RegisterMethod
from kvfactory.stores import whole

CUE = 8


@dataclass(frozen=True, kw_only=True)
class KVzip(EvictionMethod):
    """Keeps the tokens that a repetition of the prompt attends to most."""

    reads: ClassVar[str] = "the repetition's queries"
    prefill: ClassVar[str] = "shared, then read again"

    chunk_size: int = 2048
    """Tokens repeated at a time."""
    sink_size: int = 4
    """First tokens, always kept, which every repetition may attend to."""
    recent_size: int = 8
    """Last tokens, always kept."""
    scope: Literal["model", "layer"] = "model"
    """Whether all heads of the model compete for one budget, or each layer has its own."""

    def __post_init__(self) -> None:
        at_least(self, chunk_size=1, sink_size=0, recent_size=0)
        require(
            self.scope == "layer" or self.allocator == Uniform(),
            f"--allocator {self.allocator.name}: one threshold over all heads splits kvzip's budget; give --scope layer",
        )
        require(
            self.decode_budget is None,
            f"--decode_budget {self.decode_budget}: kvzip scores by reading the prompt again, which generated tokens "
            "do not wait for; leave it out",
        )
        super().__post_init__()

    def protected(self) -> tuple[int, int]:
        return self.sink_size, self.recent_size

    @property
    def whole_prompt(self) -> str | None:
        return "it reads the whole prompt again over the whole cache"

    def compress(self, layer: LayerContext) -> Store:
        return DenseStore(layer.keys, layer.values)

    def finish(self, stores: list[Store], prompt: Prompt) -> list[Store]:
        tokens = stores[0].lengths()[0]
        method = self.for_prompt(tokens)
        assert isinstance(method.budget, int)
        if tokens <= method.budget:
            layers = [
                LayerContext(
                    index, len(stores), keys[:, :0], keys, values, inverse_frequencies=prompt.inverse_frequencies
                )
                for index, (keys, values) in enumerate(map(whole, stores))
            ]
            return [self.stored(*each) for each in zip(stores, layers, strict=True)]
        require(
            len(prompt.ids) == tokens,
            "kvzip feeds a prompt's tokens again, and this prompt came as embeddings; give token ids",
        )
        settings = self.sink_size, self.recent_size, self.chunk_size
        repeated = prompt.shared(("repetition", settings), lambda: method.repeat(stores, prompt))
        kept = method.best_of_model(repeated) if self.scope == "model" else map(method.select, repeated)
        return [self.stored(method.store(layer, index), layer) for layer, index in zip(repeated, kept, strict=True)]

    def repeat(self, stores: list[Store], prompt: Prompt) -> list[RepeatedLayer]:
        """The layers, with the scores that a repetition gave their tokens."""
        held = [whole(store) for store in stores]
        first, end = self.sink_size, len(prompt.ids) - self.recent_size
        parts = []
        for start in range(first, end, self.chunk_size):
            chunk = slice(start, min(start + self.chunk_size, end))
            readers = [RepeatStore(keys, values, first, chunk) for keys, values in held]
            prompt.feed([*readers], prompt.ids[max(start - CUE, 0) : chunk.stop])
            parts.append([reader.importance for reader in readers])
        scores = [pad(torch.cat(each, 1), (first, self.recent_size)) for each in zip(*parts, strict=True)]
        return [
            RepeatedLayer(
                index,
                len(stores),
                keys.new_empty(len(each), 0, keys.shape[2]),
                keys,
                values,
                inverse_frequencies=prompt.inverse_frequencies,
                importance=each,
            )
            for index, ((keys, values), each) in enumerate(zip(held, scores, strict=True))
        ]

    def score(self, layer: LayerContext) -> Tensor:
        assert isinstance(layer, RepeatedLayer)
        return reduce_groups(layer.importance, self.stored_heads(layer), "max")

    def best_of_model(self, layers: list[RepeatedLayer]) -> list[list[Tensor]]:
        """What each head of each layer keeps where the places go to the best scores of all."""
        assert isinstance(self.budget, int)
        first, last = self.protected()
        device = layers[0].keys.device
        scores = torch.stack([self.shared_scores(layer).to(device) for layer in layers])[:, :, first : -last or None]
        places = (self.budget - first - last) * scores.shape[0] * scores.shape[1]
        best = scores.flatten().argsort(descending=True, stable=True)[:places]
        kept = torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill(0, best, True).view(scores.shape)
        return [
            [head.nonzero()[:, 0].to(layer.keys.device) for head in heads]
            for layer, heads in zip(layers, pad(kept, (first, last), value=True), strict=True)
        ]


@dataclass(eq=False)
class RepeatedLayer(LayerContext):
    """A layer whose prompt has been read again."""

    importance: Tensor = field(kw_only=True)
    """The most attention each key got from each query head, [query_heads, tokens], float32."""

    def stored_heads(self, heads: int) -> Iterator[Self]:
        groups = self.importance.split(len(self.importance) // heads)
        for head, importance in zip(super().stored_heads(heads), groups, strict=True):
            yield replace(head, importance=importance)


class RepeatStore(DenseStore):
    """A prompt with a repetition of one chunk behind it, whose queries are noted as they read."""

    def __init__(self, keys: Tensor, values: Tensor, sinks: int, chunk: slice) -> None:
        super().__init__(keys, values)
        self.importance = keys.new_empty(0)
        self._sinks, self._chunk, self._prompt = sinks, chunk, keys.shape[1]

    def read(self, query: Tensor) -> Reading:
        """Beside that, `importance` becomes the most attention of any query on the chunk, [query_heads, chunk], float32."""
        reading = super().read(query)
        assert isinstance(reading.keys, Tensor)
        keys = reading.keys
        compared = torch.cat([keys[:, : self._sinks], keys[:, self._chunk], keys[:, self._prompt :]], 1)
        self.importance = strongest_attention(query, compared)[:, self._sinks :]
        return reading


def strongest_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """The most that any query of the last tokens attends to each key before these, [query_heads, keys before], float32."""
    before = keys.shape[1] - queries.shape[1]
    strongest = queries.new_zeros(len(queries), before, dtype=torch.float32)
    for start in range(0, queries.shape[1], QUERY_CHUNK):
        some = queries[:, start : start + QUERY_CHUNK]
        seen = keys[:, : before + start + some.shape[1]]
        weights = LayerContext(0, 1, some, seen, seen).window_attention(some.shape[1])
        strongest = strongest.maximum(weights[:, :, :before].amax(1))
    return strongest


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("kvzip", attention=KVzip)
