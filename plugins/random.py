"""Random: keep tokens drawn by chance, the baseline that every score has to beat.

Sinks and recent tokens are protected as others protect theirs, so that what is compared is the choice between the rest. A
token's score is a hash of where it stands: seed, layer, head and true position. It is the same on every device, in
prompts of any length and beside any other method, and an entry that is scored again while decoding draws no new lot.

One exception: where an allocator gives heads different budgets, each decodes by itself, and as the first of its layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfactory import EvictionMethod, LayerContext, at_least, hookimpl
from kvfactory.hookspecs import RegisterMethod

BITS_32 = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Random(EvictionMethod):
    """Keeps a random choice of tokens beside the first and the most recent ones."""

    sink_size: int = 4
    """First tokens, always kept."""
    recent_size: int = 8
    """Last tokens, always kept."""
    random_seed: int = 0
    """Another seed draws other tokens."""

    def __post_init__(self) -> None:
        at_least(self, sink_size=0, recent_size=0)
        super().__post_init__()

    def protected(self) -> tuple[int, int]:
        return self.sink_size, self.recent_size

    def score(self, layer: LayerContext) -> Tensor:
        return uniforms(self.random_seed, layer.layer_index, self.stored_heads(layer), layer.positions)


def uniforms(seed: int, layer_index: int, heads: int, positions: Tensor) -> Tensor:
    """Numbers from [0, 1) for the entries at positions [heads or 1, tokens], [heads, tokens], float32."""
    place = positions.new_zeros(1, 1)
    for part in (seed, layer_index, torch.arange(heads, device=positions.device)[:, None], positions):
        place = hashed(place, part)
    return (place >> 8) / 2.0**24  # float32 holds 24 bits


def hashed(state: Tensor, part: int | Tensor) -> Tensor:
    """32 bits that depend on all bits of the state and of the part, in int64."""
    mixed = (state + part + 0x9E3779B9) & BITS_32
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & BITS_32
    return mixed ^ (mixed >> 16)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("random", attention=Random)
