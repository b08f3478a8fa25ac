"""Rows that attend together against the same rows each by itself, whoever steps, leaves, comes back or is forked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfactory import DenseStore, Engine, RaggedStore, Store, load_method
from kvfactory.buffers import Stackable
from kvfactory.cache import CompressedCache, LayerBatch, SequenceCache
from kvfactory.kernels import KERNELS, Kernel, kernel_of
from kvfactory.stacks import Stack, divided, stacked
from kvfactory.testing import compress_layer, tiny_model, tiny_prompts

KV_HEADS, GROUP, DIM = 2, 3, 8
METHOD = load_method("fullkv")


def dense(length: int, generator: torch.Generator, heads: int = KV_HEADS) -> Store:
    keys, values = (torch.randn(heads, length, DIM, generator=generator) for _ in range(2))
    return DenseStore(keys, values, torch.arange(0, 2 * length, 2, dtype=torch.int32).expand(heads, -1))


def ragged(length: int, generator: torch.Generator, heads: int = KV_HEADS, first: int | None = None) -> Store:
    """Heads of different lengths, `length` on average."""
    first = first or int(torch.randint(1, 2 * length, (1,), generator=generator))
    lengths = [first, 2 * length - first] * (heads // 2)
    keys, values = ([torch.randn(each, DIM, generator=generator) for each in lengths] for _ in range(2))
    return RaggedStore(keys, values, [torch.arange(each, dtype=torch.int32) for each in lengths])


def skewed(length: int, generator: torch.Generator) -> Store:
    return ragged(length, generator, first=length // 2)


def evicting(name: str, **settings: Any) -> Callable[..., Store]:
    """Makes stores that a method goes on evicting from while decoding."""

    def make(length: int, generator: torch.Generator, heads: int = KV_HEADS) -> Store:
        granularity = "kv_head" if heads == KV_HEADS else "query_head"
        method = load_method(name, budget=length, decode_budget="same", kv_cache_granularity=granularity, **settings)
        query, key, value = (
            torch.randn(h, 20, DIM, generator=generator) for h in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
        )
        return compress_layer(method, query, key, value)

    return make


EVICTING = {
    "window": evicting("snapkv", window_size=2, decode_interval=3),
    "sliding": evicting("streamingllm", sink_size=1),
    "tracking": evicting("tova"),
    "merging": evicting("snapkv", window_size=2, merge="weighted"),
}


def sequence(store: Store, seen: int = 100) -> SequenceCache:
    return SequenceCache(METHOD, [store], seen)


def step(rows: list[SequenceCache], layer: LayerBatch, kernel: Kernel = KERNELS["sdpa"]) -> Tensor:
    """One token for these rows: their attention."""
    cache = CompressedCache([[row] for row in rows], kernel, None)
    cache.begin(None, 1)
    output = cache.attend(layer, None)
    cache.end(1)
    return output


def token(rows: int, generator: torch.Generator) -> LayerBatch:
    q, k, v = (torch.randn(rows, h, 1, DIM, generator=generator) for h in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    return LayerBatch(0, 1, q, k, v, torch.empty(rows, 1, 1))


def row_of(layer: LayerBatch, row: int) -> LayerBatch:
    q, k, v = (each[row : row + 1] for each in (layer.query, layer.key, layer.value))
    return replace(layer, query=q, key=k, value=v)


@pytest.mark.parametrize("kernel", [KERNELS["sdpa"], kernel_of("sdpa", torch.float32, torch.device("cpu"))])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99), heads=st.sampled_from([KV_HEADS, KV_HEADS * GROUP]))
def test_company_changes_nothing(kernel: Kernel, data: st.DataObject, seed: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    makers = st.sampled_from([dense, ragged, *EVICTING.values()])
    made = data.draw(st.lists(st.tuples(makers, st.sampled_from([5, 8, 9, 11])), min_size=2, max_size=7))
    together = [sequence(make(length, generator, heads)) for make, length in made]
    alone = [row.fork() for row in together]
    for _ in range(data.draw(st.integers(1, 30))):
        if data.draw(st.integers(0, 5)) == 0:
            which = data.draw(st.integers(0, len(together) - 1))
            together.append(together[which].fork())
            alone.append(alone[which].fork())
        stepping = data.draw(st.lists(st.sampled_from(range(len(together))), min_size=1, unique=True))
        layer = token(len(stepping), generator)
        outputs = step([together[row] for row in stepping], layer, kernel)
        for place, row in enumerate(stepping):
            expected = step([alone[row]], row_of(layer, place), kernel)[0]
            torch.testing.assert_close(outputs[place], expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.seen == theirs.seen and ours.nbytes() == theirs.nbytes()
        assert ours.kept() == theirs.kept()
        for side in ("positions", "keys", "values"):
            for a, b in zip(getattr(ours.stores[0], side)(), getattr(theirs.stores[0], side)(), strict=True):
                assert torch.equal(a, b)


def test_rows_that_evict_stay_in_company() -> None:
    """They let go of entries where these lie: a step moves no row to another stack."""
    generator = torch.Generator().manual_seed(4)
    rows = [sequence(make(9, generator)) for make in EVICTING.values() for _ in range(3)]
    stacks = []
    for _ in range(12):
        step(rows, token(len(rows), generator))
        stacks.append([entries_of(row).stack for row in rows])
    assert None not in stacks[-1] and stacks[-1] == stacks[0]
    assert len({*stacks[0]}) == 2, "those that are told weights are among themselves"
    twin, before = rows[0].fork(), [each.clone() for each in rows[0].stores[0].values()]
    step(rows, token(len(rows), generator))
    assert all(map(torch.equal, twin.stores[0].values(), before)), "nobody evicts from another's entries"


def entries_of(row: SequenceCache) -> Stackable:
    entries = row.stores[0].stackable(row.seen)
    assert entries is not None
    return entries


def test_rows_of_about_one_size_share_a_kernel_call_and_their_room() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [sequence(make(length, generator)) for make in (dense, skewed) for length in (16, 18, 200, 17)]
    kernel, calls = KERNELS["sdpa"], []
    cache = CompressedCache([[row] for row in rows], KERNELS["sdpa"], None)
    cache.kernel = replace(
        kernel, step_together=lambda *given: calls.append(len(given[3])) or kernel.step_together(*given)
    )
    moves: set[int] = set()
    for _ in range(40):
        cache.begin(None, 1)
        cache.attend(token(len(rows), generator), None)
        cache.end(1)
        moves.add(entries_of(rows[0]).keys.untyped_storage().data_ptr())
    assert sorted(calls) == [2] * 40 + [6] * 40
    assert len(moves) <= 3, "a step writes into the room there is"
    assert len({entries_of(rows[each]).keys.untyped_storage().data_ptr() for each in (0, 1, 3, 4, 5, 7)}) == 1


def test_long_rows_are_filled_up_by_little_and_longer_heads_stay_apart() -> None:
    generator = torch.Generator().manual_seed(3)
    for make, shared in ((dense, [True, True, False, True]), (skewed, [False] * 4)):
        rows = [sequence(make(length, generator), 5000) for length in (2000, 2004, 2600, 2000)]
        step(rows, token(4, generator))
        stacks = [entries_of(row).stack for row in rows]
        assert [each is not None for each in stacks] == shared
        assert len({each for each in stacks if each is not None}) <= 1


def cost(groups: list[list[int]], held: dict[int, Stackable]) -> int:
    """Of calls and of filling up, in entries of a head; rows in no group are alone."""
    alone = sum(held[row].calls for row in held if not any(row in group for group in groups))
    filled = 0
    for group in groups:
        lengths = [each for row in group for each in held[row].head_lengths()]
        filled += len(lengths) * max(lengths) - sum(lengths)
    return KERNELS["sdpa"].call * (alone + len(groups)) + filled


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([dense, ragged]), st.integers(1, 900)), min_size=1, max_size=6), st.integers()
)
def test_no_division_into_neighbours_costs_less(made: list[tuple[Callable[..., Store], int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 1000)
    held = {row: entries_of(sequence(make(length, generator))) for row, (make, length) in enumerate(made)}
    order = sorted(held, key=lambda row: -max(held[row].head_lengths()))
    least = min(
        cost([part for part, stacks in zip(parts, chosen, strict=True) if stacks and len(part) > 1], held)
        for cuts in product([False, True], repeat=len(order) - 1)
        for parts in [split(order, cuts)]
        for chosen in product([False, True], repeat=len(parts))
    )
    assert cost(divided(held, KERNELS["sdpa"]), held) == least
    alike, one = divided(held, KERNELS["flash_attention_2"]), KERNELS["sdpa"].call
    assert all(cost([group], {row: held[row] for row in group}) == one for group in alike), "nothing is filled up"


def split(order: list[int], cuts: tuple[bool, ...]) -> list[list[int]]:
    """The list cut where it is said, between one and the next."""
    ends = [place for place, cut in enumerate(cuts, 1) if cut]
    return [order[a:b] for a, b in pairwise([0, *ends, len(order)])]


def test_slots_of_rows_that_left_are_given_up_when_they_are_half() -> None:
    generator = torch.Generator().manual_seed(2)
    for make in (dense, skewed):
        rows = [sequence(make(10, generator)) for _ in range(6)]
        step(rows, token(6, generator))
        first = entries_of(rows[0]).stack
        assert isinstance(first, Stack)
        step(rows[:4], token(4, generator))
        assert entries_of(rows[0]).stack is first and first.slots == 6
        step(rows[:3], token(3, generator))
        stack = entries_of(rows[0]).stack
        assert stack is not first and stack is not None and stack.slots == 3
        (other, held), *_ = stacked({0: entries_of(rows[5]), 1: entries_of(rows[4])}, KERNELS["sdpa"])
        assert other is not first and [each.slot for each in held.values()] == [0, 1] and other.slots == 2


def test_the_engine_forms_stacks_and_says_the_same() -> None:
    model, ids = tiny_model(), tiny_prompts(60)[0][0]
    names = [("snapkv", 16), ("h2o", 16), ("adakv", 16), ("streamingllm", 16), ("fullkv", None), ("snapkv", 24)]
    methods = [load_method(name, budget=budget) for name, budget in names]
    engine = Engine(model)
    rows = engine.prefill(ids, methods)
    together = engine.decode(rows, 12)
    held = [row.cache.stores[0].stackable(row.cache.seen) for row in rows]
    stacks = {each.stack for each in held if each is not None}
    assert len(stacks) == 1 and None not in stacks
    assert together == [engine.decode(engine.prefill(ids, [method]), 12)[0] for method in methods]
