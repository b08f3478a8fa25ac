"""Methods that choose by position, by chance, by key norm, by proxies and by redundancy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from kvfactory_plugins import nacl as nacl_plugin
from kvfactory_plugins import rkv as rkv_plugin
from kvfactory_plugins.random import uniforms
from test_golden_methods import Golden
from torch import Tensor

from kvfactory import DenseStore, UserError, load_method
from kvfactory.context import LayerContext
from kvfactory.method import Method
from kvfactory.testing import MethodContract, compress_layer, reference_attention


def qkv(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(heads, tokens, 8, generator=generator) for heads in (4, 2, 2))
    return q, k, v


def kept(method: Any, q: Tensor, k: Tensor, v: Tensor, **layer: int) -> list[list[int]]:
    return [positions.tolist() for positions in compress_layer(method, q, k, v, **layer).positions()]


def test_sliding_window_through_the_prompt_and_each_step(shared: Path) -> None:
    golden = Golden(shared, "sliding_window__thesis_stream")
    budget, prompt, steps = (golden.params[name] for name in ("budget", "prompt_len", "decode_steps"))
    k, v = golden["in_k"][0], golden["in_v"][0]
    store = compress_layer(load_method("slidingwindow", budget=budget), *(x[:, :prompt] for x in (k, k, v)))
    for step in range(steps + 1):
        if step:
            at = prompt + step - 1
            store.append(k[:, at : at + 1], v[:, at : at + 1], at)
        expected = golden[f"out_kept_{step}"].tolist()
        assert [each.tolist() for each in store.positions()] == [expected] * 2
        assert torch.equal(store.keys()[1], k[1, expected])


def test_random_scores_are_uniform_and_differ_by_place() -> None:
    places = [(0, 0), (0, 1), (1, 0), (2**40, 5), (-3, 5)]  # seed, layer
    rows = torch.cat([uniforms(*place, 2, torch.arange(20000)[None]) for place in places])
    assert rows.dtype == torch.float32 and rows.min() >= 0 and rows.max() < 1
    for row in rows:
        assert ((torch.histc(row, 20, 0, 1) - 1000).abs() < 150).all(), "five standard deviations"
        assert len(row.unique()) > 19900
        assert torch.corrcoef(torch.stack([row[1:], row[:-1]]))[0, 1].abs() < 0.035
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.035, "heads, layers and seeds draw for themselves"


def test_random_scores_are_of_the_true_position_alone() -> None:
    method = load_method("random", budget=20)
    whole = LayerContext(3, 4, *qkv(50))
    torch.manual_seed(77)
    scores = method.score(whole)
    assert torch.equal(scores[:, :30], method.score(LayerContext(3, 4, *qkv(30, seed=9))))
    left = torch.stack([torch.arange(0, 50, 3), torch.arange(1, 51, 3)])
    stored = LayerContext(3, 4, *qkv(17), listed_positions=left)
    assert torch.equal(method.score(stored), scores.gather(1, left))
    assert not torch.equal(method.score(LayerContext(2, 4, *qkv(50))), scores)


def test_random_protects_and_draws_the_rest_evenly() -> None:
    q, k, v = qkv(60)
    hits = torch.zeros(60)
    for seed in range(200):
        for head in kept(load_method("random", budget=24, random_seed=seed), q, k, v):
            assert len(head) == 24 and head[:4] == [0, 1, 2, 3] and head[-8:] == list(range(52, 60))
            hits[head] += 1
    assert (hits[:4] == 400).all() and (hits[-8:] == 400).all()
    assert (hits[4:52] - 100).abs().max() < 45, "12 of 48, five standard deviations"


def test_random_while_decoding_keeps_the_best_lots_so_far() -> None:
    q, k, v = qkv(90)
    store = compress_layer(load_method("random", budget=24, decode_budget="same"), *(x[:, :60] for x in (q, k, v)))
    lots = uniforms(0, 0, 2, torch.arange(90)[None])
    for at in range(60, 90):
        store.append(k[:, at : at + 1], v[:, at : at + 1], at)
        store.observe(None)
    for head, positions in enumerate(store.positions()):
        free = lots[head, 4:82].topk(12).indices + 4
        assert positions.tolist() == [0, 1, 2, 3, *sorted(free.tolist()), *range(82, 90)]


def test_l2norm_of_kvcache_factory(shared: Path) -> None:
    golden = Golden(shared, "l2norm__kvf")
    k, v = golden["in_k"][0], golden["in_v"][0]
    method = load_method("l2norm", budget=golden.params["max_capacity_prompt"], skip_layers="0+1")
    layer = LayerContext(golden.params["layer_idx"], 32, k, k, v)
    assert kept(method, k, k, v, layer_index=golden.params["layer_idx"]) == golden["out_kept"][0].tolist()
    torch.testing.assert_close(-method.score(layer), golden["out_norm"][0], rtol=1e-4, atol=1e-5)


def test_l2norm_of_its_authors(shared: Path) -> None:
    golden = Golden(shared, "l2norm__official")
    for layer in range(3):
        keys, expected = golden[f"in_k_layer{layer}"], golden[f"out_kept_layer{layer}"]
        budget = math.ceil(golden.params["keep_ratio"] * keys.shape[2])
        method = load_method("l2norm", budget=budget, skip_layers=golden.params["skip_layers"])
        for k, row in zip(keys, expected, strict=True):
            assert kept(method, k, k, k, layer_index=layer) == row.tolist()


@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
def test_l2norm_leaves_skipped_layers_whole_and_cuts_the_others(granularity: str) -> None:
    q, k, v = qkv(60)
    k[:, 17] *= 0.01
    method = load_method(
        "l2norm", budget=16, skip_layers="1", decode_budget="same", recent_size=3, kv_cache_granularity=granularity
    )
    whole, cut = (compress_layer(method, q, k, v, layer_index=layer, num_layers=3) for layer in (1, 2))
    heads = 2 if granularity == "kv_head" else 4
    assert type(whole) is DenseStore
    assert whole.lengths() == [60] * heads and cut.lengths() == [16] * heads
    assert all(17 in positions and positions[-3:].tolist() == [57, 58, 59] for positions in cut.positions())
    assert torch.equal(whole.keys()[-1], k[1]) and torch.equal(whole.values()[-1], v[1])
    for store in (whole, cut):
        store.append(q[:2, :1], q[:2, :1], 60)
        store.observe(None)
    assert whole.lengths() == [61] * heads and cut.lengths() == [16] * heads


def layer_with_attention(attention: Tensor) -> LayerContext:
    """A layer in which each query pays this attention, [heads, tokens, tokens], to all keys, the later ones too."""
    heads, tokens, _ = attention.shape
    queries = attention.clamp(min=1e-38).log() * math.sqrt(tokens)
    keys = torch.eye(tokens).expand(heads, -1, -1)
    return LayerContext(0, 1, queries, keys, keys)


@pytest.mark.parametrize("mode", ["suffix", "edges", "prefix"])
def test_nacl_proxies_of_kvcache_factory(shared: Path, mode: str) -> None:
    golden = Golden(shared, f"nacl__kvf_{mode}")
    method = load_method(
        "nacl",
        budget=golden.params["token_budget"],
        window_size=golden.params["proxy_size"],
        proxy_tokens=golden.params["mode"],
        sink_size=golden.params["sink_size"],
        random_ratio=0,
    )
    layer = layer_with_attention(golden["in_attn"][0])
    torch.testing.assert_close(method.score(layer), golden["out_score"][0], rtol=1e-4, atol=1e-5)
    assert method.select(layer).tolist() == golden["out_kept"][0].tolist()


@pytest.mark.parametrize("case", ["random0.0", "random0.08"])
def test_nacl_of_its_authors(shared: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their lots in place of ours."""
    golden = Golden(shared, f"nacl__official_shim_{case}")
    params = golden.params
    q, k, v = (golden[name][0].transpose(0, 1) for name in ("in_q", "in_k", "in_v"))
    places = params["proxy_keep"] + params["random_keep"]
    method = load_method(
        "nacl",
        budget=params["sink_tokens"] + params["recent_protect"] + places,
        window_size=params["proxy_tokens"],
        sink_size=params["sink_tokens"],
        recent_size=params["recent_protect"],
        random_ratio=params["random_keep"] / places,
    )
    scores = method.score(LayerContext(0, 1, q, k, v))
    torch.testing.assert_close(scores, golden["out_score"], rtol=1e-4, atol=1e-5)
    if params["random_keep"]:
        left = golden["out_rand_candidates"].long() + params["sink_tokens"]
        for head, rest in enumerate(left):
            chances = method.chances(scores[head, rest])
            torch.testing.assert_close(chances, golden["out_rand_p"][head], rtol=1e-4, atol=1e-5)
        lots = torch.full(scores.shape, 0.5, dtype=torch.float64).scatter(1, left, golden["out_rand_u"])
        monkeypatch.setattr(nacl_plugin, "uniforms", lambda *place: lots)
    assert kept(method, q, k, v) == golden["out_kept"][0].tolist()


def test_nacl_averages_the_attention_of_a_group() -> None:
    q, k, v = qkv(40)
    method = load_method("nacl", budget=20, causal=True, window_size=5)
    expected = reference_attention(q, k)[:, -5:].sum(1).unflatten(0, (2, 2)).mean(1)
    torch.testing.assert_close(method.score(LayerContext(0, 1, q, k, v)).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("temperature", "even"), [(0.02, False), (0, True)])
def test_nacl_draws_by_score_or_evenly(temperature: float, even: bool) -> None:
    """How often each token is drawn, against its chances; the best by score are sure of their places."""
    layer = LayerContext(0, 1, *qkv(40))
    settings = {"budget": 20, "sink_size": 4, "temperature": temperature, "random_ratio": 0.125}  # 1 of 8 places
    score = load_method("nacl", **settings).score(layer)[0, 4:32]
    hits = torch.zeros(28)
    for seed in range(300):
        chosen = load_method("nacl", **settings, random_seed=seed).select(layer)[0]
        assert len(chosen.unique()) == 20
        assert chosen[:4].tolist() == [0, 1, 2, 3] and chosen[-8:].tolist() == list(range(32, 40))
        hits[chosen[4:12] - 4] += 1
    best, rest = score.argsort(descending=True).split([7, 21])
    assert (hits[best] == 300).all()
    expected = torch.full((21,), 1 / 21) if even else (score[rest] / temperature).softmax(0)
    assert (hits[rest] / 300 - expected).abs().max() < 0.1
    assert bool(hits[rest].max() > 60) is not even


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"recent_size": 5}, "--recent_size is 5.*8 or more"),
        ({"proxy_tokens": "prefix", "causal": True}, "--proxy_tokens prefix.*--causal false"),
        ({"proxy_tokens": "edges", "decode_budget": "same"}, "--proxy_tokens edges.*--decode_budget"),
        ({"random_ratio": 1.5}, "--random_ratio is 1.5"),
    ],
)
def test_nacl_refuses_what_makes_no_sense(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load_method("nacl", budget=32, **settings)


@pytest.mark.parametrize("rows", [7, 256])
@pytest.mark.parametrize("case", ["lambda0.07", "lambda0.5"])
def test_rkv_of_its_authors(shared: Path, case: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many keys are compared at once; one key of the second case has nothing similar to it."""
    monkeypatch.setattr(rkv_plugin, "ROWS", rows)
    golden = Golden(shared, f"rkv__official_{case}")
    threshold = golden.params["similarity_threshold"]
    k, v = golden["in_k"][0], golden["in_v"][0]
    past = k.shape[1] - golden.params["window_size"]
    method = load_method(
        "rkv",
        budget=golden.params["budget"],
        redundancy_threshold=threshold,
        **golden.settings("window_size", "kernel_size", "mix_lambda"),
    )
    layer = LayerContext(0, 1, golden["in_q_window"][0], k, v)  # as while decoding: the last queries alone
    repeated = rkv_plugin.redundancy(k, threshold)[:, :past]
    torch.testing.assert_close(repeated, golden["out_redundancy"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.score(layer)[:, :past], golden["out_final_score"][0], rtol=1e-4, atol=1e-6)
    assert method.select(layer).tolist() == golden["out_kept"][0].tolist()


def test_rkv_holds_copies_against_all_but_the_last() -> None:
    q, k, v = qkv(60)
    copies = list(range(5, 45, 4))
    k[:, copies] = k[:, 5:6]
    method = load_method("rkv", budget=40, mix_lambda=0.0)
    scores = method.score(LayerContext(0, 1, q, k, v))
    for head in range(2):
        assert scores[head, copies[:-1]].max() < scores[head, copies[-1]]
    for head in kept(method, q, k, v):
        assert copies[-1] in head and not set(copies[:-1]) & set(head)


def test_rkv_scores_a_prompt_and_what_is_stored_alike() -> None:
    """For each query head by itself, where attention alone counts: against plain attention over the past."""
    q, k, v = qkv(40)
    method = load_method("rkv", budget=20, mix_lambda=1.0, kernel_size=1, kv_cache_granularity="query_head")
    wide = k.repeat_interleave(2, 0)
    past = (q[:, -8:] @ wide[:, :-8].transpose(1, 2) / 8**0.5).softmax(-1).mean(1)
    stored = LayerContext(0, 1, q[:, -8:], wide, wide, listed_positions=torch.arange(3, 43).expand(4, -1))
    for layer in (LayerContext(0, 1, q, k, v), stored):
        torch.testing.assert_close(method.score(layer)[:, :-8], past, rtol=1e-4, atol=1e-5)


class TestSlidingWindow(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method("slidingwindow", budget=budget)


class TestRandom(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method("random", budget=budget, decode_budget="same")


class TestL2Norm(MethodContract):
    keeps_newest = False
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method("l2norm", budget=budget, skip_layers=(), decode_budget="same")


class TestNACL(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method("nacl", budget=budget, decode_budget="same")


class TestRKV(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method("rkv", budget=budget)
