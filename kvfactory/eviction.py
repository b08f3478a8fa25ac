"""Methods that evict: a plugin writes a score, and everything else is here."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from inspect import getattr_static
from types import FunctionType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from .budget import BudgetAllocator, Share, Uniform
from .context import LayerContext
from .decoding import BoundedStore
from .errors import UserError, require
from .merge import Merge
from .method import StoringMethod
from .ragged import HeadwiseStore, RaggedStore
from .stores import DenseStore, Store, spread


@dataclass(frozen=True, kw_only=True)
class EvictionMethod(StoringMethod):
    """Keeps the tokens that score best, beside those it protects: at the end of prefill, and on request while decoding.

    A subclass writes `score`, and `protected` if some tokens are always kept. Every allocator and every merge works with
    every score.
    """

    signed_scores: ClassVar[bool] = False
    """True where scores may be below 0: parts that take scores for weights are then refused."""

    budget: int | Share
    """KV entries kept per stored head and layer after prefill, protected ones included."""
    kv_cache_granularity: Literal["kv_head", "query_head"] = "kv_head"
    """Entries are chosen and stored once per KV head, or once per query head (as published figures often are)."""
    allocator: BudgetAllocator = field(default_factory=Uniform)
    merge: Merge | None = None
    decode_budget: int | Literal["same"] | None = None
    """Entries a head holds while decoding: a number, `same` as after the prompt, or none: nothing is evicted then."""
    decode_interval: int | Share = 1
    """Entries that an eviction while decoding frees, which come one a step; or a percentage of those held."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.least_budget()
        if isinstance(self.budget, int) and self.budget < least:
            raise UserError(
                f"budget {self.budget} leaves {type(self).__name__} nothing to choose: "
                f"it always keeps {least - 1} tokens; give --max_capacity_prompts more than {least - 1}"
            )
        for part in self.parts():
            require(
                not (part.weighs_scores and self.signed_scores),
                f"{part.name} takes scores for weights, and those of {type(self).__name__} may be below 0; "
                "choose another, or a setting of it that does not weigh",
            )
        self._check_decode_settings(least)

    def _check_decode_settings(self, least: int) -> None:
        interval = self.decode_interval
        if self.decode_budget is None:
            require(
                interval == self._usual_interval(),
                f"--decode_interval {interval}: nothing is evicted while decoding without --decode_budget; give one",
            )
            return
        require(
            not (self.merge and self.merge.prompt_only),
            f"--merge {self.merge and self.merge.name} as it is set is for the end of a prompt alone; "
            "leave --decode_budget out or set it otherwise",
        )
        require(isinstance(interval, Share) or interval >= 1, f"--decode_interval is {interval}; it is 1 step or more")
        held = self.budget if self.decode_budget == "same" else self.decode_budget
        if isinstance(held, int):
            needed = least + (interval - 1 if isinstance(interval, int) else 0)
            require(
                held >= needed,
                f"--decode_budget {held} leaves {type(self).__name__} nothing to choose while decoding; it takes {needed} "
                f"or more where each eviction frees {interval} entries and {least - 1} are always kept",
            )

    @abstractmethod
    def score(self, layer: LayerContext) -> Tensor:
        """Scores [stored heads or kv_heads, tokens], float32, higher is kept; protected tokens' do not matter.

        Must not depend on `budget`, `allocator` or `merge`: a sweep scores once for all of them. While decoding it is
        asked again, of a layer that holds what is still stored and the latest `recent_queries` queries.
        """

    @property
    def whole_prompt(self) -> str | None:
        return (
            f"its merge, {self.merge.name}, is for the end of a prompt"
            if self.merge and self.merge.prompt_only
            else None
        )

    @property
    def recent_queries(self) -> int:
        """How many of the latest queries `score` looks at while decoding."""
        return 0

    def protected(self) -> tuple[int, int]:
        """How many of the first and of the last tokens are always kept."""
        return 0, 0

    def least_budget(self) -> int:
        """The smallest budget that leaves something to choose; a share of a short prompt is raised to it."""
        return sum(self.protected()) + 1

    def compress(self, layer: LayerContext) -> Store:
        method = self.for_prompt(layer.num_tokens)
        return self.stored(method.store(layer, method.select(layer)), layer)

    def for_prompt(self, tokens: int) -> Self:
        """This method with its budget in entries."""
        if isinstance(self.budget, int):
            return self
        return replace(self, budget=max(self.budget.of(tokens), self.least_budget()))

    def select(self, layer: LayerContext) -> Tensor | list[Tensor]:
        """The index of what to keep, ascending: [stored heads, count], or a list where heads keep different numbers."""
        assert isinstance(self.budget, int)
        tokens = torch.arange(layer.num_tokens, device=layer.keys.device)
        if layer.num_tokens + layer.evicted_before <= self.budget:
            return tokens.expand(self.stored_heads(layer), -1)
        first, last = self.protected()
        stop = layer.num_tokens - last
        competing = self.shared_scores(layer)[:, first:stop]
        if layer.evicted_before:  # what is gone counts as worth as little as anything
            competing = pad(competing, (0, layer.evicted_before), value=float(competing.min()))
        counts = self.allocator.counts(
            competing,
            budget=self.budget,
            protected=first + last,
            layer_index=layer.layer_index,
            num_layers=layer.num_layers,
        )
        counts = [min(count, stop - first) for count in counts]
        chosen = self.choose(layer, counts)
        if isinstance(chosen, list) and len(set(counts)) == 1:
            chosen = torch.stack(chosen)
        if isinstance(chosen, Tensor):
            ends = tokens[:first].expand(len(chosen), -1), tokens[stop:].expand(len(chosen), -1)
            return torch.cat([ends[0], chosen.sort(-1).values, ends[1]], 1)
        return [torch.cat([tokens[:first], head.sort().values, tokens[stop:]]) for head in chosen]

    def choose(self, layer: LayerContext, counts: list[int]) -> Tensor | list[Tensor]:
        """The best tokens that are not protected, `counts` of them in each stored head, in any order.

        [stored heads, count], or a list where counts differ.
        """
        first, last = self.protected()

        def rank() -> Tensor:
            competing = self.shared_scores(layer)[:, first : layer.num_tokens - last]
            return competing.argsort(dim=-1, descending=True, stable=True) + first

        ranked = layer.shared(("ranked", self._score_key, first, last), rank)
        if len(set(counts)) == 1:
            return ranked[:, : counts[0]]
        return [head[:count] for head, count in zip(ranked, counts, strict=True)]

    def store(self, layer: LayerContext, kept: Tensor | list[Tensor]) -> Store:
        """The store of what `select` chose."""
        if isinstance(kept, list) and self.acts_while_decoding:
            heads = layer.stored_heads(len(kept))
            return HeadwiseStore([self.store(head, index[None]) for head, index in zip(heads, kept, strict=True)])
        if isinstance(kept, list):
            heads = layer.stored_heads(len(kept))
            parts = [(head, index[None]) for head, index in zip(heads, kept, strict=True)]
            held = [self.gather(*part) for part in parts]
            positions = [head.true_positions(index)[0].int() for head, index in parts]
            return RaggedStore([k[0] for k, _ in held], [v[0] for _, v in held], positions)
        if self.acts_while_decoding:
            return self.decoding_store(layer, kept)
        return DenseStore(*self.gather(layer, kept), layer.true_positions(kept).int())

    @property
    def acts_while_decoding(self) -> bool:
        """Whether stores are `decoding_store`'s."""
        return self.decode_budget is not None

    def decoding_store(self, layer: LayerContext, kept: Tensor) -> Store:
        """A store that goes on evicting while decoding; kept is [stored heads, count]."""
        return BoundedStore(layer, kept, self)

    def open_store(self, layer: LayerContext, kept: Tensor) -> BoundedStore:
        """A store that holds what comes until it is told what to keep, and shows itself as a layer to score."""
        return BoundedStore(layer, kept, self._for_prompts_alone())

    def _for_prompts_alone(self) -> Self:
        """This method as it is when nothing is evicted while decoding."""
        return replace(self, decode_budget=None, decode_interval=self._usual_interval())

    def gather(self, layer: LayerContext, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [stored heads, count, head_dim] of the kept positions, with what others leave in them."""
        if self.merge is None or kept.shape[1] in (0, layer.num_tokens):  # nothing goes, or nothing stays to take it
            return layer.gather(kept)
        heads = len(kept)
        return self.merge.merge(spread(layer.keys, heads), spread(layer.values, heads), kept, self.shared_scores(layer))

    def stored_heads(self, layer: LayerContext) -> int:
        return layer.kv_heads if self.kv_cache_granularity == "kv_head" else layer.query_heads

    def shared_scores(self, layer: LayerContext) -> Tensor:
        """`score`, computed once for all methods of a sweep that share it: [stored heads, tokens], float32."""
        return layer.shared(self._score_key, lambda: spread(self.score(layer), self.stored_heads(layer)))

    @cached_property
    def _score_key(self) -> tuple[Any, ...]:
        apart = {"budget", "allocator", "merge", "decode_budget", "decode_interval"}
        apart |= {each.name for each in fields(StoringMethod)}
        return _behaviour(type(self)), *(getattr(self, each.name) for each in fields(self) if each.name not in apart)

    def capacity(self, tokens: int, kept: int) -> int | None:
        """Entries that a head may hold while decoding which kept so many of a prompt's tokens; None: any number."""
        assert isinstance(self.budget, int)
        if self.decode_budget is None:
            return None
        held = kept if tokens > self.budget else self.budget
        if isinstance(self.decode_budget, int):
            held = round(self.decode_budget * held / self.budget)
        return max(held, self.least_budget())

    def after_eviction(self, capacity: int) -> int:
        """Entries that an eviction while decoding leaves to a head of this capacity."""
        interval = self.decode_interval
        freed = interval.of(capacity) if isinstance(interval, Share) else interval
        return max(capacity - max(freed, 1) + 1, self.least_budget())

    def down_to(self, budget: int) -> Self:
        """The method as it chooses while decoding: so many entries in each head."""
        return replace(self._for_prompts_alone(), budget=budget, allocator=Uniform())

    @classmethod
    def _usual_interval(cls) -> Any:
        return next(each.default for each in fields(cls) if each.name == "decode_interval")


@cache
def _behaviour(cls: type) -> tuple[Any, ...]:
    """All functions and properties of a class: methods with the same ones score alike, whatever they are called."""
    found = (getattr_static(cls, name) for name in dir(cls) if not name.startswith("__"))
    return tuple(each for each in found if isinstance(each, (FunctionType, property)))
