"""CaM: against the code of its authors and of KVCache-Factory, a slow version of each rule, and what always holds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import kvfactory_plugins.cam as cam
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvfactory_plugins.cam import CamMerge
from test_golden_methods import Golden
from test_merges import Eviction, eviction, evictions
from torch import Tensor

from kvfactory import Engine, EvictionMethod, LayerContext, Method, UserError, load_method
from kvfactory.indexing import entries
from kvfactory.testing import MethodContract, compress_layer, reference_attention

Denominator = Literal["next", "later"]


def all_but(token: int, tokens: int, heads: int) -> Tensor:
    return torch.tensor([[each for each in range(tokens) if each != token]] * heads)


# ---- against the code of others ----


@pytest.mark.parametrize("granularity", ["query_head", "kv_head"])
def test_kvcache_factory(shared: Path, monkeypatch: pytest.MonkeyPatch, granularity: str) -> None:
    golden = Golden(shared, f"cam__kvf_{granularity}")
    monkeypatch.setattr(cam, "uniforms", lambda keys, seed: golden["in_u"].T)
    method = load_method(
        "cam",
        budget=golden.params["max_capacity_prompt"],
        cam_rule="kvcache-factory",
        sampling="bernoulli",
        start_ratio=golden.params["start_budget_ratio"],
        **golden.settings("window_size", "merge_budget"),
    )
    q, k, v = golden.qkv()
    store, kept = compress_layer(method, q, k, v), golden["out_kept"][0].long()
    assert torch.equal(torch.stack(store.positions()), kept)
    torch.testing.assert_close(torch.stack(store.values()), golden["out_v_out"][0], rtol=1e-3, atol=1e-4)
    assert torch.equal(torch.stack(store.keys()), LayerContext(0, 1, q, k, v).gather(kept)[0])


def test_official_decode_step(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden(shared, "cam__official_decode_merge")
    values, attention = golden["in_v"][0], golden["in_attn"][0, :, 0]
    heads, tokens = attention.shape
    kept = all_but(tokens - golden.params["recent_budget"] + 1, tokens, heads)
    monkeypatch.setattr(cam, "uniforms", lambda keys, seed: golden["in_u"][:, None])
    merge = CamMerge(merge_budget=golden.params["merge_budget"], denominator="later", sampling="bernoulli")
    _, merged = merge.merge(values, values, kept, attention)
    torch.testing.assert_close(merged, entries(golden["out_v_out"][0], kept), rtol=1e-4, atol=1e-5)
    ones = torch.ones(heads, tokens, 1)
    _, added = replace(merge, sampling="expected").merge(ones, ones, kept, attention)
    probability = (added.amax(1)[:, 0] - 1) * golden.params["merge_budget"]
    torch.testing.assert_close(probability, golden["out_merge_prob"], rtol=1e-4, atol=1e-5)


def test_official_streaming_step(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden(shared, "cam__official_streaming_slicev")
    values, attention = golden["in_v"][0], golden["in_accum_attn"][0, :, 0]
    start, end = golden.params["start"], golden.params["end"]
    kept = all_but(start - 1, end, len(values))
    monkeypatch.setattr(cam, "uniforms", lambda keys, seed: golden["in_u"][0])
    merge = CamMerge(merge_budget=golden.params["merge_num"], sampling="bernoulli")
    _, merged = merge.merge(values, values, kept, attention)
    torch.testing.assert_close(merged[:, start - 1 :], golden["out_v_recent"][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(merged[:, : start - 1], values[:, : start - 1])
    ones = torch.ones(len(values), end, 1)
    _, added = replace(merge, sampling="expected").merge(ones, ones, kept, attention)
    probability = (added.amax(1) - 1)[None] * golden.params["merge_num"]
    torch.testing.assert_close(probability, golden["out_merge_prob"], rtol=1e-4, atol=1e-5)


def test_end_to_end_on_the_embedded_model(shared: Path, embedded: Any) -> None:
    """KVCache-Factory's selection with its merging held off, token for token, and the best 20 at each step.

    Its run that merges always cannot be had again: there the prompt itself goes on with the merged values, which moves
    even the first token's logits. Here they are those of the whole cache, whatever is merged.
    """
    golden = Golden(shared, "e2e__smollm2_kvcache_factory")
    engine = Engine(embedded)
    shape = {"budget": 64, "window_size": 8, "kv_cache_granularity": "query_head"}
    rule = {"cam_rule": "kvcache-factory", "merge_budget": 8}
    methods = [load_method("cam", **shape, merge="none"), load_method("cam", **shape, **rule)]
    never, always = engine.prefill(golden["in_input_ids"], methods)
    assert golden["out_cam_always_merge_query_head__prefill_logit_change"] > 1
    assert always.logits is not None
    first = always.logits[golden["out_fullkv__top20_ids"][0].long()]
    torch.testing.assert_close(first, golden["out_fullkv__top20_logits"][0], rtol=0, atol=1e-3)
    assert not torch.equal(*(torch.stack(each.cache.stores[3].values()) for each in (never, always)))
    case, held = "out_cam_never_merge_query_head", 0.0
    for step, token in enumerate(golden[f"{case}__tokens"].tolist()):
        assert never.logits is not None
        best = never.logits.topk(20)
        assert best.indices[0] == token
        assert best.indices.tolist() == golden[f"{case}__top20_ids"][step].tolist()
        torch.testing.assert_close(best.values, golden[f"{case}__top20_logits"][step], rtol=0, atol=1e-3)
        held = never.cache.kept()[0]
        engine.extend(never, [token])
    assert held == golden[f"{case}__cache_len"][0]


# ---- against slow versions ----


def cam_slowly(case: Eviction, head: int, budget: int, denominator: Denominator) -> list[Tensor]:
    values, scores, kept = case.values[head].double(), case.scores[head].double(), case.kept[head].tolist()
    merged = {keeper: values[keeper].clone() for keeper in kept}
    for gone in case.dropped(head):
        takers = [keeper for keeper in kept if keeper > gone][:budget]
        compared = takers if denominator == "next" else range(gone + 1, len(values))
        usual = sum(scores[each].item() for each in compared) / len(compared) if compared else 0
        attention = scores[gone].item()
        probability = min(attention / usual, 1) if usual else float(attention > 0)
        for taker in takers:
            merged[taker] += probability * values[gone] / budget
    return list(merged.values())


@given(evictions, st.integers(1, 8), st.sampled_from(["next", "later"]))
def test_evicted_values_are_passed_on(case: Eviction, budget: int, denominator: Denominator) -> None:
    keys, values = CamMerge(merge_budget=budget, denominator=denominator).merge(*case)
    assert torch.equal(keys, entries(case.keys, case.kept))
    for head in range(len(values)):
        expected = torch.stack(cam_slowly(case, head, budget, denominator))
        torch.testing.assert_close(values[head].double(), expected, rtol=1e-4, atol=1e-5)


@given(evictions, st.integers(1, 8))
def test_every_value_is_passed_on_in_turn(case: Eviction, budget: int) -> None:
    keys, values = CamMerge(merge_budget=budget, cam_rule="kvcache-factory").merge(*case)
    start, tokens = math.ceil(0.1 * case.keys.shape[1]), case.keys.shape[1]
    assert torch.equal(keys, entries(case.keys, case.kept))
    for head in range(len(values)):
        merged, scores = case.values[head].double(), case.scores[head].double()
        for token in range(start, tokens - budget):
            highest = max(*scores[:start].tolist(), *scores[token : token + budget].tolist())
            share = scores[token] / highest if highest else 0.0
            for taker in range(token + 1, token + 1 + budget):
                merged[taker] += share * merged[token] / budget
        torch.testing.assert_close(values[head].double(), merged[case.kept[head]], rtol=1e-4, atol=1e-4)


def test_scores_are_the_attention_of_the_window_on_all_of_the_prompt() -> None:
    torch.manual_seed(5)
    q, k = torch.randn(4, 30, 8), torch.randn(2, 30, 8)
    received = reference_attention(q, k)[:, -6:].sum(1).view(2, 2, 30)
    for agg, expected in (("mean", received.mean(1)), ("max", received.amax(1))):
        method = load_method("cam", budget=12, window_size=6, gqa_score_agg=agg)
        torch.testing.assert_close(method.score(LayerContext(0, 1, q, k, k)).double(), expected, rtol=1e-4, atol=1e-5)
        best = expected[:, :-6].topk(6).indices.sort().values
        assert torch.equal(torch.stack(compress_layer(method, q, k, k).positions())[:, :6], best)


# ---- what always holds ----


@pytest.mark.parametrize("sampling", ["expected", "bernoulli"])
@given(case=evictions, budget=st.integers(1, 4))
def test_nothing_is_lost_where_all_is_merged_and_enough_follow(
    sampling: Literal["expected", "bernoulli"], case: Eviction, budget: int
) -> None:
    tokens = case.keys.shape[1]
    longer = torch.cat([case.kept, torch.arange(tokens, tokens + budget).expand(len(case.kept), -1)], 1)
    keys, values = (torch.cat([x, torch.randn(len(x), budget, 6)], 1) for x in (case.keys, case.values))
    falling = torch.arange(tokens + budget, 0.0, -1).expand(len(case.kept), -1)
    _, merged = CamMerge(merge_budget=budget, sampling=sampling).merge(keys, values, longer, falling)
    torch.testing.assert_close(merged.sum(1), values.sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["evicted", "kvcache-factory"])
@pytest.mark.parametrize("sampling", ["expected", "bernoulli"])
def test_what_nobody_attends_to_leaves_nothing(rule: Any, sampling: Any) -> None:
    case = eviction()
    _, values = CamMerge(cam_rule=rule, sampling=sampling).merge(*case._replace(scores=torch.zeros(3, 40)))
    assert torch.equal(values, entries(case.values, case.kept))


def test_what_stays_bit_by_bit() -> None:
    """Entries before the first that is evicted, and those beyond the reach of the last."""
    case = eviction(heads=1, tokens=12)
    _, values = CamMerge(merge_budget=2).merge(*case._replace(kept=torch.tensor([[0, 1, 4, 5, 6, 7, 8]])))
    changed = (values != case.values[:, [0, 1, 4, 5, 6, 7, 8]]).any(-1)[0].tolist()
    assert changed == [False, False, True, True, False, False, False]


@pytest.mark.parametrize("rule", ["evicted", "kvcache-factory"])
def test_only_ratios_of_scores_count(rule: Any) -> None:
    case, merge = eviction(), CamMerge(merge_budget=3, cam_rule=rule)
    _, values = merge.merge(*case)
    torch.testing.assert_close(merge.merge(*case._replace(scores=case.scores * 512))[1], values, rtol=0, atol=0)


class Signed(EvictionMethod):
    signed_scores = True

    def score(self, layer: LayerContext) -> Tensor:
        return -layer.keys.norm(dim=-1)


def test_scores_below_zero_make_no_probabilities() -> None:
    with pytest.raises(UserError, match="cam takes scores for weights"):
        Signed(budget=9, merge=CamMerge())


# ---- draws ----


@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_draws_are_uniform_and_of_their_own(spread: float) -> None:
    """However alike the keys."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.ones(64) + spread * torch.randn(8, 5000, 64, generator=generator)
    draws = cam.uniforms(keys, 1)
    assert draws.min() >= 0 and draws.max() < 1
    shares = draws.histc(20, 0, 1) / draws.numel()
    assert (shares - 1 / 20).abs().max() < 0.004
    for other in (draws.roll(1, 0), draws.roll(1, 1), cam.uniforms(keys, 2)):
        assert torch.corrcoef(torch.stack([draws.flatten(), other.flatten()]))[0, 1].abs() < 0.02
    torch.testing.assert_close(cam.uniforms(keys[3:4, 7:9], 1), draws[3:4, 7:9], rtol=0, atol=1e-3)


def test_draws_merge_as_often_as_their_probability_says() -> None:
    keys = torch.randn(400, 2, 16, generator=torch.Generator().manual_seed(6))
    values, kept = torch.ones(400, 2, 1), torch.ones(400, 1, dtype=torch.long)
    scores = torch.tensor([0.3, 1.0]).expand(400, -1)
    merged = [
        CamMerge(merge_budget=1, sampling="bernoulli", merge_seed=seed).merge(keys, values, kept, scores)[1] - 1
        for seed in range(20)
    ]
    assert all(set(each.flatten().tolist()) == {0.0, 1.0} for each in merged)
    assert abs(torch.stack(merged).mean() - 0.3) < 0.02
    assert torch.equal(
        merged[1], CamMerge(merge_budget=1, sampling="bernoulli").merge(keys, values, kept, scores)[1] - 1
    )


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_size": 0}, "--window_size is 0"),
        ({"merge_budget": 0}, "--merge_budget is 0"),
        ({"start_ratio": 1, "cam_rule": "kvcache-factory"}, "--start_ratio is 1"),
        ({"start_ratio": 0.2}, "--start_ratio 0.2 is of --cam_rule kvcache-factory"),
        ({"denominator": "later", "cam_rule": "kvcache-factory"}, "--denominator later"),
        ({"merge_seed": 7}, "--merge_seed 7 is of --sampling bernoulli"),
        ({"cam_rule": "kvcache-factory", "decode_budget": "same"}, "leave --decode_budget out"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_method("cam", budget=32, **settings)


# ---- the contract ----


class TestCam(MethodContract):
    def make(self, budget: int) -> Method:
        return load_method("cam", budget=budget, window_size=4)


class TestCamWhileDecoding(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method("cam", budget=budget, window_size=4, decode_budget="same", denominator="later")


class TestCamKVCacheFactory(MethodContract):
    def make(self, budget: int) -> Method:
        return load_method("cam", budget=budget, window_size=4, cam_rule="kvcache-factory", merge_budget=4)


class TestCamBernoulli(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method("cam", budget=budget, window_size=4, decode_budget="same", sampling="bernoulli")


class TestSnapKVCam(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method("snapkv", budget=budget, window_size=4, merge="cam", decode_budget="same")
