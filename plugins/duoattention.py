"""DuoAttention: heads that retrieve keep every token, the others stream with sinks and recent ones (arXiv 2410.10819).

Which heads retrieve is decided by a threshold on a number for each head: the trained gates of the authors' patterns
(`head_patterns`), ranked over the whole model. Where there is no pattern the heads of each layer are ranked on their own
prompt, by the attention of its last queries that a streaming head would not see: what falls between the sinks and each
query's recent tokens. Training is not reproduced.

The authors fix the share of retrieval heads, and 64 to 128 sinks and 256 recent tokens for the others. Here the budget is
the mean over all heads, small ones too, and as many heads retrieve as fit into it: half of it is for streaming heads, the
other half pays for retrieval heads, and what is too little for one more makes the streaming heads longer. `recent_size`
fixes their length instead. Without a pattern retrieval heads are spread evenly over the layers.

Streaming heads slide while decoding, as the authors' do, and retrieval heads grow (`decode_budget=same`, the default);
without `decode_budget` nothing is evicted after the prompt. The authors' streaming heads do not see the middle of
the prompt while it is read either; here, as in kvpress, the prompt's attention is whole. A prompt within the budget is
kept whole: all its heads retrieve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvfactory import (
    DenseStore,
    EvictionMethod,
    LayerContext,
    SlidingStore,
    Store,
    at_least,
    hookimpl,
    reduce_groups,
    require,
)
from kvfactory.budget import Uniform
from kvfactory.budget_tables import fit_heads, read_head_table
from kvfactory.hookspecs import RegisterMethod

from .streamingllm import StreamingLLM

WINDOW = 32


@dataclass(frozen=True, kw_only=True)
class DuoAttention(EvictionMethod):
    """Retrieval heads keep everything, streaming heads `sink_size` first tokens and the most recent ones."""

    reads: ClassVar[str] = "the window's queries"

    sink_size: int = 4
    """First tokens, which streaming heads keep."""
    recent_size: int | None = None
    """Recent tokens that streaming heads keep; if not given, with the sinks half of the budget and what is left over."""
    head_patterns: str | None = None
    """File with a number for each head, large for those that retrieve; a head table in any of its forms."""
    window_size: int | None = None
    """The last queries, by whose attention heads are ranked without a pattern; 32 if not given."""
    decode_budget: int | Literal["same"] | None = "same"

    def __post_init__(self) -> None:
        at_least(self, sink_size=0, recent_size=1, window_size=1)
        require(
            self.window_size is None or self.head_patterns is None,
            f"--window_size {self.window_size}: heads are ranked by --head_patterns {self.head_patterns}; leave one out",
        )
        require(
            self.allocator == Uniform(),
            f"--allocator {self.allocator.name}: duoattention splits the budget itself, into heads that keep everything "
            "and heads that stream; leave it out",
        )
        require(
            self.decode_budget in (None, "same"),
            f"--decode_budget {self.decode_budget}: retrieval heads keep every token while decoding, so no number holds; "
            "give same, under which streaming heads slide, or none",
        )
        if self.head_patterns is not None:
            read_head_table(self.head_patterns, "--head_patterns")
        super().__post_init__()
        if isinstance(self.budget, int) and self.decode_budget and isinstance(self.decode_interval, int):
            most = self.streaming_entries() - self.sink_size
            require(
                self.decode_interval <= most,
                f"--decode_interval is {self.decode_interval}; streaming heads hold {most} tokens beside their sinks "
                f"at this budget, so it is {most} or less",
            )

    @property
    def whole_prompt(self) -> str | None:
        return "retrieval heads keep the whole prompt"

    def least_budget(self) -> int:
        return self.sink_size + (self.recent_size or 1)

    def score(self, layer: LayerContext) -> Tensor:
        """Among the tokens of a streaming head: the later, the better."""
        return layer.positions.float().expand(self.stored_heads(layer), -1)

    def select(self, layer: LayerContext) -> Tensor | list[Tensor]:
        assert isinstance(self.budget, int)
        tokens = torch.arange(layer.num_tokens, device=layer.keys.device)
        if layer.num_tokens <= self.budget:
            return tokens.expand(self.stored_heads(layer), -1)
        heads = self.stored_heads(layer) * layer.num_layers
        streaming = self.streaming_entries()
        retrieving = heads * (self.budget - streaming) // (layer.num_tokens - streaming)
        if self.recent_size is None:  # what is left over is theirs
            streaming = (heads * self.budget - retrieving * layer.num_tokens) // (heads - retrieving)
        short = torch.cat([tokens[: self.sink_size], tokens[layer.num_tokens - streaming + self.sink_size :]])
        kept = [tokens if retrieves else short for retrieves in self.retrieves(layer, retrieving).tolist()]
        return kept if len(set(map(len, kept))) > 1 else torch.stack(kept)

    def streaming_entries(self) -> int:
        """Entries of a streaming head, before what is left over."""
        assert isinstance(self.budget, int)
        recent = max(self.budget // 2 - self.sink_size, 1) if self.recent_size is None else self.recent_size
        return self.sink_size + recent

    def retrieves(self, layer: LayerContext, count: int) -> Tensor:
        """Which stored heads of a layer are retrieval heads, `count` in the whole model, bool [stored heads]."""
        heads, layers = self.stored_heads(layer), layer.num_layers
        if self.head_patterns is not None:
            table = read_head_table(self.head_patterns, "--head_patterns")
            alpha = fit_heads(table, heads, layers, "--head_patterns")
            return retrieval_heads(distinct(alpha), 1 - count / alpha.numel())[layer.layer_index]
        # so many by the end of this layer, less those of earlier ones: no layer's remainder is lost
        here = (layer.layer_index + 1) * count // layers - layer.layer_index * count // layers
        return retrieval_heads(distinct(self.missed(layer)), 1 - here / heads)

    def missed(self, layer: LayerContext) -> Tensor:
        """Attention of the window's queries that each stored head would lose if it streamed, [stored heads]."""
        window = min(self.window_size or WINDOW, layer.num_tokens)
        tokens = torch.arange(layer.num_tokens, device=layer.keys.device)
        recent = self.streaming_entries() - self.sink_size
        unseen = (tokens >= self.sink_size) & (tokens <= tokens[-window:, None] - recent)
        lost = (layer.window_attention(window) * unseen).sum(2).mean(1)
        return reduce_groups(lost, self.stored_heads(layer), "mean")

    def decoding_store(self, layer: LayerContext, kept: Tensor) -> Store:
        if kept.shape[1] == layer.num_tokens:
            return DenseStore(*self.gather(layer, kept))
        streaming = StreamingLLM(
            budget=kept.shape[1],
            sink_size=self.sink_size,
            merge=self.merge,
            decode_budget="same",
            decode_interval=self.decode_interval,
        )
        return SlidingStore(layer, kept, streaming)


def retrieval_heads(alpha: Tensor, sparsity: float) -> Tensor:
    """The authors' rule: a head retrieves if its gate is not below the quantile of all gates at `sparsity`; bool."""
    if sparsity <= 0 or sparsity >= 1:
        return torch.full(alpha.shape, sparsity <= 0, device=alpha.device)
    return alpha >= alpha.double().flatten().quantile(sparsity)


def distinct(alpha: Tensor) -> Tensor:
    """Numbers in the same order and no two alike, the earlier of equals the larger; the authors add a little noise."""
    places = alpha.flatten().argsort(descending=True, stable=True).argsort()
    return -places.view(alpha.shape).double()


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("duoattention", attention=DuoAttention)
