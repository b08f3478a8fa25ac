"""Popularity tiers, against a slow simulation that keeps a dictionary for each entry."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvfactory_plugins.hierarchical import TIERS, Hierarchical, PopularityStore, popularity_stores
from test_golden_methods import Golden
from torch import Tensor

from kvfactory import Engine, LayerContext, UserError, load_method
from kvfactory.kernels import KERNELS, decode_attention
from kvfactory.method import Method
from kvfactory.testing import MethodContract, tiny_model, tiny_prompts

DIM = 8


class HierarchicalContract(MethodContract):
    """Given room for all, nobody is unpopular either: the rules ask then for the stock model's tokens."""

    decode_budget = 16
    settings: ClassVar[dict[str, Any]] = {}

    def make(self, budget: int, **more: Any) -> Method:
        rule = {"thresholds": "0+0+0"} if budget >= 500 else {"thresholds": "4+2+1", "access_size": 6}
        return load_method("hierarchical", budget=budget, recent_size=2, window_size=5, **rule, **self.settings, **more)


class TestHierarchicalDropped(HierarchicalContract):
    pass


class TestHierarchicalMasked(HierarchicalContract):
    decode_budget = None  # what is masked is held, and grows
    settings: ClassVar = {"mode": "mask"}


class TestHierarchicalOffloaded(HierarchicalContract):
    decode_budget = None
    settings: ClassVar = {"mode": "offload", "promotion": "literal"}


class TestHierarchicalGhosts(HierarchicalContract):
    decode_budget = None
    settings: ClassVar = {"ghost_windows": 1}


class TestHierarchicalByLayer(HierarchicalContract):
    settings: ClassVar = {"popularity_scope": "layer", "young": "scaled"}


class TestHierarchicalUnprofiled(HierarchicalContract):
    settings: ClassVar = {"profile_prompt": False}


class TestHierarchicalInFewBits(HierarchicalContract):
    settings: ClassVar = {"quant_method": "kivi", "q_group_size": 8, "nbits": 8}

    def make(self, budget: int, **more: Any) -> Method:
        # where there is room for all, nothing leaves the window, or levels would not be the model's numbers
        return super().make(budget, quant_residual_length=500 if budget >= 500 else 8, **more)


@dataclass
class Entry:
    """What is known of a token."""

    key: Tensor
    value: Tensor
    level: int
    hits: int = 0
    age: int = 0
    aside: bool = False


@dataclass
class Simulation:
    """One head by the book, token by token."""

    method: Hierarchical
    entries: dict[int, Entry] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    seen: int = 0
    prompt_tokens: int = 0
    queries: int = 0
    judged_before: bool = False
    just_ended: bool = False

    def prompt(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """q [group, tokens, dim], k and v [tokens, dim]."""
        method, n = self.method, len(k)
        level = method.new_level if method.initial_level is None else method.initial_level
        self.entries = {at: Entry(k[at], v[at], level) for at in range(n)}
        self.seen = self.prompt_tokens = n
        if method.profile_prompt:
            for at in range(max(n - method.window_size, 0), n):
                self.hit(q[:, at], {each: self.entries[each] for each in range(at + 1)})
            self.end_window()
        self.obey_budget()

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [group, dim], k and v [dim]; gives the attention's output [group, dim]."""
        if self.just_ended:
            for entry in self.entries.values():
                entry.hits = 0
            self.just_ended = False
        self.entries[self.seen] = Entry(k, v, self.method.new_level)
        self.seen += 1
        read = {at: entry for at, entry in self.entries.items() if not entry.aside}
        weights = self.hit(q, read)
        output = weights @ torch.stack([entry.value for entry in read.values()])
        self.queries += 1
        if self.queries == self.method.window_size:
            self.end_window()
        self.obey_budget()
        return output

    def hit(self, q: Tensor, read: dict[int, Entry]) -> Tensor:
        method = self.method
        logits = q @ torch.stack([entry.key for entry in read.values()]).T / math.sqrt(DIM)
        weights = logits.softmax(-1)
        one = {"mean": weights.mean(0), "max": weights.amax(0), "sum": weights.sum(0)}[method.gqa_score_agg]
        order = sorted(range(len(read)), key=lambda each: -one[each])[: method.access_size]
        for rank in order:
            list(read.values())[rank].hits += 1
        if method.mode != "mask":
            for entry in (entry for entry in self.entries.values() if entry.aside):
                own = ((q @ entry.key / math.sqrt(DIM)) - logits.logsumexp(-1)).exp()
                would_be = {"mean": own.mean(), "max": own.max(), "sum": own.sum()}[method.gqa_score_agg]
                entry.hits += int(would_be > one[order[-1]])
        return weights

    def end_window(self) -> None:
        method, least = self.method, self.method.offload_level + 1 if self.method.mode == "offload" else 1
        for at, entry in self.entries.items():
            life = self.seen - at
            hits = float(entry.hits)
            if method.young == "scaled" and life < method.window_size:
                hits = hits * method.window_size / life
            elif life < method.window_size:
                continue
            target = sum(hits >= each for each in method.thresholds)
            demand = [0, *reversed(method.thresholds)][entry.level]
            if not self.judged_before and method.initial_level is None and at < self.prompt_tokens and not entry.aside:
                entry.level = target
            elif method.promotion == "toward":
                entry.level += (target > entry.level) - (target < entry.level)
            else:
                entry.level = min(max(entry.level + (1 if hits >= demand else -1), 0), 3)
        for at in range(method.sink_size):
            self.entries[at].level = 3
        for at, entry in list(self.entries.items()):
            if not entry.aside:
                continue
            entry.age += 1
            if entry.level >= least and (entry.hits or method.mode == "mask"):
                entry.aside, entry.age = False, entry.age
            elif method.mode == "drop" and entry.age >= method.ghost_windows:
                self.gone.add(at)
                del self.entries[at]
        for at in self.open():
            if self.entries[at].level < least:
                self.put_away(at)
        self.queries, self.judged_before, self.just_ended = 0, True, True

    def open(self) -> list[int]:
        read = [at for at, entry in self.entries.items() if not entry.aside]
        return [at for at in sorted(read)[: -self.method.recent_size] if at >= self.method.sink_size]

    def put_away(self, at: int) -> None:
        if self.method.mode == "drop" and not self.method.ghost_windows:
            self.gone.add(at)
            del self.entries[at]
        else:
            self.entries[at].aside, self.entries[at].age = True, 0

    def obey_budget(self) -> None:
        assert not isinstance(self.method.budget, str)
        while self.method.budget is not None and len(self.read()) > self.method.budget:
            worst = min(self.open(), key=lambda at: (self.entries[at].level, self.entries[at].hits, at))
            self.entries[worst].level = 0
            self.put_away(worst)

    def read(self) -> list[int]:
        return sorted(at for at, entry in self.entries.items() if not entry.aside)


def make(**chosen: Any) -> Hierarchical:
    small = {"window_size": 5, "access_size": 4, "thresholds": (4, 2, 1), "sink_size": 1, "recent_size": 2}
    method = load_method("hierarchical", **(small | chosen))
    assert isinstance(method, Hierarchical)
    return method


def numbers(seed: int, tokens: int, group: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q [group, tokens, dim], k and v [1, tokens, dim]; a few directions, so that tokens become popular and fall again."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(heads, tokens, DIM, generator=generator) for heads in (group, 1, 1))
    topics = torch.randn(4, DIM, generator=generator)
    of_query = (torch.arange(tokens) // 7) % 4
    return 2 * q + 6 * topics[of_query], k + 1.5 * topics[torch.randint(0, 4, (tokens,), generator=generator)], v


def run(store: PopularityStore, q: Tensor, k: Tensor, v: Tensor, start: int, tokens: int = 1) -> Tensor:
    """One pass over tokens from a position on, as the cache does it; gives the output [group, tokens, dim]."""
    at = slice(start, start + tokens)
    store.append(k[:, at], v[:, at], start)
    output, weights = decode_attention(KERNELS["eager"], q[:, at], store.read(q[:, at]), start, None, True)
    store.observe(weights[0])
    return output


def held(store: PopularityStore) -> dict[int, tuple[int, int, bool]]:
    """Level, hits, and whether it is aside, of each entry by its position."""
    parts = ((store.entry_positions(), store.records, False), (store.aside.positions, store.aside.records, True))
    return {
        at: (record[0], record[1], aside)
        for positions, records, aside in parts
        for at, record in zip(positions.tolist(), records.tolist(), strict=True)
    }


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    prompt=st.integers(8, 30),
    chosen=st.fixed_dictionaries(
        {
            "promotion": st.sampled_from(["toward", "literal"]),
            "profile_prompt": st.booleans(),
            "young": st.sampled_from(["exempt", "scaled"]),
            "gqa_score_agg": st.sampled_from(["mean", "max", "sum"]),
            "budget": st.sampled_from([None, 8, 14]),
        }
    ),
    place=st.sampled_from(
        [
            {"mode": "mask"},
            {"mode": "drop"},
            {"mode": "drop", "ghost_windows": 1},
            {"mode": "drop", "ghost_windows": 3},
            {"mode": "offload", "offload_level": 0},
            {"mode": "offload"},
            {"mode": "offload", "offload_level": 2, "new_level": 3},
            {"mode": "drop", "initial_level": 1, "new_level": 1},
        ]
    ),
)
def test_a_head_is_what_the_simulation_is(
    seed: int, prompt: int, chosen: dict[str, Any], place: dict[str, Any]
) -> None:
    method = make(**chosen, **place)
    q, k, v = numbers(seed, prompt + 24)
    slow = Simulation(method)
    slow.prompt(q[:, :prompt], k[0, :prompt], v[0, :prompt])
    layer = LayerContext(0, 1, q[:, :prompt], k[:, :prompt], v[:, :prompt])
    store = method.compress(layer).fork()
    (store,) = popularity_stores([store])
    for at in range(prompt, prompt + 24):
        assert held(store) == {each: (e.level, e.hits, e.aside) for each, e in slow.entries.items()}
        assert store.entry_positions().tolist() == slow.read()
        assert store.moves.gone == len(slow.gone)
        torch.testing.assert_close(
            run(store, q, k, v, at)[:, 0], slow.step(q[:, at], k[0, at], v[0, at]), rtol=1e-4, atol=1e-4
        )
    keys = torch.cat([store.keys()[0], store.aside.keys[0]])
    positions = torch.cat([store.entry_positions(), store.aside.positions])
    assert torch.equal(keys, k[0, positions]), "what moved is what it was"


def test_counts_and_levels_of_the_specification(shared: Path) -> None:
    golden = Golden(shared, "popularity_tiers__spec_counts_levels")
    for promotion, out in (("toward", "out_level_toward_target"), ("literal", "out_level_literal")):
        method = load_method("hierarchical", access_size=golden.params["top_k"], promotion=promotion)
        assert isinstance(method, Hierarchical)
        assert method.window_size == golden.params["window"]
        assert list(method.thresholds) == golden.params["thresholds"]
        records = torch.zeros(60, 3, dtype=torch.uint8)
        for number, attention in enumerate(golden["in_attn"]):
            records[:, 1] = method.hits(attention[None])
            assert torch.equal(records[:, 1].int(), golden["out_counts"][number])
            records[:, 0] = method.judged(records, torch.full((60,), 1000), torch.tensor(number == 0))
            assert torch.equal(records[:, 0].int(), golden[out][number])


def scripted(method: Hierarchical, prompt: int = 8) -> PopularityStore:
    """A store of one head whose attention a test makes up."""
    zeros = torch.zeros(1, prompt, DIM)
    (store,) = popularity_stores([method.compress(LayerContext(0, 1, zeros, zeros, zeros))])
    return store


def attend(store: PopularityStore, *popular: int) -> None:
    """One step whose query attends to these positions, and to nothing else that is read."""
    at = max(held(store)) + 1
    zero = torch.zeros(1, 1, DIM)
    store.append(zero, zero, at)
    store.read(zero)
    weights = torch.isin(store.entry_positions(), torch.tensor(popular)).float()
    store.observe(weights.expand(1, 1, -1) / max(len(popular), 1))


def test_counts_levels_and_moves_of_a_script() -> None:
    """Windows of 5 over 8 prompt tokens: token 2 is hit always, 3 twice, 4 once, others never."""
    store = scripted(make(profile_prompt=False, mode="drop"))
    for step in range(4):
        attend(store, *(each for each, least in ((2, 4), (3, 1), (4, 0)) if step <= least))
    assert {at: held(store)[at][:2] for at in range(8)} == {
        each: (2, hits) for each, hits in enumerate([0, 0, 4, 2, 1, 0, 0, 0])
    }, "levels wait for the window's end"
    attend(store, 2)
    levels = {at: level for at, (level, _, _) in held(store).items()}
    assert levels == {0: 3, 2: 3, 3: 2, 4: 1, 8: 1, 9: 2, 10: 2, 11: 2, 12: 2}, "a sink stays, who was never hit goes"
    for _ in range(5):
        attend(store, 3)
    levels = {at: level for at, (level, _, _) in held(store).items()}
    assert {at: levels[at] for at in (0, 2, 3)} == {0: 3, 2: 2, 3: 3}, "by one level a window, up and down"
    assert 4 not in levels and 8 not in levels
    assert (levels[13], levels[14]) == (1, 2), "new tokens are judged when they have lived for a window"
    assert store.history[-1] == {
        "new_tokens": 10,
        "eviction": 0,
        "low": 5,
        "normal": 5,
        "cache": 2,
        "gone": 6,
        "readable": 12,
    }


def test_five_hits_of_forty_swing_by_the_literal_rule() -> None:
    method = make(thresholds=(10, 5, 1), window_size=40, promotion="literal")
    records = torch.tensor([[2, 5, 0]], dtype=torch.uint8)
    life, levels = torch.tensor([100]), []
    for _ in range(4):
        records[:, 0] = method.judged(records, life, torch.tensor(False))
        levels.append(int(records[0, 0]))
    assert levels == [3, 2, 3, 2]


def test_what_is_masked_is_held_and_never_hit() -> None:
    store = scripted(make(mode="mask", profile_prompt=False))
    for _ in range(5):
        attend(store, 2)
    masked = {at for at, (_, _, aside) in held(store).items() if aside}
    assert masked == {1, 3, 4, 5, 6, 7}
    assert store.lengths() == [13 - len(masked)]
    for _ in range(12):
        attend(store, 2, 3)
    assert held(store)[3] == (0, 0, True)
    assert store.aside.keys.shape[1] >= len(masked), "the bytes are still there"


def test_a_masked_token_comes_back_after_a_window_by_the_literal_rule() -> None:
    store = scripted(make(mode="mask", profile_prompt=False, promotion="literal", initial_level=2))
    for _ in range(5):
        attend(store, 2)
    assert held(store)[3] == (1, 0, False), "level 2 asks for 2 hits, so it fell by one"
    aside = []
    for _ in range(3):
        for _ in range(5):
            attend(store, 2)
        aside.append(held(store)[3][2])
    assert aside == [True, False, True]


def test_the_host_gives_back_what_becomes_popular() -> None:
    """Queries look along the second channel, then along the first, where the keys of tokens 2 to 4 point."""
    q, k, v = torch.zeros(1, 40, DIM), torch.zeros(1, 40, DIM), torch.randn(1, 40, DIM)
    k[0, :, 1] = 3.0
    k[0, 2:5] = torch.eye(DIM)[0] * 9
    q[0, :, 1], q[0, 22:, 0], q[0, 22:, 1] = 9.0, 9.0, 0.0
    method = make(mode="offload", window_size=5, access_size=3)
    layer = LayerContext(0, 1, q[:, :12], k[:, :12], v[:, :12])
    (store,) = popularity_stores([method.compress(layer)])
    entry = 2 * DIM * 4
    for at in range(12, 22):
        run(store, q, k, v, at)
    assert {at for at in (2, 3, 4) if held(store)[at][2]} == {2, 3, 4}
    out = store.moves.out
    assert store.moves.bytes_out == out * entry
    assert store.moves.back == 0
    for at in range(22, 27):
        run(store, q, k, v, at)
    assert [held(store)[at] for at in (2, 3, 4)] == [(1, 5, True)] * 3, "popular, and risen from 0 to 1"
    for at in range(27, 32):
        run(store, q, k, v, at)
    assert [held(store)[at][2] for at in (2, 3, 4)] == [False] * 3
    assert store.moves.back == 3
    assert store.moves.bytes_back == 3 * entry
    assert store.entry_positions().tolist() == sorted(store.entry_positions().tolist())
    fields = method.row_fields([store])
    assert fields["host_bytes"] == store.aside.nbytes() > 0
    assert fields["moves"] == vars(store.moves)
    assert sum(fields["tier_bytes"].values()) == entry * len(held(store))
    assert [each["new_tokens"] for each in fields["tiers"]] == [0, 5, 10, 15, 20]


def test_the_cap_takes_the_lowest_level_then_the_fewest_hits_then_the_oldest() -> None:
    method = make(budget=6, profile_prompt=False, access_size=8)
    store = scripted(method, prompt=6)
    store.records = torch.tensor([[3, 0], [1, 2], [1, 1], [1, 1], [2, 0], [2, 0]], dtype=torch.uint8)
    store.records = torch.cat([store.records, torch.zeros(6, 1, dtype=torch.uint8)], 1)
    store._queries = 1
    left = []
    for _ in range(3):
        attend(store, *range(100))
        left.append(store.entry_positions().tolist())
    assert left == [[0, 1, 3, 4, 5, 6], [0, 1, 4, 5, 6, 7], [0, 4, 5, 6, 7, 8]]


def test_a_question_behind_its_context_is_judged_together() -> None:
    q, k, v = numbers(3, 60)
    method = make(mode="drop")
    (store,) = popularity_stores([method.compress(LayerContext(0, 1, q[:, :30], k[:, :30], v[:, :30]))])
    run(store, q, k, v, 30, tokens=12)
    assert [each["new_tokens"] for each in store.history] == [0, 12]
    assert max(hits for _, hits, _ in held(store).values()) == 5, "its last window of queries counts"
    assert store.entry_positions()[-1] == 41


@pytest.mark.parametrize("scope", ["kv_head", "layer"])
def test_without_demands_a_mask_hides_nothing(scope: str) -> None:
    engine = Engine(tiny_model())
    ids, _ = tiny_prompts(60)
    free = load_method("hierarchical", mode="mask", thresholds=(0, 0, 0), popularity_scope=scope)
    full, tiers = engine.prefill(ids[0], [load_method("fullkv"), free])
    assert engine.decode([full], 90) == engine.decode([tiers], 90)
    assert all(store.lengths() == [149, 149] for store in tiers.cache.stores)
    assert free.memory == "nominal"


def test_masking_and_dropping_read_the_same() -> None:
    engine = Engine(tiny_model())
    ids, _ = tiny_prompts(120)
    both = engine.prefill(ids[0], [load_method("hierarchical", mode=mode, window_size=10) for mode in ("mask", "drop")])
    masked, dropped = engine.decode(both, 45)
    assert masked == dropped
    assert both[1].cache.nbytes() < 0.7 * both[0].cache.nbytes()
    names = "cache", "normal", "readable"
    rows = [each.cache.method.row_fields(each.cache.stores)["tiers"] for each in both]
    assert [[window[name] for name in names] for window in rows[0]] == [
        [window[name] for name in names] for window in rows[1]
    ]
    assert [each["new_tokens"] for each in rows[0]] == [0, 10, 20, 30, 40]
    assert set(rows[0][0]) == {"new_tokens", *TIERS, "gone", "readable"}


def test_tiers_go_with_quantised_storage_and_pages() -> None:
    engine = Engine(tiny_model())
    ids, _ = tiny_prompts(120)
    bits = {"quant_method": "kivi", "q_group_size": 8, "quant_residual_length": 16, "nbits": 8}
    pages = {"retrieval": "quest", "token_budget": 16, "page_size": 4, "dense_layers": 0}
    plain, packed, paged = engine.prefill(
        ids[0], [load_method("hierarchical", mode="offload", window_size=10, **more) for more in ({}, bits, pages)]
    )
    engine.decode([plain, packed, paged], 35)
    for sequence in (packed, paged):
        fields = sequence.cache.method.row_fields(sequence.cache.stores)
        assert fields["moves"]["back"] > 0
        assert len(fields["tiers"]) == 4
    inner = [sum(store._buffer.nbytes() for store in popularity_stores(each.cache.stores)) for each in (plain, packed)]
    assert inner[1] < 0.6 * inner[0]


def test_a_forks_tiers_are_its_own() -> None:
    q, k, v = numbers(1, 60)
    method = make(mode="offload")
    (trunk,) = popularity_stores([method.compress(LayerContext(0, 1, q[:, :20], k[:, :20], v[:, :20]))])
    before = held(trunk), trunk.moves, trunk.history
    branch = trunk.fork()
    for at in range(20, 40):
        run(branch, q, k, v, at)
    assert held(branch) != before[0]
    assert (held(trunk), trunk.moves, trunk.history) == before


def test_a_share_of_the_prompt_is_a_cap_too() -> None:
    q, k, v = numbers(1, 100)
    method = make(budget="20%", thresholds=(0, 0, 0))
    (store,) = popularity_stores([method.compress(LayerContext(0, 1, q, k, v))])
    assert store.lengths() == [20]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"thresholds": "5+10+1"}, "--thresholds [5, 10, 1]: it takes the hits"),
        ({"thresholds": "5"}, "--thresholds [5]: it takes the hits"),
        ({"window_size": 128}, "--window_size is 128; hits are counted in a byte"),
        ({"ghost_windows": 1, "mode": "mask"}, "--ghost_windows 1: mode mask lets nothing go"),
        ({"offload_level": 0}, "--offload_level 0: mode drop moves nothing"),
        ({"offload_level": 3, "mode": "offload"}, "--offload_level '3'"),
        ({"new_level": 1, "mode": "offload"}, "--new_level is 1; mode offload reads levels from 2 on"),
        ({"initial_level": 0}, "--initial_level"),
        ({"budget": 12}, "budget 12 leaves hierarchical nothing to choose: it always keeps 12 tokens"),
        ({"mode": "maks"}, "--mode"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        load_method("hierarchical", **settings)
