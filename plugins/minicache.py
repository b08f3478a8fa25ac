"""MiniCache: from the middle up, two neighbouring layers share the directions of their KV entries (arXiv 2405.14366).

Each entry is a norm and a direction. Layers (l-1, l), l from `start_layer` on by twos, hold one direction between theirs and
the norms of both; tokens whose two directions are far apart stay exact, chosen in each head, and for keys and values apart.
Every token is kept. The layers below, and a last one without a partner, stay full.

The authors published no code. They retain by a threshold on the distances' range, 0.05 of it (`retention_threshold`), read
here as the farthest share of the range in each head; KVCache-Factory's functions, which nothing there calls, retain a share
of the tokens (`retention_ratio`, the default). Where no direction lies between two, one is chosen: a token that is zero in
one layer takes the other's, and the middle of opposite ones is the lower layer's.

Neither says what is retained of generated tokens. Here a limit is taken from the prompt, one a head, and a token beyond it
stays exact: for a threshold the same limit, for a ratio the smallest distance that the prompt retained; a ratio of 1 retains
every token and one of 0 none. Both layers attend to a step's own tokens as they came; these are merged once the upper layer
has. Until a prompt ends all layers are whole. A layer is restored whenever it is read: bytes are saved, time is not.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kvfactory import DenseStore, LayerContext, Method, Reading, Store, at_least, hookimpl, require
from kvfactory.context import Prompt
from kvfactory.growing import Rows
from kvfactory.hookspecs import RegisterMethod
from kvfactory.stores import consecutive, whole

NEARLY_ZERO = 1e-6
RETENTION_RATIO = 0.05


class Merged(NamedTuple):
    """What two layers' entries come to."""

    direction: Tensor
    """[..., head_dim], of length 1, float32."""
    norms: tuple[Tensor, Tensor]
    """Of the lower and the upper layer, [...], float32."""
    distance: Tensor
    """The angle between the two directions as a share of a half turn, [...], float32."""


def merge(lower: Tensor, upper: Tensor, interpolation: float) -> Merged:
    """One direction on the arc between those of two layers, [..., head_dim]: 0 is the lower one's, 1 the upper's."""
    lower, upper = lower.float(), upper.float()
    norms = lower.norm(dim=-1), upper.norm(dim=-1)
    start, end = unit(lower), unit(upper)
    start, end = start.where(norms[0][..., None] > 0, end), end.where(norms[1][..., None] > 0, start)
    # the arc cosine of a product of nearly equal directions is mostly rounding
    angle = 2 * torch.atan2((start - end).norm(dim=-1), (start + end).norm(dim=-1))
    between = slerp(start, end, angle[..., None], interpolation)
    defined = between.norm(dim=-1, keepdim=True) > NEARLY_ZERO
    return Merged(unit(between).where(defined, start), norms, angle / math.pi)


def unit(vectors: Tensor) -> Tensor:
    """Vectors [..., dim] at length 1; zeros stay zeros."""
    norm = vectors.norm(dim=-1, keepdim=True)
    return vectors / norm.where(norm > 0, 1.0)


def slerp(start: Tensor, end: Tensor, angle: Tensor, share: float) -> Tensor:
    """Directions [..., dim] at a share of the arc of an angle [..., 1] between two, or of the chord if there is none."""
    sine = angle.sin()
    is_arc = sine.abs() > NEARLY_ZERO
    sine = sine.where(is_arc, 1.0)
    before = (((1 - share) * angle).sin() / sine).where(is_arc, 1 - share)
    after = ((share * angle).sin() / sine).where(is_arc, share)
    return before * start + after * end


def farthest(distance: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """The share of tokens that are farthest apart, rounded up, in each head; ties go to the earlier token.

    Distances are [heads, tokens]; gives a mask of the same shape, and a limit for tokens to come, [heads].
    """
    tokens = distance.shape[1]
    count = math.ceil(ratio * tokens - 1e-9)  # 0.1 of 30 tokens is 3 of them, whatever the product rounds to
    index = distance.argsort(dim=1, descending=True, stable=True)[:, :count]
    retained = torch.zeros_like(distance, dtype=torch.bool).scatter_(1, index, True)
    if ratio in (0, 1):
        return retained, distance.new_full((len(distance),), -math.inf if ratio else math.inf)
    return retained, distance.gather(1, index[:, -1:])[:, 0]


def beyond_range(distance: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The tokens in the farthest share of the range of distances in each head; shapes as in `farthest`."""
    least, most = distance.aminmax(dim=1)
    limit = most - threshold * (most - least)
    return distance > limit[:, None], limit


@dataclass(frozen=True, kw_only=True)
class MiniCache(Method):
    """Merges the directions of neighbouring layers in the upper half, and keeps every token."""

    interpolation: float = 0.6
    """Where the shared direction lies: 0 is the lower layer's, 1 the upper's."""
    retention_ratio: float | None = None
    """Share of the tokens that stays exact; 0.05 unless there is a `retention_threshold`."""
    retention_threshold: float | None = None
    """In place of that, the share of the distances' range, from its far end, whose tokens stay exact."""
    start_layer: int | None = None
    """The first layer that is merged with the one below it; half of the layers if not given."""

    def __post_init__(self) -> None:
        at_least(self, start_layer=1)
        for name in ("interpolation", "retention_ratio", "retention_threshold"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"--{name} is {value}; it is from 0 to 1")
        require(
            self.retention_ratio is None or self.retention_threshold is None,
            "--retention_ratio and --retention_threshold are two ways to say what stays exact; give one of them",
        )

    def compress(self, layer: LayerContext) -> Store:
        return DenseStore(layer.keys, layer.values)

    def finish(self, stores: list[Store], prompt: Prompt) -> list[Store]:
        start = max(1, len(stores) // 2) if self.start_layer is None else self.start_layer
        finished = list(stores)
        for upper in range(start, len(stores), 2):
            pair = Pair(stores[upper - 1], stores[upper], self)
            finished[upper - 1 : upper + 1] = PairedStore(pair, 0), PairedStore(pair, 1)
        return finished

    def retain(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens of a prompt stay exact by distances [heads, tokens], and the limit for later ones, [heads]."""
        if self.retention_threshold is None:
            return farthest(distance, RETENTION_RATIO if self.retention_ratio is None else self.retention_ratio)
        return beyond_range(distance, self.retention_threshold)


class MergedEntries:
    """The keys, or the values, of two layers under common directions."""

    def __init__(self, lower: Tensor, upper: Tensor, method: MiniCache) -> None:
        """Entries of the prompt, [heads, tokens, head_dim]."""
        upper = upper.to(lower.device)  # a model may be spread over several
        self._interpolation = method.interpolation
        merged = merge(lower, upper, self._interpolation)
        retained, self._limit = method.retain(merged.distance)
        self._held = [Rows(rows) for rows in by_token(lower, upper, merged, retained, 0)]

    def append(self, lower: Tensor, upper: Tensor) -> None:
        """Merge entries of later tokens, [heads, tokens, head_dim]."""
        upper = upper.to(lower.device)
        merged = merge(lower, upper, self._interpolation)
        new = by_token(lower, upper, merged, merged.distance > self._limit[:, None], self.length)
        for held, rows in zip(self._held, new, strict=True):
            held.append(rows)

    @property
    def length(self) -> int:
        return len(self._held[0].read())

    def restore(self, side: int) -> Tensor:
        """[heads, tokens, head_dim] of the lower layer, side 0, or of the upper, side 1."""
        directions, norms, slots, exact = (held.read() for held in self._held)
        restored = directions * norms[:, side, :, None]
        restored.flatten(0, 1).index_copy_(0, slots.long(), exact[:, side])
        return restored.transpose(0, 1)

    def nbytes(self, side: int) -> int:
        """What one side holds; what is common counts as the lower one's."""
        directions, norms, slots, exact = (held.nbytes for held in self._held)
        own = (norms + exact) // 2
        return own if side else own + directions + slots + self._limit.nbytes

    def fork(self) -> Self:
        twin = copy(self)
        twin._held = [held.fork() for held in self._held]
        return twin


def by_token(lower: Tensor, upper: Tensor, merged: Merged, retained: Tensor, first: int) -> tuple[Tensor, ...]:
    """What is held of tokens from the `first` on: token by token, since that is how it grows.

    Directions [tokens, heads, head_dim] and norms [tokens, 2, heads]; of retained entries their places in tokens x heads,
    [count], int32, and how they are in both layers, [count, 2, head_dim].
    """
    chosen = retained.t()
    token, head = chosen.nonzero(as_tuple=True)  # heads differ in how many: on a GPU this waits for it
    slots = ((token + first) * len(retained) + head).int()
    exact = torch.stack([each.transpose(0, 1)[chosen] for each in (lower, upper)], 1)
    norms = torch.stack([norm.t() for norm in merged.norms], 1)
    return merged.direction.transpose(0, 1).to(lower.dtype).contiguous(), norms.to(lower.dtype), slots, exact


KeysAndValues = tuple[Tensor, Tensor]


class Pair:
    """Two layers of one sequence, both of whose stores refer to it."""

    def __init__(self, lower: Store, upper: Store, method: MiniCache) -> None:
        layers = whole(lower), whole(upper)
        self._merged = [MergedEntries(*both, method) for both in zip(*layers, strict=True)]
        # of each side, tokens that the other has not seen or not attended to yet: [heads, tokens, head_dim]
        self._nothing = [keys.new_empty(len(keys), 0, keys.shape[2]) for keys, _ in layers]
        self._pending: list[KeysAndValues] = [(nothing, nothing) for nothing in self._nothing]
        self._awaited: tuple[int, Self] | None = None

    def append(self, side: int, keys: Tensor, values: Tensor) -> None:
        """Tokens of one side, [heads, tokens, head_dim], exact until they are merged."""
        before = self._pending[side]
        self._pending[side] = torch.cat([before[0], keys], 1), torch.cat([before[1], values], 1)

    def merge_pending(self) -> None:
        """Merge the new tokens, once both sides have them."""
        if self.length(0) == self.length(1):
            for merged, lower, upper in zip(self._merged, *self._pending, strict=True):
                merged.append(lower, upper)
            self._pending = [(nothing, nothing) for nothing in self._nothing]

    def read(self, side: int) -> KeysAndValues:
        """All keys and values of one side, [heads, tokens, head_dim]."""
        keys, values = (
            torch.cat([merged.restore(side).to(pending.device), pending], 1)
            for merged, pending in zip(self._merged, self._pending[side], strict=True)
        )
        return keys, values

    @property
    def heads(self) -> int:
        return len(self._nothing[0])

    def length(self, side: int) -> int:
        return self._merged[0].length + self._pending[side][0].shape[1]

    def positions(self, side: int) -> Tensor:
        return consecutive(0, self.length(side), self._nothing[side].device)

    def nbytes(self, side: int) -> int:
        held = sum(merged.nbytes(side) for merged in self._merged)
        return held + sum(each.nbytes for each in self._pending[side])

    def fork(self, side: int) -> Self:
        """A twin for one side: the one that the other side's fork has made and left here, or a new one to leave here."""
        if self._awaited is not None and self._awaited[0] == side:
            twin, self._awaited = self._awaited[1], None
            return twin
        twin = copy(self)
        twin._merged = [merged.fork() for merged in self._merged]
        twin._pending, twin._awaited = list(self._pending), None
        self._awaited = 1 - side, twin
        return twin


class PairedStore(Store):
    """One layer of a pair. It keeps every token, so the place of an entry is its position."""

    def __init__(self, pair: Pair, side: int) -> None:
        """Side 0 is the lower layer, 1 the upper."""
        self._pair, self._side = pair, side

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        self._pair.append(self._side, keys, values)

    def read(self, query: Tensor) -> Reading:
        return Reading(*self._pair.read(self._side), lambda: self._pair.positions(self._side)[None])

    def observe(self, weights: Tensor | list[Tensor] | None) -> None:
        self._pair.merge_pending()

    def positions(self) -> list[Tensor]:
        return [self._pair.positions(self._side)] * self._pair.heads

    def keys(self) -> list[Tensor]:
        return list(self._pair.read(self._side)[0].unbind(0))

    def values(self) -> list[Tensor]:
        return list(self._pair.read(self._side)[1].unbind(0))

    def lengths(self) -> list[int]:
        return [self._pair.length(self._side)] * self._pair.heads

    def nbytes(self) -> int:
        return self._pair.nbytes(self._side)

    def fork(self) -> Self:
        twin = copy(self)
        twin._pair = self._pair.fork(self._side)
        return twin


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("minicache", attention=MiniCache)
