"""Hierarchical: tokens rise and fall between tiers of popularity, and the lowest tier is not read.

A token is popular if it is often among the `access_size` tokens that a query attends to most. Hits are counted in windows of
40 queries: 10 or more are what the top tier asks for (cache priority, level 3), 5 the next (normal, 2), 1 the next (low
popularity, 1), and what was never hit is for eviction (0). At a window's end a token moves by one level, up if it was hit
often enough and down if not. This is a course project's idea, after S3-FIFO's queues and multi-level feedback queues; there
is no paper, and slides leave much open. What they leave open is a setting here:

- `mode`: entries of level 0 are masked as the slides do (`mask`), let go (`drop`, the default), or entries of level 0 and 1
  move to the host (`offload`), where each step's query is compared with them, so that they are counted too and come back.
- `promotion`: `toward` moves a level towards that of the count and then rests; `literal` has it that who meets the demand of
  its level rises, so that a token of 5 hits swings between 2 and 3, and one at level 0, of which nothing is asked, rises.
- `popularity_scope`: hits are counted for each KV head by the mean attention of its group, or for a layer as a whole.
- `profile_prompt`: the last window of the prompt's queries is the first window. The slides count generated tokens alone
  (`false`); nothing is let go then before 40 of them are there, which most answers never reach.
- `initial_level` of the prompt's tokens; by default the first window sets it. New tokens start at `new_level` and are
  judged when they have lived for a window (`young=exempt`), or by their hits per query of their life (`scaled`).
- `ghost_windows`: what `drop` let go is held on the host for so many windows, and comes back at level 1 if a query would
  have hit it (S3-FIFO's ghost queue).
- `budget` is a cap on what a head may read: beyond it the lowest level goes first, of that the fewest hits, of those the
  oldest. None leaves the size to popularity alone. The first and the most recent tokens are always read.

Tokens that come together, such as a question behind its context, are judged together, by the last window of their queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from kvfactory import (
    HeadwiseStore,
    LayerContext,
    Share,
    Store,
    StoringMethod,
    at_least,
    hookimpl,
    reduce_groups,
    require,
)
from kvfactory.hookspecs import RegisterMethod
from kvfactory.indexing import largest
from kvfactory.tiers import TieredStore

TIERS = ("eviction", "low", "normal", "cache")  # names of the levels 0 to 3
LEVEL, HITS, AGE = range(3)  # columns of a record: an entry's level, hits in this window, windows it has been aside


@dataclass(frozen=True, kw_only=True)
class Hierarchical(StoringMethod):
    """Reads the tokens that are popular enough."""

    reads: ClassVar[str] = "the last 40 queries and each step's"
    aliases: ClassVar[dict[str, str]] = {"top_k": "access_size"}

    budget: int | Share | None = None
    """Entries that a head may read after a step; None: as many as are popular."""
    mode: Literal["mask", "drop", "offload"] = "drop"
    """What becomes of unpopular entries: held and not read, let go, or moved to the host until they are popular again."""
    access_size: int = 32
    """Tokens that a query hits: those that get most of its attention."""
    window_size: int = 40
    """Queries whose hits are counted before levels change."""
    thresholds: tuple[int, ...] = (10, 5, 1)
    """Hits in a window that the levels 3, 2 and 1 ask for."""
    promotion: Literal["toward", "literal"] = "toward"
    """Levels move towards that of the count, or up whenever their own demand is met."""
    popularity_scope: Literal["kv_head", "layer"] = "kv_head"
    """Whose hits are counted together."""
    gqa_score_agg: Literal["mean", "max", "sum"] = "mean"
    """How the attention of query heads that are counted together becomes one."""
    profile_prompt: bool = True
    """Whether the prompt's last queries are the first window."""
    initial_level: Literal[1, 2, 3] | None = None
    """Level of the prompt's tokens; the first window sets it if not given."""
    new_level: Literal[1, 2, 3] = 2
    """Level of new tokens."""
    young: Literal["exempt", "scaled"] = "exempt"
    """New tokens wait until they have lived for a window, or are judged by their hits per query."""
    offload_level: Literal[0, 1, 2] = 1
    """The highest level that `offload` moves to the host."""
    ghost_windows: int = 0
    """Windows for which `drop` can take back what it let go."""
    sink_size: int = 4
    """First tokens, always read."""
    recent_size: int = 8
    """Last tokens, always read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, access_size=1, window_size=1, sink_size=0, recent_size=1, ghost_windows=0)
        require(
            self.window_size <= 127, f"--window_size is {self.window_size}; hits are counted in a byte: 127 or less"
        )
        fitting = len(self.thresholds) == 3 and sorted(self.thresholds, reverse=True) == list(self.thresholds)
        require(
            fitting and self.thresholds[2] >= 0 and self.thresholds[0] <= 255,
            f"--thresholds {list(self.thresholds)}: it takes the hits that the levels 3, 2 and 1 ask for, such as 10+5+1",
        )
        require(
            self.mode == "offload" or self.offload_level == type(self).offload_level,
            f"--offload_level {self.offload_level}: mode {self.mode} moves nothing to the host; give --mode offload",
        )
        require(
            self.mode == "drop" or not self.ghost_windows,
            f"--ghost_windows {self.ghost_windows}: mode {self.mode} lets nothing go; give --mode drop",
        )
        for name in ("initial_level", "new_level"):
            level = getattr(self, name)
            require(
                level is None or level >= self.least_level,
                f"--{name} is {level}; mode {self.mode} reads levels from {self.least_level} on",
            )
        always = self.sink_size + self.recent_size
        require(
            not isinstance(self.budget, int) or self.budget > always,
            f"budget {self.budget} leaves hierarchical nothing to choose: it always keeps {always} tokens; "
            f"give --max_capacity_prompts more than {always}",
        )

    @property
    def memory(self) -> Literal["physical", "nominal"]:
        return "nominal" if self.mode == "mask" else "physical"

    @property
    def least_level(self) -> int:
        """The lowest level that is read."""
        return self.offload_level + 1 if self.mode == "offload" else 1

    @property
    def watches(self) -> bool:
        """Whether entries aside are compared with each query."""
        return self.mode != "mask"

    def for_prompt(self, tokens: int) -> Self:
        least = self.sink_size + self.recent_size + 1
        return replace(self, budget=max(self.budget.of(tokens), least)) if isinstance(self.budget, Share) else self

    def compress(self, layer: LayerContext) -> Store:
        method = self.for_prompt(layer.num_tokens)
        together = [layer] if self.popularity_scope == "layer" else list(layer.stored_heads(layer.kv_heads))
        hits = self.hits_of_prompt(layer, len(together))
        stores = [PopularityStore(*each, method) for each in zip(together, hits, strict=True)]
        return self.stored(stores[0] if len(stores) == 1 else HeadwiseStore(stores), layer)

    def hits_of_prompt(self, layer: LayerContext, rows: int) -> Tensor:
        """How often the prompt's last queries hit each token, uint8 [rows, tokens]; nothing where it is not profiled."""
        if not self.profile_prompt:
            return torch.zeros(rows, layer.num_tokens, dtype=torch.uint8, device=layer.keys.device)

        def count() -> Tensor:
            window = layer.window_attention(min(self.window_size, layer.num_tokens))
            return torch.stack([self.hits(part) for part in window.split(len(window) // rows)])

        return layer.shared(("hits", self.window_size, self.access_size, self.gqa_score_agg, rows), count)

    def hits(self, attention: Tensor) -> Tensor:
        """How often the last window of queries, attention [query_heads, queries, length], hit each entry, uint8 [length]."""
        weights = reduce_groups(attention, 1, self.gqa_score_agg)[0, -self.window_size :]
        return (largest(weights, self.access_size) & (weights > 0)).sum(0, dtype=torch.uint8)

    def hits_aside(self, attention: Tensor, aside: Tensor) -> Tensor:
        """The same for entries that were not read, had they been, by the attention that each would have got."""
        read, unread = (
            reduce_groups(each, 1, self.gqa_score_agg)[0, -self.window_size :] for each in (attention, aside)
        )
        bound = read.topk(min(self.access_size, read.shape[-1])).values[:, -1:]
        return (unread > bound.to(unread.device)).sum(0, dtype=torch.uint8)

    def judged(self, records: Tensor, life: Tensor, unset: Tensor) -> Tensor:
        """Levels after a window, uint8 [length], of entries with these records which have lived for `life` [length] queries.

        `unset` [length], bool, are those whose level this window sets.
        """
        levels, hits = records[:, LEVEL], records[:, HITS]
        if self.young == "scaled":
            hits = hits * self.window_size / life.clamp(1, self.window_size)
        after = moved_level(levels, hits, self.thresholds, self.promotion)
        after = torch.where(unset, implied_level(hits, self.thresholds), after)
        return after if self.young == "scaled" else torch.where(life < self.window_size, levels, after)

    def row_fields(self, stores: list[Store]) -> dict[str, Any]:
        """Tiers over time, what moved between places, and what is where now."""
        held = popularity_stores(stores)
        windows = zip(*(each.history for each in held), strict=True)
        return {
            "tiers": [
                {"new_tokens": first["new_tokens"]}
                | {
                    name: round(fmean(each[name] for each in (first, *rest)), 2)
                    for name in (*TIERS, "gone", "readable")
                }
                for first, *rest in windows
            ],
            "tier_bytes": {tier: sum(each.sizes()[tier] * each.entry_bytes() for each in held) for tier in TIERS},
            "moves": {name: sum(getattr(each.moves, name) for each in held) for name in vars(held[0].moves)},
            "host_bytes": sum(each.aside.nbytes() for each in held) if self.watches else 0,
        }


class PopularityStore(TieredStore):
    """Counts hits of entries, and moves them between tiers."""

    def __init__(self, layer: LayerContext, hits: Tensor, method: Hierarchical) -> None:
        """Starts from a prompt's layer, all of it or one head, and the hits [tokens] that are known of its tokens."""
        level = torch.full_like(hits, method.new_level if method.initial_level is None else method.initial_level)
        records = torch.stack([level, hits, torch.zeros_like(hits)], 1)
        assert not isinstance(method.budget, Share)
        self._cap = method.budget
        limit = None if self._cap is None else self._cap + 1
        super().__init__(layer.keys, layer.values, records, on_host=method.mode != "mask", limit=limit)
        self._method = method
        self._prompt = layer.num_tokens
        self._queries = 0  # of the window that is being counted
        self._unset = method.initial_level is None  # whether levels of the prompt's tokens are
        self.history: tuple[dict[str, int], ...] = ()
        if method.profile_prompt:
            self._end_window()
        self._obey_budget()
        self._note_window()

    def observe(self, weights: Tensor | list[Tensor] | None) -> None:
        assert isinstance(weights, Tensor)
        new = self._length - len(self.records)
        start = self.records.new_tensor([self._method.new_level, 0, 0]).expand(new, -1)
        self.records = torch.cat([self.records, start])
        before = bool(self._queries)  # hits of a window that has ended were kept for who looks at them
        self.records = with_column(self.records, HITS, self.records[:, HITS] * before + self._method.hits(weights))
        if len(self.aside):
            hits = self._method.hits_aside(weights, self.weights_aside(weights)) if self._method.watches else 0
            aside = self.aside.records
            self.aside = replace(self.aside, records=with_column(aside, HITS, aside[:, HITS] * before + hits))
        self._queries += weights.shape[1]
        ends = self._queries >= self._method.window_size
        if ends:
            self._end_window()
        self._obey_budget()
        if ends:
            self._note_window()
        super().observe(weights)

    def _end_window(self) -> None:
        """Levels change, and entries go where theirs belong."""
        method, positions = self._method, self.entry_positions()
        seen = int(positions[-1]) + 1
        levels = method.judged(self.records, seen - positions, (positions < self._prompt) & self._unset)
        levels = torch.where(positions < method.sink_size, 3, levels)
        self.records = with_column(self.records, LEVEL, levels)
        aside, none = self.aside.records, self.aside.positions < 0
        levels = method.judged(aside, seen - self.aside.positions, none)
        aside = with_column(with_column(aside, LEVEL, levels), AGE, aside[:, AGE].clamp(max=254) + 1)
        self.aside = replace(self.aside, records=aside)
        self._unset, self._queries = False, 0
        wanted = levels >= method.least_level
        if method.watches:  # the literal rule raises who was not asked for, too
            wanted &= aside[:, HITS] > 0
        self.take_back(wanted)
        if method.mode == "drop":
            self.let_go_aside(self.aside.records[:, AGE] >= method.ghost_windows)
        self._put_away((self.records[:, LEVEL] < method.least_level) & self._open())

    def _open(self) -> Tensor:
        """Which entries may be put away: not the first, not the last, bool [length]."""
        open_ = self.entry_positions() >= self._method.sink_size
        open_[-self._method.recent_size :] = False
        return open_

    def _put_away(self, chosen: Tensor) -> None:
        if self._method.mode == "drop" and not self._method.ghost_windows:
            self.let_go(chosen)
        else:
            self.records = with_column(self.records, AGE, 0)
            self.set_aside(chosen)

    def _obey_budget(self) -> None:
        """Put away what is more than the cap: the lowest level first, of that the fewest hits, of those the oldest."""
        if self._cap is None or self._length <= self._cap:
            return
        rank = torch.where(self._open(), self.records[:, LEVEL].int() * 256 + self.records[:, HITS], 1024)
        worst = torch.zeros(len(rank), dtype=torch.bool, device=rank.device)
        worst[rank.argsort(stable=True)[: self._length - self._cap]] = True
        self.records = with_column(self.records, LEVEL, self.records[:, LEVEL] * ~worst)
        self._put_away(worst)

    def sizes(self) -> dict[str, int]:
        """Entries held in each tier, those aside among them."""
        levels = torch.cat([self.records[:, LEVEL], self.aside.records[:, LEVEL].to(self.records.device)])
        return dict(zip(TIERS, levels.bincount(minlength=len(TIERS)).tolist(), strict=True))

    def _note_window(self) -> None:
        seen = int(self.entry_positions()[-1]) + 1
        now = {"new_tokens": seen - self._prompt, **self.sizes(), "gone": self.moves.gone, "readable": self._length}
        self.history = (*self.history, now)


def implied_level(hits: Tensor, thresholds: Sequence[int]) -> Tensor:
    """The level that a number of hits is enough for, uint8, where thresholds are those of the levels 3, 2 and 1."""
    return (hits[..., None] >= torch.tensor(thresholds, device=hits.device)).sum(-1).byte()


def moved_level(levels: Tensor, hits: Tensor, thresholds: Sequence[int], promotion: str) -> Tensor:
    """Levels after a window with so many hits, each one step from where it was at most; uint8."""
    levels = levels.int()
    if promotion == "toward":
        return (levels + (implied_level(hits, thresholds).int() - levels).sign()).byte()
    demand = torch.tensor([0, *reversed(thresholds)], device=hits.device)[levels]
    return torch.where(hits < demand, levels - 1, levels + 1).clamp(0, 3).byte()


def with_column(records: Tensor, column: int, values: Tensor | int) -> Tensor:
    """Records with other values [length] in a column; the given ones stay as they are, for a fork may share them."""
    records = records.clone()
    records[:, column] = values
    return records


def popularity_stores(stores: Sequence[Store]) -> list[PopularityStore]:
    """Those that count, of a sequence's stores: one a head, or one a layer."""
    return [holder for store in stores for holder in store.holders() if isinstance(holder, PopularityStore)]


@hookimpl
def kvfactory_register_methods(register: RegisterMethod) -> None:
    register("hierarchical", attention=Hierarchical)
