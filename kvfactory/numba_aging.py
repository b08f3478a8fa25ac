"""Steps of entries that age, in compiled loops: one call encodes what is due, appends a token, and attends to all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from .columns import Piece
from .numba_encoded import AT_ONCE, mix, score
from .numba_encoding import encode
from .numba_entries import numbers, put, vector
from .numba_kernels import alike, join_parts, parts_of
from .numba_levels import Encoded
from .numba_loops import compiled, in_threads, run, softmax_sums
from .numba_memory import entries_at
from .numba_vectors import count_of, repeated, size, total

PART = 1024
"""Entries of a head that a thread attends to before another may go on with the rest."""
OLD, FIRST, RECENT, LIMIT = range(4)
"""What is counted of keys and of values: encoded entries; where recent ones begin, and how many; how many there may be."""
NEVER = 2**62
ONE = size(1)
STEPS = 16
"""That room is made for at once: as many entries, which count as bytes."""


def attend(query: Tensor, keys: Encoded, recent_keys: Tensor, values: Encoded, recent_values: Tensor) -> Tensor:
    """Attention of query [heads, queries, head_dim] over encoded entries and the recent ones [heads, recent, head_dim].

    How many are recent may differ between keys and values. Sums are float32, the output is of the query's dtype.
    """
    counts = [
        [side.length, 0, recent.shape[1], NEVER] for side, recent in ((keys, recent_keys), (values, recent_values))
    ]
    nothing = query[:, :0]
    sides = keys, numbers(recent_keys), values, numbers(recent_values)
    return _step(query, nothing, nothing, np.array(counts), *sides)


class Steps:
    """A few steps of keys and values that age, in which nothing else happens to them."""

    def __init__(self, keys: Piece, values: Piece, of_keys: Encoded, of_values: Encoded) -> None:
        """As many as room is made for, or until entries are due that loops do not encode; `of_keys` are the encoded ones."""
        self._sides = _Side(keys, of_keys), _Side(values, of_values)
        self.left = min(side.steps for side in self._sides)
        self._counts = np.array([side.make_room(self.left) for side in self._sides])
        self._held = [each for side in self._sides for each in (side.encoded, numbers(side.window))]
        self.settled = True
        """Whether what is due may be encoded: not between a step's attention and its end."""

    def take(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The attention of a token's query [heads, queries, head_dim]; its key and its value are [heads, 1, head_dim]."""
        self.left, self.settled = self.left - 1, False
        return _step(query, key, value, self._counts, *self._held)

    def pieces(self) -> list[Piece]:
        """Keys and values as they are now."""
        if self.settled:
            _let_age(self._counts, *self._held)
        return [side.piece(*counts) for side, counts in zip(self._sides, self._counts.tolist(), strict=True)]

    def nbytes(self) -> int:
        """Bytes of every tensor held, room included."""
        return sum(side.nbytes() for side in self._sides)


class _Side:
    """Keys or values in some steps."""

    def __init__(self, piece: Piece, encoded: Encoded) -> None:
        assert piece.old is not None, "nothing is encoded"
        self.encoder, self.recent, self.old, self.encoded = piece.encoder, piece.recent, piece.old, encoded
        recent, old = piece.recent.shape[1], piece.old_length
        counts = range(recent, recent + STEPS)
        self.limit = next((count for count in counts if self.encoder.due(count + 1, old)), NEVER)
        """Entries that may be recent."""
        self.steps = STEPS
        one_by_one = self.limit != NEVER and self.encoder.due(self.limit + 1, old) == 1
        self.extensible = self.encoder.extensible(self.old) if one_by_one else None
        if self.limit != NEVER and self.extensible is None:
            self.steps, self.limit = self.limit + 1 - recent, NEVER  # the last step leaves them to the encoder

    def make_room(self, steps: int) -> list[int]:
        """For so many steps; returns what is counted."""
        heads, recent, dim = self.recent.shape
        self.window = self.recent.new_empty(heads, recent + steps, dim)
        self.window[:, :recent] = self.recent
        length = self.encoded.length
        if self.extensible is not None and recent + steps > self.limit:
            self.old = self.extensible = self.extensible.with_room(recent + steps - self.limit)
            encoded = self.old.compiled
            assert encoded is not None
            self.encoded = encoded
        return [length, 0, recent, self.limit]

    def piece(self, old: int, first: int, recent: int, limit: int) -> Piece:
        """What there is after some steps, of which this is the count."""
        column = self.old if self.extensible is None else self.extensible.first(old)
        return Piece(self.encoder, self.window[:, first : first + recent].clone(), column, old)

    def nbytes(self) -> int:
        return self.window.nbytes + self.old.nbytes() + self.encoder.nbytes()


def _step(
    query: Tensor, key: Tensor, value: Tensor, counts: Any, keys: Encoded, window: Any, values: Encoded, other: Any
) -> Tensor:
    """Encode what is due, append a token, or none, and attend."""
    alike(query, key, value)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    output = torch.empty_like(query)
    digits = size(3 if query.dtype == torch.float32 else 2)  # more exact than the query's own numbers
    tokens = key.shape[1], key.data_ptr(), value.data_ptr()
    held = counts, keys, window, values, other
    run(_step_alone, _step_in_threads, size(query.shape[2]), digits, tokens, numbers(query), *held, numbers(output))
    return output


@compiled
def _append(channels: Any, tokens: Any, counts: Any, window: Any, other: Any) -> None:
    """Write the newest entries of each head, none or one, behind the recent ones: keys and values at these addresses."""
    count, key, value = tokens
    if count:
        _put_behind(channels, key, counts[0], window)
        _put_behind(channels, value, counts[1], other)


@compiled
def _put_behind(channels: Any, address: Any, counts: Any, window: Any) -> None:
    heads, capacity, dim = window.shape
    token = entries_at(address, heads, dim, window)
    for head in range(heads):
        put(window, head * capacity + counts[FIRST] + counts[RECENT], vector(token, head, channels))
    counts[RECENT] += 1


@compiled
def _age(counts: Any, window: Any, packed: Any, scale: Any, least: Any, ends: Any, bits: Any, group: Any) -> None:
    """Encode the oldest of the recent entries if there are too many, in groups of channels."""
    if ends is None:
        while counts[RECENT] > counts[LIMIT]:
            encode(window, counts[FIRST], 1, packed, scale, least, ONE, counts[OLD], count_of(bits), count_of(group))
            counts[OLD] += 1
            counts[FIRST] += 1
            counts[RECENT] -= 1


@compiled
def _let_age(counts: Any, keys: Any, window: Any, values: Any, other: Any) -> None:
    _age(counts[0], window, keys.packed, keys.scale, keys.least, keys.ends, keys.bits, keys.group)
    _age(counts[1], other, values.packed, values.scale, values.least, values.ends, values.bits, values.group)


@compiled
def _attend_to_parts(
    thread: Any,
    threads: Any,
    channels: Any,
    digits: Any,
    query: Any,
    counts: Any,
    keys: Any,
    window: Any,
    values: Any,
    other: Any,
    highest: Any,
    sums: Any,
    mixtures: Any,
) -> None:
    """Every `threads`-th part: its highest logit, and over it the sums of weights and of weighted values, a query each."""
    heads, parts, queries, dim = mixtures.shape
    length, scale = counts[0, OLD] + counts[0, RECENT], repeated(np.float32(1 / math.sqrt(dim)), channels)
    exact, logits = np.empty((queries, dim), np.float32), np.empty((queries, PART + AT_ONCE), np.float32)
    for job in range(thread, heads * parts, threads):
        head, part = job // parts, job % parts
        begin, end = part * PART, min((part + 1) * PART, length)
        for each in range(queries):
            put(exact, each, scale * vector(query, head * queries + each, channels))
        old = max(min(counts[0, OLD], end), begin)
        score(channels, digits, keys, head, begin, old, exact, logits)
        recent = head * window.shape[1] + counts[0, FIRST] - counts[0, OLD]
        for at in range(old, end):
            key = vector(window, recent + at, channels)
            for each in range(queries):
                logits[each, at - begin] = total(key * vector(exact, each, channels))
        for each in range(queries):
            highest[head, part, each], sums[head, part, each] = softmax_sums(logits[each][: end - begin])
            put(mixtures, job * queries + each, repeated(np.float32(0), channels))
        old = max(min(counts[1, OLD], end), begin)
        mix(channels, digits, values, head, begin, old, logits, mixtures, job * queries)
        recent = head * other.shape[1] + counts[1, FIRST] - counts[1, OLD]
        for each in range(queries):
            mixture = vector(mixtures, job * queries + each, channels)
            for at in range(old, end):
                mixture = mixture + repeated(logits[each, at - begin], channels) * vector(other, recent + at, channels)
            put(mixtures, job * queries + each, mixture)


@compiled
def _step_alone(
    thread: Any,
    threads: Any,
    channels: Any,
    digits: Any,
    tokens: Any,
    query: Any,
    counts: Any,
    keys: Any,
    window: Any,
    values: Any,
    other: Any,
    output: Any,
) -> None:
    """See `_step`, in one thread."""
    _let_age(counts, keys, window, values, other)
    _append(channels, tokens, counts, window, other)
    highest, sums, mixtures = parts_of(len(query), query, counts[0, OLD] + counts[0, RECENT], PART)
    held = counts, keys, window, values, other
    _attend_to_parts(thread, threads, channels, digits, query, *held, highest, sums, mixtures)
    join_parts(channels, highest, sums, mixtures, np.arange(len(query)), output)


@in_threads
def _step_in_threads(
    threads: Any,
    channels: Any,
    digits: Any,
    tokens: Any,
    query: Any,
    counts: Any,
    keys: Any,
    window: Any,
    values: Any,
    other: Any,
    output: Any,
) -> None:
    _let_age(counts, keys, window, values, other)
    _append(channels, tokens, counts, window, other)
    highest, sums, mixtures = parts_of(len(query), query, counts[0, OLD] + counts[0, RECENT], PART)
    for thread in prange(threads):
        _attend_to_parts(
            thread, threads, channels, digits, query, counts, keys, window, values, other, highest, sums, mixtures
        )
    join_parts(channels, highest, sums, mixtures, np.arange(len(query)), output)
