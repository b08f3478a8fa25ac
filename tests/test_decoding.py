"""Eviction while decoding: any scorer's decode-time form, against slow and obvious versions, and over long generations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvfactory import Engine, UserError, load_method
from kvfactory.engine import DecodeRow
from kvfactory.eviction import EvictionMethod
from kvfactory.indexing import entries
from kvfactory.registry import get_registry
from kvfactory.testing import compress_layer, tiny_model, tiny_prompts

REGISTRY = get_registry()
ALL = sorted(name for name, entry in REGISTRY.methods.items() if entry.plugin.distribution == "kvfactory")
EVICTING = [name for name in ALL if "decode_budget" in REGISTRY.settings(name)]


HELD = ["adakv", "h2o", "snapkv", "streamingllm"]
"""Methods that hold a budget on request; those that always do are found by their default."""


def always_holds(name: str) -> bool:
    return REGISTRY.settings(name)["decode_budget"].default == "same"


def layer(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(heads, tokens, 8, generator=generator) for heads in (4, 2, 2))
    return q, k, v


def step(store: object, q: Tensor, k: Tensor, v: Tensor, at: int) -> None:
    """One token through a store that asks for no weights."""
    store.append(k[:, at : at + 1], v[:, at : at + 1], at)  # type: ignore[attr-defined]
    store.read(q[:, at : at + 1])  # type: ignore[attr-defined]
    store.observe(None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("interval", [1, 4])
def test_a_window_scores_what_is_stored_again(interval: int) -> None:
    """SnapKV's decode-time form: each eviction goes by the attention of the last queries over what is still there."""
    budget, window, prompt = 16, 3, 30
    q, k, v = layer(60)
    method = load_method(
        "snapkv", budget=budget, window_size=window, kernel_size=3, decode_budget="same", decode_interval=interval
    )
    store = compress_layer(method, *(x[:, :prompt] for x in (q, k, v)))
    kept = [each.tolist() for each in store.positions()]
    for at in range(prompt, 60):
        step(store, q, k, v, at)
        for head in range(2):
            kept[head].append(at)
            if len(kept[head]) > budget:
                kept[head] = chosen(q, k, kept[head], head, at, window, budget - interval + 1)
        assert [each.tolist() for each in store.positions()] == kept
        for head, positions in enumerate(kept):
            assert torch.equal(store.keys()[head], k[head, positions])
            assert torch.equal(store.values()[head], v[head, positions])


def chosen(q: Tensor, k: Tensor, kept: list[int], head: int, now: int, window: int, budget: int) -> list[int]:
    """What SnapKV keeps of one KV head's entries, by loops."""
    votes = torch.zeros(len(kept))
    for query_head in (2 * head, 2 * head + 1):
        for at in range(now - window + 1, now + 1):
            logits = torch.tensor([float(q[query_head, at] @ k[head, j]) / 8**0.5 if j <= at else -1e30 for j in kept])
            votes += logits.softmax(0) / 2
    pooled = max_pool1d(votes[None, None, :-window], 3, 1, 1)[0, 0].tolist()
    best = sorted(range(len(pooled)), key=lambda index: (-pooled[index], index))[: budget - window]
    return [*(kept[index] for index in sorted(best)), *kept[-window:]]


def test_a_number_is_held_in_place_of_the_budget() -> None:
    """A prompt may keep more than generation, and less."""
    q, k, v = layer(80)
    for held in (12, 40):
        method = load_method("snapkv", budget=24, window_size=4, decode_budget=held)
        store = compress_layer(method, *(x[:, :50] for x in (q, k, v)))
        assert store.lengths() == [24, 24]
        lengths = []
        for at in range(50, 80):
            step(store, q, k, v, at)
            lengths.append(store.lengths()[0])
        assert lengths[0] == min(25, held) and lengths[-1] == held == max(lengths)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "slidingwindow", "tova"])
def test_a_short_prompt_grows_up_to_the_budget_and_no_further(name: str) -> None:
    q, k, v = layer(40)
    store = compress_layer(load_method(name, budget=16, decode_budget="same"), *(x[:, :10] for x in (q, k, v)))
    lengths = []
    for at in range(10, 40):
        store.append(k[:, at : at + 1], v[:, at : at + 1], at)
        seen = store.read(q[:, at : at + 1]).keys
        assert isinstance(seen, Tensor)
        weights = (q[:, at : at + 1] @ seen.repeat_interleave(2, 0).transpose(1, 2)).softmax(-1)
        store.observe(weights if store.observes else None)
        lengths.append(store.lengths())
    assert lengths == [[min(11 + step, 16)] * 2 for step in range(30)]


def test_heads_of_a_ragged_layer_hold_what_each_was_given() -> None:
    q, k, v = layer(80)
    method = load_method("adakv", budget=24, window_size=4, floor=0.0, decode_budget="same")
    store = compress_layer(method, *(x[:, :50] for x in (q, k, v)))
    given = store.lengths()
    assert len(set(given)) == 2, "heads that deserve the same would test nothing"
    for at in range(50, 80):
        step(store, q, k, v, at)
        assert store.lengths() == given


def test_a_chunk_of_new_tokens_is_cut_to_the_budget_once_it_was_read() -> None:
    q, k, v = layer(80)
    store = compress_layer(
        load_method("snapkv", budget=16, window_size=4, decode_budget="same"), q[:, :50], k[:, :50], v[:, :50]
    )
    store.append(k[:, 50:57], v[:, 50:57], 50)
    assert store.read(q[:, 50:57]).keys.shape[1] == 23
    store.observe(None)
    assert store.lengths() == [16, 16]
    assert all(positions[-4:].tolist() == [53, 54, 55, 56] for positions in store.positions())


@pytest.mark.parametrize("name", ["snapkv", "slidingwindow", "h2o"])
@pytest.mark.parametrize("merge", ["pivot", "weighted"])
def test_what_a_step_evicts_is_merged(name: str, merge: str) -> None:
    """A prompt of the budget's length loses nothing, so that the first step's eviction is the first merge."""
    budget = 16
    q, k, v = layer(17)
    own = {"window_size": 3} if name == "snapkv" else {}
    method = load_method(name, budget=budget, merge=merge, decode_budget="same", **own)
    store = compress_layer(method, *(x[:, :budget] for x in (q, k, v)))
    store.append(k[:, budget:], v[:, budget:], budget)
    read = store.read(q[:, budget:])
    before = store.positions()
    weights = (q[:, budget:] @ k.repeat_interleave(2, 0).transpose(1, 2) / 8**0.5).softmax(-1)
    store.observe(weights if store.observes else None)
    kept = torch.stack(store.positions())
    evicting_first = len(before[0]) == budget  # room was made before the step, whose own token nothing was merged into
    seen = budget if evicting_first else budget + 1
    chosen = kept[:, :-1] if evicting_first else kept
    assert isinstance(method, EvictionMethod) and method.merge is not None and isinstance(read.keys, Tensor)
    keys, values = method.merge.merge(k[:, :seen], v[:, :seen], chosen, torch.zeros(2, seen))
    assert not torch.equal(keys, entries(k, chosen)), "something was merged"
    for held, merged, new in ((store.keys(), keys, k), (store.values(), values, v)):
        expected = torch.cat([merged, new[:, budget:]], 1) if evicting_first else merged
        torch.testing.assert_close(torch.stack(held), expected)


def test_a_share_of_the_prompt_is_a_budget_of_its_own_for_each_prompt() -> None:
    method = load_method("snapkv", budget="10%")
    for tokens, budget in ((200, 20), (155, 15), (30, 9)):  # 3 would leave nothing beside the window of 8
        q, k, v = layer(tokens)
        shared, own = (compress_layer(each, q, k, v) for each in (method, load_method("snapkv", budget=budget)))
        assert [each.tolist() for each in shared.positions()] == [each.tolist() for each in own.positions()]
        assert shared.lengths() == [budget] * 2
    assert method.settings()["budget"] == "10%"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"decode_budget": 8}, "--decode_budget 8"),
        ({"decode_budget": 16, "decode_interval": 9}, "each eviction frees 9"),
        ({"decode_interval": 4}, "without --decode_budget"),
        ({"decode_budget": "same", "decode_interval": 0}, "--decode_interval is 0"),
        ({"decode_budget": "some"}, "whole number or same"),
    ],
)
def test_a_decode_budget_that_cannot_be_held_is_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load_method("snapkv", budget=32, window_size=8, **settings)


def test_600_tokens_are_generated_within_the_budget() -> None:
    """No store ever holds more than the budget and the step's own token, bookkeeping aside, and bytes stop growing."""
    budget, layers, heads, entry = 32, 3, 2, 2 * 8 * 4 + 4  # keys and values in float32, and a position
    names = [*HELD, *(name for name in EVICTING if always_holds(name) and name != "duoattention")]
    assert {"slidingwindow", "tova", "scissorhands", "lru", "rkv"} <= set(names)
    methods = [load_method(name, budget=budget, decode_budget="same") for name in names]
    ids, _ = tiny_prompts(60)
    engine = Engine(tiny_model())
    rows = [DecodeRow(sequence, 600, stop=()) for sequence in engine.prefill(ids[0], methods)]
    held: dict[str, list[int]] = {name: [] for name in names}
    active = rows
    while active:
        active = engine.step(active)
        for name, row in zip(names, rows, strict=True):
            held[name].append(row.sequence.cache.nbytes())
    for name, row in zip(names, rows, strict=True):
        stores = row.sequence.cache.stores
        assert len(row.sequence.tokens) == 600
        assert sum(sum(store.lengths()) for store in stores) <= layers * heads * budget + (3 if name == "adakv" else 0)
        bookkeeping = sum(extra(store, budget + 1) for store in stores)
        assert max(held[name]) <= layers * heads * (budget + 1) * entry + bookkeeping, name
        assert max(held[name]) == max(held[name][:40]), f"{name} grows"


def extra(store: object, entries: int) -> int:
    """Most bytes that a store holds beside keys, values and positions: the latest queries, and a record of each entry."""
    parts = getattr(store, "_stores", [store])  # the heads of a ragged layer
    queries = sum(part._queries.nbytes for part in parts if hasattr(part, "_queries"))
    records = [part._state for part in parts if hasattr(part, "_state")]
    return queries + sum(each.nbytes // each.shape[1] * entries for each in records) + 8 * len(parts)


def test_retrieval_heads_grow_and_streaming_heads_do_not() -> None:
    ids, _ = tiny_prompts(60)
    engine = Engine(tiny_model())
    (sequence,) = engine.prefill(ids[0], [load_method("duoattention", budget=32)])
    before = [length for store in sequence.cache.stores for length in store.lengths()]
    engine.decode([sequence], 41)
    after = [length for store in sequence.cache.stores for length in store.lengths()]
    assert [length for length in before if length == 60] and [length for length in before if length < 32]
    assert after == [length + 40 if length == 60 else length for length in before]
