"""SlidingWindow: keep the most recent tokens and nothing else.

The prompt runs whole and is then cut to its last tokens; while decoding the oldest entry makes room for each new one
before it attends. StreamingLLM without sinks is the same; what a model loses with its first tokens is the difference
between the two. Models with a sliding window of their own limit the prompt's attention too, which is something else. The
thesis that this baseline comes from cuts before the prompt's own attention and then masks the wrong keys, which is not
reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvfactory import EvictionMethod, LayerContext, SlidingStore, Store, hookimpl
from kvfactory.hookspecs import RegisterMethod


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(EvictionMethod):
    """Keeps the last `budget` tokens."""

    decode_budget: int | Literal["same"] | None = "same"

    def score(self, layer: LayerContext) -> Tensor:
        return layer.positions.float().expand(self.stored_heads(layer), -1)

    def decoding_store(self, layer: LayerContext, kept: Tensor) -> Store:
        return SlidingStore(layer, kept, self)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("slidingwindow", attention=SlidingWindow)
