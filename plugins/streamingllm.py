"""StreamingLLM: keep the first tokens, on which attention rests when it has nothing to say, and the last (arXiv 2309.17453).

References differ: KVCache-Factory keeps keys at their true positions and evicts nothing after the prompt, which is the
default here. The authors hold the cache at its size while decoding (`evict_while_decoding`) and count positions inside
the cache (`cache_positions`), so that no distance exceeds its size. Attention only sees distances, so re-counting is the
same as moving the sinks up against the recent tokens; each read rotates the sinks from their true position, and no error
builds up. The authors also run the prompt itself through the small cache; here the prompt's attention is whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfactory import DenseStore, EvictionMethod, LayerContext, Reading, Store, hookimpl, require
from kvfactory.hookspecs import RegisterMethod


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(EvictionMethod):
    """Keeps the first `sink_size` tokens and the most recent ones."""

    aliases: ClassVar[dict[str, str]] = {"window_size": "recent_size"}

    sink_size: int = 4
    """First tokens, always kept."""
    recent_size: int | None = None
    """Recent tokens kept; what the sinks leave of the budget if not given, and never anything else."""
    evict_while_decoding: bool = False
    """Hold the budget while decoding: the oldest token that is no sink makes room for a new one."""
    cache_positions: bool = False
    """Count positions inside the cache, in place of true ones."""

    def __post_init__(self) -> None:
        require(self.sink_size >= 0, f"--sink_size is {self.sink_size}; it is 0 or more")
        require(
            self.recent_size is None or self.sink_size + self.recent_size == self.budget,
            f"--sink_size {self.sink_size} and --recent_size {self.recent_size} do not add up to the budget {self.budget}; "
            "leave one of them out",
        )
        super().__post_init__()

    def protected(self) -> tuple[int, int]:
        return self.sink_size, 0

    def score(self, layer: LayerContext) -> Tensor:
        recency = torch.arange(layer.num_tokens, dtype=torch.float32, device=layer.keys.device)
        return recency.expand(self.stored_heads(layer), -1)

    def store(self, layer: LayerContext, kept: Tensor | list[Tensor]) -> Store:
        if not (self.evict_while_decoding or self.cache_positions):
            return super().store(layer, kept)
        require(
            isinstance(kept, Tensor),
            "--evict_while_decoding and --cache_positions take one budget for all heads of a layer; "
            "choose an allocator that gives them one",
        )
        require(
            layer.inverse_frequencies is not None or not self.cache_positions,
            "--cache_positions re-rotates keys and needs to know the model's rotary frequencies; this layer has none",
        )
        assert isinstance(kept, Tensor)
        capacity = kept.shape[1] if layer.num_tokens > self.budget else self.budget
        return StreamingStore(*layer.gather(kept), kept.int(), capacity, self, layer.inverse_frequencies)


class StreamingStore(DenseStore):
    """Sinks and a window that slides while decoding; on request, positions without the gap between the two."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        capacity: int,
        method: StreamingLLM,
        inverse_frequencies: Tensor | None,
    ) -> None:
        super().__init__(keys, values, positions)
        self._capacity = capacity if method.evict_while_decoding else None
        self._sinks = method.sink_size
        self._inverse_frequencies = inverse_frequencies if method.cache_positions else None

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        evicted = 0 if self._capacity is None else self._length + keys.shape[1] - self._capacity
        if evicted > 0:
            index = torch.arange(self._length, device=keys.device)
            index = torch.cat([index[: self._sinks], index[self._sinks + evicted :]])
            self.keep(index.expand(self._keys.shape[0], -1))
        super().append(keys, values, position)

    def read(self, query: Tensor) -> Reading:
        reading = super().read(query)
        if self._inverse_frequencies is None:
            return reading
        assert isinstance(reading.keys, Tensor)
        gap = self._all_positions()[0, -1] + 1 - self._length
        sinks, recent = reading.keys[:, : self._sinks], reading.keys[:, self._sinks :]
        keys = torch.cat([rotate(sinks, gap, self._inverse_frequencies), recent], 1)
        return reading._replace(keys=keys)


def rotate(keys: Tensor, shift: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Rotated keys [heads, length, head_dim] as if their positions were `shift` larger."""
    angle = shift.float() * inverse_frequencies.float()
    cos, sin = angle.cos().repeat(2), angle.sin().repeat(2)
    left, right = keys.float().chunk(2, -1)
    return (keys.float() * cos + torch.cat([-right, left], -1) * sin).to(keys.dtype)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("streamingllm", attention=StreamingLLM)
