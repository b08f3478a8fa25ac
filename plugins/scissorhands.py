"""Scissorhands: evict what most recent queries paid less than average attention to (arXiv 2305.17118).

A query judges each entry it sees: below the average of its attention, which is 1 / (entries seen), or not. The entries
judged below most often by the last `history_window` queries go, the most recent tokens never, and half of the budget at
once while decoding. The prompt is judged by as many of its last queries.

Judgements are counted, as in the paper, and not divided by the number of queries that saw the entry: where a token is
younger than the history, a query from before it counts in its favour. The record is one bit for each entry and query.

References differ: KVCache-Factory sums the attention of the last queries in place of counting, which is H2O with a window
(`importance=attention-mass`); its `decay` weakens what was summed before each step. The authors' released code judges by
a quantile while the prompt still runs, has no budget, and changes the prompt's hidden states; it is not reproduced. The
paper gives later layers more of the budget, which an allocator may do here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvfactory import LayerContext, Share, TrackingMethod, at_least, hookimpl, reduce_groups, require
from kvfactory.hookspecs import RegisterMethod


@dataclass(frozen=True)
class BelowAverage:
    """Which of the last queries paid an entry less attention than an average one, [heads, tokens, bytes], a bit each.

    A query's bit is its position modulo the window, so that it takes the place of the query a window before.
    """

    window: int

    def blank(self, attention: Tensor) -> Tensor:
        heads, _, tokens = attention.shape
        return attention.new_zeros(heads, tokens, -(-self.window // 8), dtype=torch.uint8)

    def add(self, record: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        attention = attention[:, -self.window :]
        queries, tokens = attention.shape[1:]
        if queries == 1:
            return self._add_newest(record, attention[:, 0], int(positions[0, -1]) % self.window)
        slot = positions[0, -queries:] % self.window  # each query's own, for there are no more queries than slots
        byte, bit = slot // 8, (1 << slot % 8).byte()
        entry = torch.arange(tokens, device=attention.device)
        seen = entry[-queries:, None] + 1
        average = attention.sum(-1, keepdim=True) / seen
        below = (attention < average) & (entry < seen)
        cleared = torch.zeros_like(record[0, 0]).index_add(0, byte, bit)
        new = torch.zeros_like(record).index_add(2, byte, (below * bit[:, None]).transpose(1, 2))
        return record & ~cleared | new

    def _add_newest(self, record: Tensor, attention: Tensor, slot: int) -> Tensor:
        """Of the newest query alone, which sees all, [heads, tokens]: at every step, so in few calls."""
        record, below, bit = record.clone(), attention < attention.mean(-1, keepdim=True), 1 << slot % 8
        record[..., slot // 8].bitwise_and_(255 - bit).add_(below, alpha=bit)
        return record

    def value(self, record: Tensor) -> Tensor:
        bits = torch.arange(8, dtype=torch.uint8, device=record.device)
        return self.window - (record[..., None] >> bits & 1).sum((-1, -2)).float()


@dataclass(frozen=True)
class AttentionMass:
    """Attention summed, older sums weakened by each step, [heads, tokens]."""

    decay: float

    def blank(self, attention: Tensor) -> Tensor:
        return torch.zeros_like(attention[:, 0])

    def add(self, record: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        return self.decay * record + attention.sum(1)

    def value(self, record: Tensor) -> Tensor:
        return record


@dataclass(frozen=True, kw_only=True)
class Scissorhands(TrackingMethod):
    """Keeps the tokens that the fewest recent queries neglected, beside the most recent ones."""

    reads: ClassVar[str] = "the window's queries"

    history_window: int = 400
    """Queries that judge: those of the last tokens."""
    sink_size: int = 0
    """First tokens, always kept."""
    recent_size: int = 10
    """Last tokens, always kept."""
    importance: Literal["below-average", "attention-mass"] = "below-average"
    """Count the queries that paid too little attention, or sum the attention."""
    decay: float = 1.0
    """What is left at each step of the attention summed before, 0 to 1; with `attention-mass` alone."""
    decode_budget: int | Literal["same"] | None = "same"
    decode_interval: int | Share = Share(50)

    def __post_init__(self) -> None:
        at_least(self, history_window=1, sink_size=0, recent_size=0)
        require(0 <= self.decay <= 1, f"--decay is {self.decay}; it is a share from 0 to 1")
        require(
            self.decay == 1 or self.importance == "attention-mass",
            f"--decay {self.decay} weakens sums of attention; give --importance attention-mass with it",
        )
        super().__post_init__()

    @property
    def record(self) -> BelowAverage | AttentionMass:
        return AttentionMass(self.decay) if self.importance == "attention-mass" else BelowAverage(self.history_window)

    def protected(self) -> tuple[int, int]:
        return self.sink_size, self.recent_size

    def track_prompt(self, layer: LayerContext) -> Tensor:
        history = layer.window_attention(min(self.history_window, layer.num_tokens))
        attention = self.per_stored_head(layer, history)
        return self.record.add(self.record.blank(attention), attention, layer.positions)

    def track_step(self, state: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
        attention = reduce_groups(weights.flatten(0, 1), len(state), self.gqa_score_agg)
        return self.record.add(state, attention, positions)

    def value(self, state: Tensor, positions: Tensor) -> Tensor:
        return self.record.value(state)


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("scissorhands", attention=Scissorhands)
