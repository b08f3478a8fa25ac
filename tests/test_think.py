"""ThinK: which channels of which keys are gone, and that attention is that over the others."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import small_settings
from kvfactory_plugins.think import PrunedColumn, channel_scores, kept_channels
from test_golden_methods import Golden
from torch import Tensor

from kvfactory import DenseStore, Engine, HeadwiseStore, UserError, compress, load_method
from kvfactory.jobs import make_jobs
from kvfactory.method import Method
from kvfactory.registry import get_registry
from kvfactory.testing import MethodContract, compress_layer, generate, tiny_model, tiny_prompts

REGISTRY = get_registry()
EVICTING = sorted(
    name for name, entry in REGISTRY.methods.items() if REGISTRY.has_budget(name) and "key_pruning" not in entry.parts
)


class TestThinK(MethodContract):
    def make(self, budget: int) -> Method:
        return load_method("think", budget=budget, window_size=4, whole_size=6)


class TestTOVAInThinK(MethodContract):
    decode_budget = 16
    keeps_newest = False

    def make(self, budget: int) -> Method:
        return load_method("tova", budget=budget, key_pruning="think", whole_size=6)

    def test_the_decode_budget_is_kept(self) -> None:
        """In entries; bytes grow a little as pruned keys make room for whole ones."""
        _, rows = self._rows(60, tokens=48)
        assert all(max(store.lengths()) <= 16 for store in rows[0].stores)


class TestAdaKVInThinKMerged(MethodContract):
    decode_budget = 20

    def make(self, budget: int) -> Method:
        pruned = {"key_pruning": "think", "whole_size": 4}
        return load_method("adakv", budget=budget, window_size=4, merge="pivot", decode_budget="same", **pruned)

    def test_the_decode_budget_is_kept(self) -> None:
        _, rows = self._rows(60, tokens=48)
        assert all(sum(store.lengths()) / len(store.lengths()) <= 17 for store in rows[0].stores)


def layer(tokens: int, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(heads, tokens, dim, generator=generator) for heads in (4, 2, 2))
    return q, k, v


@pytest.mark.parametrize("ratio", ["0.3", "0.4", "0.5"])
def test_the_authors_pruner(shared: Path, ratio: str) -> None:
    golden = Golden(shared, f"think__official_pruner_{ratio}")
    q, k, _ = golden.qkv()
    scores = channel_scores(q, k)
    torch.testing.assert_close(scores, golden["out_channel_score"][0], rtol=1e-4, atol=1e-5)
    channels = kept_channels(scores, float(ratio))
    assert torch.equal(mask_of(channels, k.shape[2]), golden["out_keep_mask"][0])
    pruned = PrunedColumn.of(k[:, : -golden.params["recent_size"]], channels)
    assert torch.equal(pruned.kept, golden["out_k_pruned"][0])


def mask_of(channels: Tensor, dim: int) -> Tensor:
    return torch.zeros(len(channels), dim, dtype=torch.bool).scatter(1, channels.long(), True)


def test_snapkv_with_think(shared: Path) -> None:
    """Tokens, channels, and attention; with the recent tokens that the reference's order of its cache makes whole."""
    golden = Golden(shared, "think__kvf_snapkv_plus_think")
    q, k, v = golden.qkv()
    params, dim = golden.params, q.shape[2]
    snapkv = {each: params[each] for each in ("window_size", "kernel_size", "pooling")}
    own = {"whole_size": params["recent_size"], "pruning_ratio": params["ratio"]}
    store = compress_layer(load_method("think", budget=params["max_capacity_prompt"], **snapkv, **own), q, k, v)
    order = golden["out_kept_in_cache_order"][0].long()
    assert torch.equal(torch.stack(store.positions()), order.sort(1).values)
    channels = kept_channels(channel_scores(q, torch.stack([k[head, each] for head, each in enumerate(order)])), 0.4)
    assert torch.equal(mask_of(channels, dim), golden["out_keep_mask"][0])
    old, recent = order[:, : -params["recent_size"]], order[:, -params["recent_size"] :]
    for head in range(len(q)):
        pruned = PrunedColumn.of(k[head : head + 1, old[head]], channels[head : head + 1]).decoded()[0]
        keys = torch.cat([pruned, k[head, recent[head]]])
        weights = (golden["in_q_new"][0, head] @ keys.T / math.sqrt(dim)).softmax(-1)
        output = weights @ v[head, order[head]]
        torch.testing.assert_close(output, golden["out_attn_out"][0, head], rtol=1e-4, atol=1e-5)


def test_grouped_heads_as_kvpress(shared: Path) -> None:
    """Of the reference's queries the last 8 count, and all keys are pruned."""
    golden = Golden(shared, "think__kvpress_gqa")
    k = golden["in_k"][0]
    pruned = golden["out_pruned"][0]
    tokens, dim = k.shape[1:]
    angle = torch.arange(tokens)[:, None] * 10000.0 ** -(torch.arange(0, dim, 2) / dim)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    left, right = golden["in_q_pre"][0].chunk(2, -1)
    q = golden["in_q_pre"][0] * cos + torch.cat([-right, left], -1) * sin
    channels = kept_channels(channel_scores(q[:, -golden.params["window_size"] :], k), 0.5)
    assert torch.equal(~mask_of(channels, dim), pruned)
    torch.testing.assert_close(PrunedColumn.of(k, channels).decoded(), golden["out_k_out"][0])


def test_what_is_stored() -> None:
    """Old keys without the weak channels, recent and generated ones and all values whole; bytes are those."""
    q, k, v = layer(60)
    q[:, :, 5] = 0  # nobody asks for this channel
    store = compress_layer(load_method("fullkv", key_pruning="think", pruning_ratio=0.4, whole_size=10), q, k, v)
    keys, values = torch.stack(store.keys()), torch.stack(store.values())
    kept = mask_of(kept_channels(channel_scores(q, k), 0.4), 16)
    assert kept.sum(1).tolist() == [10, 10] and not kept[:, 5].any()
    assert torch.equal(keys[:, :50], k[:, :50] * kept[:, None])
    assert torch.equal(keys[:, 50:], k[:, 50:]) and torch.equal(values, v)
    assert store.nbytes() == 4 * 2 * (50 * 10 + 10 * 16 + 60 * 16) + 2 * 2 * 10
    new = torch.randn(2, 1, 16)
    for position in range(60, 75):
        store.append(new, new, position)
        store.observe(None)
    assert torch.equal(torch.stack(store.keys())[:, 60:], new.expand(-1, 15, -1)), "generated keys stay whole"


@pytest.mark.parametrize("tokens", [1, 5, 31, 32, 33])
def test_a_short_prompt_is_no_error(tokens: int) -> None:
    q, k, v = layer(tokens)
    store = compress_layer(load_method("think", budget=64), q, k, v)
    assert torch.equal(torch.stack(store.keys())[:, -32:], k[:, -32:])
    assert torch.equal(torch.stack(store.keys()), k) == (tokens <= 32)


@pytest.mark.parametrize("name", ["fullkv", *EVICTING])
def test_nothing_pruned_is_the_method_as_it_is(name: str) -> None:
    engine = Engine(tiny_model())
    ids, _ = tiny_prompts(90)
    own = small_settings(name)
    plain, pruned = (
        load_method(name, budget=40, **own, **part) for part in ({}, {"key_pruning": "think", "pruning_ratio": 0})
    )
    ours, theirs = engine.decode(engine.prefill(ids[0], [pruned, plain]), 12)
    assert ours == theirs


@pytest.mark.parametrize("name", EVICTING)
def test_every_method_evicts_with_pruned_keys(name: str) -> None:
    """The tokens are the method's, its heads' channels their own, and bytes fall with the ratio."""
    engine = Engine(tiny_model())
    ids, _ = tiny_prompts(90)
    method = partial(load_method, name, budget=40, **small_settings(name))
    pruned = [method(key_pruning="think", pruning_ratio=each, whole_size=8) for each in (0.0, 0.25, 0.5)]
    sequences = engine.prefill(ids[0], [method(), *pruned])
    for sequence in sequences[1:]:
        for ours, theirs in zip(sequence.cache.stores, sequences[0].cache.stores, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.positions(), theirs.positions(), strict=True))
            assert all(torch.equal(a, b) for a, b in zip(ours.values(), theirs.values(), strict=True))
            for a, b in zip(ours.keys(), theirs.keys(), strict=True):
                assert ((a == b) | (a == 0)).all() and torch.equal(a[-8:], b[-8:])
    assert all(a > b for a, b in pairwise(sequence.cache.nbytes() for sequence in sequences[1:]))
    engine.decode(sequences, 12)
    assert all(sequence.cache.kept() for sequence in sequences)


def test_a_head_alone_is_pruned_by_its_own_queries() -> None:
    q, k, v = layer(60)
    store = compress_layer(load_method("adakv", budget=30, key_pruning="think", whole_size=4), q, k, v)
    assert isinstance(store, HeadwiseStore)
    for head, (alone, positions) in enumerate(zip(store._stores, store.positions(), strict=True)):
        assert isinstance(alone, DenseStore)
        kept = mask_of(
            kept_channels(channel_scores(q[2 * head : 2 * head + 2], k[head : head + 1, positions]), 0.4), 16
        )
        assert torch.equal(store.keys()[head][:-4], (k[head, positions] * kept)[:-4])


def test_generate_with_pruned_keys() -> None:
    model = tiny_model()
    for kernel in ("eager", "sdpa"):
        model = tiny_model("llama", kernel)
        with compress(model, load_method("think", budget=40, whole_size=8)) as compression:
            assert generate(model, *tiny_prompts(60, 43)).shape == (2, 12)
        assert compression.cache is not None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"pruning_ratio": 1.0}, "--pruning_ratio is 1.0"),
        ({"whole_size": -1}, "--whole_size is -1"),
        ({"whole_size": 8, "recent_size": 8}, "one setting"),
        ({"quant_method": "kivi"}, "--quant_method kivi and --key_pruning think"),
    ],
)
def test_bad_settings_are_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_method("think", budget=64, **settings)


def test_recent_size_is_whole_size_where_the_name_is_free() -> None:
    assert load_method("think", budget=64, recent_size=9).settings()["whole_size"] == 9
    both = load_method("h2o", budget=64, key_pruning="think", recent_size=9).settings()
    assert (both["recent_size"], both["whole_size"]) == (9, 32)
    (job,) = make_jobs(REGISTRY, ["think"], [64], {}, {"recent_size": "9"})
    assert job.method.settings()["whole_size"] == 9
