"""Quest: bounds of pages, what is read of them, and that nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import small_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from kvfactory_plugins.quest import PagedStore, Quest, page_bounds, page_scores
from test_golden_methods import Golden
from torch import Tensor

from kvfactory import DenseStore, Engine, HeadwiseStore, Reading, UserError, compiled, compress, load_method
from kvfactory.kernels import KERNELS, decode_attention
from kvfactory.method import Method
from kvfactory.registry import get_registry
from kvfactory.testing import MethodContract, compress_layer, generate, tensors_of, tiny_model, tiny_prompts


class TestQuest(MethodContract):
    evicts = False

    def make(self, budget: int) -> Method:
        return load_method("quest", token_budget=budget, page_size=4, dense_layers=0)


def attended(store: PagedStore, query: Tensor) -> Tensor:
    """Which entries each query head reads, bool [query_heads, length]."""
    mask = torch.zeros(len(query), store.lengths()[0], dtype=torch.bool)
    store.read(query)
    assert store._read is not None
    for head, index in enumerate(store._read):
        mask[head, index] = True
    return mask


@pytest.mark.parametrize("case", ["page16_budget48", "page4_budget20", "page8_budget64"])
def test_the_authors_evaluation(shared: Path, case: str) -> None:
    golden = Golden(shared, f"quest__official_{case}")
    q, k, v = golden.qkv()
    size = golden.params["page_size"]
    method = load_method(
        "quest", page_size=size, token_budget=golden.params["token_budget"], dense_layers=0, newest_size=0
    )
    store = compress_layer(method, k[:, :-1], k[:, :-1], v[:, :-1])
    store.append(k[:, -1:], v[:, -1:], k.shape[1] - 1)
    assert isinstance(store, PagedStore)
    least, most = page_bounds(k, size)
    torch.testing.assert_close(least, golden["out_page_min"][0])
    torch.testing.assert_close(most, golden["out_page_max"][0])
    torch.testing.assert_close(page_scores(q[:, 0], least, most), golden["out_page_score"][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(attended(store, q), golden["out_token_mask"][0])
    keys, values, _ = store.read(q)
    output = [
        (query @ key.T / math.sqrt(q.shape[-1])).softmax(-1) @ value
        for query, key, value in zip(q, keys, values, strict=True)
    ]
    torch.testing.assert_close(torch.stack(output), golden["out_attn_out"][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["page16_tb40_recent10", "page7_tb30_recent0", "page8_tb24_recent6"])
def test_pages_that_kvcache_factory_chooses(shared: Path, case: str) -> None:
    """Of what comes before the recent entries. How it then cuts pages to an exact number of tokens is not done here."""
    golden = Golden(shared, f"quest__kvf_select_{case}")
    q, k = golden["in_q"][0], golden["in_k"][0]
    prefix = k[:, : k.shape[1] - golden.params["recent_size"]]
    scores = page_scores(q[:, 0], *page_bounds(prefix, golden.params["page_size"]))
    pages = golden["out_pages"][0].long()
    assert torch.equal(scores.topk(pages.shape[1]).indices.sort().values, pages)


def layer(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(heads, tokens, 8, generator=generator) for heads in (4, 2, 2))
    return q, k, v


def paged(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> PagedStore:
    store = compress_layer(load_method("quest", dense_layers=0, **settings), q, k, v)
    assert isinstance(store, PagedStore)
    return store


@given(tokens=st.integers(1, 40), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_no_key_gives_more_than_its_pages_bound(tokens: int, size: int, seed: int) -> None:
    q, k, _ = layer(tokens, seed)
    query = q[:, 0]
    scores = page_scores(query, *page_bounds(k, size))
    products = (query[:, None] * k.repeat_interleave(2, 0)).sum(-1)
    assert (products <= scores.repeat_interleave(size, 1)[:, :tokens] + 1e-5).all()
    if size == 1:
        torch.testing.assert_close(scores, products)


@given(prompt=st.integers(1, 30), steps=st.lists(st.integers(1, 6), max_size=6), size=st.integers(1, 7))
def test_bounds_kept_up_to_date_are_those_made_anew(prompt: int, steps: list[int], size: int) -> None:
    q, k, v = layer(prompt + sum(steps))
    store = PagedStore(DenseStore(k[:, :prompt], v[:, :prompt]), Quest(page_size=size))
    at = prompt
    for step in steps:
        store.append(k[:, at : at + step], v[:, at : at + step], at)
        store.read(q[:, at : at + step])
        at += step
    (pages,) = store._pages
    assert all(torch.equal(*each) for each in zip(pages.bounds(), page_bounds(k, size), strict=True))


@pytest.mark.skipif(not compiled.is_installed(), reason="numba is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30)
@given(st.data())
def test_pages_are_attended_to_where_they_lie_as_if_they_were_gathered(dtype: torch.dtype, data: st.DataObject) -> None:
    tokens, size = data.draw(st.integers(2, 90)), data.draw(st.integers(1, 9))
    quest = Quest(page_size=size, token_budget=data.draw(st.integers(1, 60)), newest_size=data.draw(st.integers(0, 12)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    queries, keys, values = (torch.randn(heads, tokens, 16, generator=generator).to(dtype) for heads in (4, 2, 2))
    start = data.draw(st.integers(1, tokens - 1))
    stores = [PagedStore(DenseStore(keys[:, :start], values[:, :start]), quest) for _ in range(2)]
    for at in range(start, min(start + 20, tokens)):
        query = queries[:, at : at + 1]
        for store in stores:
            store.append(keys[:, at : at + 1], values[:, at : at + 1], at)
        attended, reading = stores[0].attend(query), stores[1].read(query)
        if attended is None:
            assert stores[1].read_lengths() == stores[1].lengths()
        else:
            expected, _ = decode_attention(KERNELS["sdpa"], query.double(), exact(reading), at, None, False)
            torch.testing.assert_close(
                attended.double(), expected, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5
            )
            assert stores[0].read_lengths() == stores[1].read_lengths()
        for store in stores:
            store.observe(None)


def exact(reading: Reading) -> Reading:
    """In float64."""
    keys, values = (
        side.double() if isinstance(side, Tensor) else [each.double() for each in side] for side in reading[:2]
    )
    return Reading(keys, values, reading.positions)


def test_pages_of_one_entry_are_the_best_entries() -> None:
    q, k, v = layer(50)
    store = paged(q, k, v, page_size=1, token_budget=8, newest_size=0)
    assert isinstance(store, PagedStore)
    logits = (q[:, :1] @ k.repeat_interleave(2, 0).transpose(1, 2))[:, 0]
    best = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(8).indices, True)
    assert torch.equal(attended(store, q[:, :1]), best)


@pytest.mark.parametrize(("length", "recent", "pages"), [(50, 1, {6}), (50, 3, {5, 6}), (48, 1, {5}), (49, 9, {5, 6})])
def test_recent_entries_are_always_read(length: int, recent: int, pages: set[int]) -> None:
    q, k, v = layer(length)
    k[:, -recent:] = 0  # nothing to look for there
    k[:, 0] += 9 * q[:, :1].unflatten(0, (2, 2)).mean(1)[:, 0]
    store = paged(q, k, v, page_size=8, token_budget=24, newest_size=recent)
    for head in attended(store, q[:, :1]):
        read = {entry // 8 for entry in head.nonzero()[:, 0].tolist()}
        assert pages <= read and len(read) == 3


def test_all_pages_are_the_stock_model() -> None:
    model = tiny_model()
    ids, mask = tiny_prompts(70, 41)
    stock = generate(model, ids, mask)
    with compress(model, load_method("quest", token_budget=96, page_size=8, dense_layers=0)):
        assert torch.equal(generate(model, ids, mask), stock)


def test_what_was_read_and_what_is_held() -> None:
    """Dense layers read everything; others as many pages as were asked for. Bounds cost two numbers a page and channel."""
    engine = Engine(tiny_model())
    ids, _ = tiny_prompts(64)
    full, quest = engine.prefill(
        ids[0], [load_method("fullkv"), load_method("quest", token_budget=16, page_size=4, dense_layers=1)]
    )
    assert quest.cache.read() == [64.0] * 3, "nothing was read by a step yet"
    more = [store.nbytes() - other.nbytes() for store, other in zip(quest.cache.stores, full.cache.stores, strict=True)]
    assert more == [0, *[2 * 2 * 16 * 8 * 4] * 2]
    engine.decode([quest], 5)
    assert quest.cache.read() == [68.0, 16.0, 16.0]
    assert quest.cache.kept() == [68.0] * 3


@pytest.mark.parametrize("setting", ["token_budget", "page_size"])
def test_bad_settings_are_told(setting: str) -> None:
    given: dict[str, Any] = {setting: 0}
    with pytest.raises(UserError, match=f"--{setting} is 0; it is 1 or more"):
        load_method("quest", **given)


# ---- on top of eviction ----

EVICTING = sorted(name for name in get_registry().methods if get_registry().has_budget(name))


@pytest.mark.parametrize("name", EVICTING)
def test_every_method_may_be_read_by_pages(name: str) -> None:
    """All pages are the method as it is; few pages are read, and what is kept stays the method's business."""
    engine = Engine(tiny_model())
    ids, _ = tiny_prompts(90)
    own = small_settings(name, thresholds=(0, 0, 0))

    def method(**pages: int) -> Method:
        part = {"retrieval": "quest", "page_size": 2, "dense_layers": 0} if pages else {}
        return load_method(name, budget=40, **own, **part, **pages)

    sequences = engine.prefill(ids[0], [method(), method(token_budget=400), method(token_budget=8)])
    plain, whole, _ = engine.decode(sequences, 12)
    assert whole == plain
    kept, _, by_pages = (sequence.cache.kept() for sequence in sequences)
    assert by_pages == kept
    assert max(sequences[2].cache.read()) <= 8


def test_what_is_observed_is_spread_over_all_entries() -> None:
    """A method that goes by each step's attention sees what each head paid to the entries it read, and 0 elsewhere."""
    q, k, v = layer(30)
    seen: list[Tensor] = []

    class Watching(DenseStore):
        observes = True

        def observe(self, weights: Tensor | list[Tensor] | None) -> None:
            assert isinstance(weights, Tensor)
            seen.append(weights)

    store = PagedStore(Watching(k, v), Quest(page_size=5, token_budget=15))
    store.append(k[:, :1], v[:, :1], 30)
    reading = store.read(q[:, -1:])
    weights = [torch.rand(1, 1, len(keys)) for keys in reading.keys]
    store.observe(weights)
    (spread,) = seen
    assert spread.shape == (4, 1, 31)
    for head, mask in enumerate(attended(store, q[:, -1:])):
        assert torch.equal(spread[head, 0, mask], weights[head][0, 0])
        assert not spread[head, 0, ~mask].any()


def test_ragged_heads_have_pages_each() -> None:
    q, k, v = layer(60)
    k[0] *= 3  # one head is sharper than the other
    store = compress_layer(
        load_method(
            "adakv", budget=24, retrieval="quest", page_size=2, token_budget=8, dense_layers=0, quant_method="kivi"
        ),
        q,
        k,
        v,
    )
    assert isinstance(store, PagedStore) and isinstance(store._store, HeadwiseStore)
    keys, _, positions = store.read(torch.randn(4, 1, 8))
    assert [len(each) for each in keys] == [len(each) for each in positions()] == store.read_lengths()
    store.observe(None)
    assert sum(x.nbytes for x in tensors_of(store)) <= store.nbytes()
