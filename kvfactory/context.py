"""What a method may look at: one layer of one sequence, and measures that methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from .clock import now
from .compiled import has_numba
from .errors import require
from .indexing import entries
from .stores import Store, spread

T = TypeVar("T")

QUERY_CHUNK = 64
"""Queries whose attention rows are held at once while attention is summed over a whole prompt: few, to stay in cache."""


@dataclass(frozen=True)
class Measure:
    """Something computed, and what it took."""

    value: Any
    seconds: float
    """Time spent, on shared measures too where they were computed here for the first time."""
    own_seconds: float
    """Time spent outside of shared measures."""
    needs: set[Hashable]
    """Keys of the shared measures it asked for, and of those that they asked for."""


@dataclass
class Inner:
    """What was computed inside the measure that is being taken."""

    seconds: float = 0.0
    needs: set[Hashable] = field(default_factory=set)


@dataclass(eq=False)
class LayerContext:
    """One layer of one sequence: after its prefill, or while decoding where a store asks its method to score again.

    Tensors are [heads, tokens, head_dim], rotated, in the model's dtype. While decoding, keys and values are those that
    are still stored, `queries` the latest ones, and heads are stored heads.
    """

    layer_index: int
    num_layers: int
    queries: Tensor
    """[query_heads, tokens, head_dim]; while decoding those of the last tokens."""
    keys: Tensor
    """[kv_heads, tokens, head_dim]."""
    values: Tensor
    hidden: Tensor | None = None
    """[tokens, hidden_size], the input of the attention block."""
    inverse_frequencies: Tensor | None = None
    """[head_dim / 2], the rotary angle of one position, for methods that re-rotate keys."""
    log_sums: Tensor | None = None
    """Logarithm of each query's sum of exponentials over the keys up to it, [query_heads, tokens], float32, or None."""
    first_kv_head: int | None = None
    """Which KV head of the model's layer is the first of these; None where all are here."""
    listed_positions: Tensor | None = None
    """True positions of the entries, [kv_heads, tokens], int64, where they are not simply 0, 1, 2, ..."""
    evicted_before: int = 0
    """Tokens of the prompt that are gone already, because it comes in chunks."""
    _shared: dict[Hashable, Measure] = field(default_factory=dict)
    _inner: Inner = field(default_factory=Inner)

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def query_heads(self) -> int:
        return self.queries.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[0]

    @property
    def positions(self) -> Tensor:
        """True positions of the entries, [kv_heads or 1, tokens], int64, ascending."""
        if self.listed_positions is not None:
            return self.listed_positions
        return torch.arange(self.num_tokens, device=self.keys.device)[None]

    def true_positions(self, index: Tensor) -> Tensor:
        """True positions of the entries at index [heads, count]; heads is kv_heads or a multiple of it."""
        if self.listed_positions is None:
            return index
        return spread(self.listed_positions, len(index)).gather(1, index)

    def rotary_frequencies(self) -> Tensor:
        """`inverse_frequencies`, or a `UserError` where they are not known."""
        require(
            self.inverse_frequencies is not None,
            "re-rotating keys takes the model's rotary frequencies; none are known",
        )
        assert self.inverse_frequencies is not None
        return self.inverse_frequencies

    def shared(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, done once a layer for all methods of a sweep that ask with the same key."""
        if key not in self._shared:
            self._shared[key] = self.measure(compute)
        measure = self._shared[key]
        self._inner.needs |= {key} | measure.needs
        return measure.value

    def measure(self, compute: Callable[[], Any]) -> Measure:
        """`compute()`, what it took, and which shared measures it asked for on the way."""
        outer, self._inner = self._inner, Inner()
        started = now(self.keys.device)
        try:
            value = compute()
        finally:
            seconds = now(self.keys.device) - started
            inner, self._inner = self._inner, outer
            outer.seconds += seconds
        return Measure(value, seconds, seconds - inner.seconds, inner.needs)

    def seconds_alone(self, measure: Measure) -> float:
        """What a measure would have taken had nobody computed anything for it."""
        return measure.own_seconds + sum(self._shared[key].own_seconds for key in measure.needs)

    def window_attention(self, window_size: int) -> Tensor:
        """Attention weights of the last `window_size` queries over all keys, [query_heads, window_size, tokens], float32."""
        return self.shared(("window_attention", window_size), lambda: self._attention(self.num_tokens - window_size))

    def attention_mass(self) -> Tensor:
        """Attention each key got, summed over all queries, [query_heads, tokens], float32; memory is O(tokens)."""
        return self.shared("attention_mass", self._attention_mass)

    def _attention_mass(self) -> Tensor:
        """In a kernel where Triton or Numba is there for the device, else in torch, by KV heads: the same up to rounding."""
        if self.keys.is_cuda and find_spec("triton") is not None:
            from .triton_kernels import attention_mass  # late: without a GPU nobody waits for Triton's import

            return attention_mass(self.queries, self.keys)
        if self.log_sums is not None and has_numba(self.keys.device):
            from . import numba_prompt  # late, for the same reason

            return numba_prompt.attention_mass(self.queries, self.keys, self.log_sums)
        mass = self.queries.new_zeros(self.query_heads, self.num_tokens, dtype=torch.float32)
        rows_of_heads = mass.unflatten(0, (self.kv_heads, -1))
        chunk = 2 * QUERY_CHUNK  # rows of one KV head stay in cache all the same, and wide products are faster
        work = mass.new_empty(rows_of_heads.shape[1] * chunk * self.num_tokens)
        for rows, head in zip(rows_of_heads, self.stored_heads(self.kv_heads), strict=True):
            for start in range(0, self.num_tokens, chunk):
                stop = min(start + chunk, self.num_tokens)
                rows[:, :stop] += head._attention(start, stop, work).sum(1)
        return mass

    def _attention(self, start: int, stop: int | None = None, work: Tensor | None = None) -> Tensor:
        """Causal attention weights of queries start..stop over keys 0..stop, [query_heads, stop - start, stop], float32.

        They are written into `work`, flat and large enough, if it is given: new memory is slower than what is done in it.
        """
        stop = self.num_tokens if stop is None else stop
        keys = self.shared("keys in float32", self.keys.float)
        before = self.num_tokens - self.queries.shape[1]  # tokens whose queries are gone
        if start < before:
            raise ValueError(
                f"attention of {stop - start} queries is asked for; `recent_queries` kept the last {stop - before}"
            )
        queries = self.queries[:, start - before : stop - before].float() / math.sqrt(self.queries.shape[-1])
        folded = queries.reshape(self.kv_heads, -1, queries.shape[-1])
        out = None if work is None else work[: self.query_heads * (stop - start) * stop].view(*folded.shape[:2], stop)
        logits = torch.matmul(folded, keys[:, :stop].transpose(1, 2), out=out)
        logits = logits.view(self.query_heads, stop - start, stop)
        logits[:, :, start:] += torch.full((stop - start, stop - start), -math.inf, device=logits.device).triu(1)
        return torch.softmax(logits, -1, out=None if work is None else logits)

    def stored_heads(self, heads: int) -> Iterator[Self]:
        """The layer once for each stored head, with that head alone in it."""
        group = self.query_heads // heads
        for head in range(heads):
            kv_head = head * self.kv_heads // heads
            kept = self.listed_positions
            yield replace(
                self,
                queries=self.queries[head * group : (head + 1) * group],
                log_sums=None if self.log_sums is None else self.log_sums[head * group : (head + 1) * group],
                keys=self.keys[kv_head : kv_head + 1],
                values=self.values[kv_head : kv_head + 1],
                first_kv_head=(self.first_kv_head or 0) + kv_head,
                listed_positions=None if kept is None else kept[kv_head : kv_head + 1],
                _shared={},
                _inner=Inner(),
            )

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at index [heads, count], each [heads, count, head_dim]; heads is kv_heads or query_heads."""
        return entries(self.keys, index), entries(self.values, index)


@dataclass(eq=False)
class Prompt:
    """A prompt that has passed through all layers, for a method that looks at it once more."""

    ids: list[int]
    feed: Callable[[list[Store], list[int]], None]
    """Passes token ids through the model as if they followed the prompt, over one store a layer, which take them in."""
    device: torch.device
    inverse_frequencies: Tensor | None = None
    """[head_dim / 2], the rotary angle of one position."""
    saved_seconds: float = 0.0
    """What shared computations took that another method had asked for before."""
    _shared: dict[Hashable, tuple[Any, float]] = field(default_factory=dict)

    def shared(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, done once a prompt for all methods of a sweep that ask with the same key."""
        if key in self._shared:
            value, seconds = self._shared[key]
            self.saved_seconds += seconds
            return value
        started = now(self.device)
        value = compute()
        self._shared[key] = value, now(self.device) - started
        return value


GQA_SCORE_AGG: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda grouped: grouped.mean(1),
    "max": lambda grouped: grouped.amax(1),
    "sum": lambda grouped: grouped.sum(1),
}


def reduce_groups(scores: Tensor, heads: int, gqa_score_agg: str) -> Tensor:
    """[query_heads, ...] -> [heads, ...]: the scores of the query heads that share a stored head become one."""
    if scores.shape[0] == heads:
        return scores
    return GQA_SCORE_AGG[gqa_score_agg](scores.unflatten(0, (heads, -1)))


def pool(scores: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """Smooth scores [heads, tokens] along tokens with stride 1 and the same length; averages count the zero padding."""
    smooth: dict[str, Callable[..., Tensor]] = {"avgpool": avg_pool1d, "maxpool": max_pool1d}
    return smooth[pooling](scores[None], kernel_size, stride=1, padding=kernel_size // 2)[0]
