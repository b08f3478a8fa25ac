"""StreamingLLM: keep the first tokens, on which attention rests when it has nothing to say, and the last (arXiv 2309.17453).

References differ: KVCache-Factory keeps keys at their true positions and evicts nothing after the prompt, which is the
default here. The authors hold the cache at its size while decoding (`decode_budget=same`) and count positions inside
the cache (`cache_positions`), so that no distance exceeds its size. Attention only sees distances, so re-counting is the
same as moving the sinks up against the recent tokens; each read rotates the sinks from their true position, and no error
builds up. The authors also run the prompt itself through the small cache; here the prompt's attention is whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from kvfactory import EvictionMethod, LayerContext, Reading, SlidingStore, Store, at_least, hookimpl, require
from kvfactory.hookspecs import RegisterMethod
from kvfactory.rotary import rotated


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(EvictionMethod):
    """Keeps the first `sink_size` tokens and the most recent ones."""

    aliases: ClassVar[dict[str, str]] = {"window_size": "recent_size"}

    sink_size: int = 4
    """First tokens, always kept."""
    recent_size: int | None = None
    """Recent tokens kept; what the sinks leave of the budget if not given, and never anything else."""
    cache_positions: bool = False
    """Count positions inside the cache, in place of true ones."""

    def __post_init__(self) -> None:
        at_least(self, sink_size=0)
        require(
            self.recent_size is None or self.sink_size + self.recent_size == self.budget,
            f"--sink_size {self.sink_size} and --recent_size {self.recent_size} do not add up to the budget {self.budget}; "
            "leave one of them out",
        )
        super().__post_init__()

    def protected(self) -> tuple[int, int]:
        return self.sink_size, 0

    def score(self, layer: LayerContext) -> Tensor:
        return layer.positions.float().expand(self.stored_heads(layer), -1)

    @property
    def whole_prompt(self) -> str | None:
        return (
            "--cache_positions moves a prompt's sinks when it is over" if self.cache_positions else super().whole_prompt
        )

    def down_to(self, budget: int) -> Self:
        return super(StreamingLLM, replace(self, recent_size=None)).down_to(budget)

    @property
    def acts_while_decoding(self) -> bool:
        return self.cache_positions or super().acts_while_decoding

    def decoding_store(self, layer: LayerContext, kept: Tensor) -> Store:
        return CachePositionsStore(layer, kept, self) if self.cache_positions else SlidingStore(layer, kept, self)


class CachePositionsStore(SlidingStore):
    """Sinks and a window that slides, at positions without the gap between the two."""

    def __init__(self, layer: LayerContext, kept: Tensor, method: StreamingLLM) -> None:
        super().__init__(layer, kept, method)
        self._sinks = method.sink_size
        self._frequencies = layer.rotary_frequencies().float()

    def read(self, query: Tensor) -> Reading:
        reading = super().read(query)
        assert isinstance(reading.keys, Tensor)
        gap = self._all_positions()[0, -1] + 1 - self._length
        sinks, recent = reading.keys[:, : self._sinks], reading.keys[:, self._sinks :]
        keys = torch.cat([rotated(sinks, gap.view(1, 1), self._frequencies), recent], 1)
        return reading._replace(keys=keys)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("streamingllm", attention=StreamingLLM)
