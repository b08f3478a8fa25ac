"""Clusters of keys, and which of their tokens are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvfactory_plugins import semantic as semantic_plugin
from test_golden_methods import Golden
from torch import Tensor

from kvfactory import Engine, UserError, load_method
from kvfactory.context import LayerContext, pool
from kvfactory.method import Method
from kvfactory.rotary import rotated
from kvfactory.testing import MethodContract, compress_layer, reference_attention, tiny_model, tiny_prompts

FREQUENCIES = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
STRATEGIES = ["hybrid", "attention", "representative", "thesis"]


def layer_of(tokens: int, seed: int = 0, groups: int = 6) -> LayerContext:
    """Two KV heads of keys that come in groups, rotated, and four query heads."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(2, groups, 8, generator=generator) * 3
    which = torch.randint(groups, (2, tokens), generator=generator)
    plain = places[torch.arange(2)[:, None], which] + torch.randn(2, tokens, 8, generator=generator) * 0.3
    keys = rotated(plain, torch.arange(tokens)[None], FREQUENCIES)
    queries, values = (torch.randn(heads, tokens, 8, generator=generator) for heads in (4, 2))
    return LayerContext(0, 1, queries, keys, values, inverse_frequencies=FREQUENCIES)


def clusters_of(method: Any, layer: LayerContext) -> tuple[Tensor, Tensor]:
    """Labels and nearness of tokens 4 to the eighth from last, as the method has them."""
    plain = rotated(layer.keys, -torch.arange(layer.num_tokens)[None], FREQUENCIES)
    labels, nearness = method.clusters(plain[:, 4:-8])
    return labels, nearness


def expected_order(strategy: str, labels: list[int], near: list[float], mass: list[float], pooled: list[float]) -> Any:
    """Tokens of one head, best first, one by one."""
    weights = mass if strategy != "representative" else [1 / len(labels)] * len(labels)
    quality = pooled if strategy == "attention" else near
    keys = {}
    for cluster in set(labels):
        its = [token for token, label in enumerate(labels) if label == cluster]
        weight = sum(weights[token] for token in its)
        for rank, token in enumerate(sorted(its, key=lambda token: -quality[token])):
            later = pooled[token] if strategy == "hybrid" else weight / (rank + 1)
            keys[token] = (rank != 0, -weight if rank == 0 else -later, token)
    return sorted(keys, key=keys.__getitem__)


@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
@pytest.mark.parametrize("strategy", STRATEGIES[:3])
def test_the_order_of_tokens(strategy: str, granularity: str) -> None:
    """Against one written out, up to orders that rounding decides."""
    layer = layer_of(70)
    method: Any = load_method(
        "semantic", budget=30, strategy=strategy, num_clusters=9, kv_cache_granularity=granularity
    )
    labels, nearness = clusters_of(method, layer)
    votes = reference_attention(layer.queries, layer.keys)[:, -8:].sum(1)[:, 4:-8].float()
    heads = 2 if granularity == "kv_head" else 4
    mass = votes.unflatten(0, (heads, -1)).mean(1)
    pooled = pool(mass, 7, "maxpool")
    scores = method.shared_scores(layer)
    assert scores.shape == (heads, 70) and scores.dtype == torch.float32 and (scores >= 0).all()
    for head in range(heads):
        kv_head = head * 2 // heads
        row = labels[kv_head].tolist(), nearness[kv_head].tolist(), mass[head].tolist(), pooled[head].tolist()
        order = torch.tensor(expected_order(strategy, *row)) + 4
        in_order = scores[head, order]
        assert (in_order[1:] <= in_order[:-1] + 1e-5).all()
        first = labels[kv_head].unique().numel()
        assert set(order[:first].tolist()) == set(scores[head].topk(first).indices.tolist())


@given(st.sampled_from(STRATEGIES[:3]), st.integers(50, 90), st.integers(1, 30), st.integers(0, 1000))
@settings(max_examples=25)
def test_every_cluster_keeps_a_token_once_there_is_room(strategy: str, tokens: int, clusters: int, seed: int) -> None:
    layer = layer_of(tokens, seed)
    method: Any = load_method("semantic", budget=clusters + 12, strategy=strategy, num_clusters=clusters)
    labels, _ = clusters_of(method, layer)
    for head, kept in enumerate(method.select(layer)):
        assert kept[:4].tolist() == [0, 1, 2, 3] and kept[-8:].tolist() == list(range(tokens - 8, tokens))
        assert set(labels[head, kept[4:-8] - 4].tolist()) == set(labels[head].tolist())


def test_copies_share_one_representative() -> None:
    """Equal keys at any positions are one cluster; there are fewer clusters than were asked for, and none is lost."""
    plain = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)) * 3
    which = torch.arange(60) % 5
    keys = rotated(plain[:, which], torch.arange(60)[None], FREQUENCIES)
    method = load_method("semantic", budget=17, strategy="representative", num_clusters=16, sink_size=4)
    for kept in compress_layer(method, keys.repeat_interleave(2, 0), keys, keys).positions():
        assert which[kept[4:-8]].sort().values.tolist() == [0, 1, 2, 3, 4]


def test_of_two_tokens_the_first_is_the_representative() -> None:
    """Both are equally near to their mean, and rounding is not what decides."""
    plain = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(3)) * 9
    plain = torch.cat([plain, plain + torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(4)) * 0.1], 1)
    keys = rotated(plain, torch.arange(60)[None], FREQUENCIES)
    settings = {"sink_size": 0, "recent_size": 0, "num_clusters": 30}
    for strategy in ("representative", "hybrid"):
        store = compress_layer(load_method("semantic", budget=30, strategy=strategy, **settings), keys, keys, keys)
        for kept in store.positions():
            assert (
                len((kept % 30).unique()) == 30 and (kept < 30).sum() >= 29
            )  # a tie on the edge of a digit is not one


def test_places_follow_size() -> None:
    """Without attention a cluster three times as large keeps three times as many."""
    plain = torch.randn(2, 80, 8, generator=torch.Generator().manual_seed(1))
    plain[:, ::4] += 50
    keys = rotated(plain, torch.arange(80)[None], FREQUENCIES)
    settings = {"strategy": "representative", "num_clusters": 2, "sink_size": 0, "recent_size": 0}
    for kept in compress_layer(load_method("semantic", budget=40, **settings), keys, keys, keys).positions():
        assert (kept % 4 == 0).sum() == 10


def test_the_original_keeps_what_it_kept(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its clusters in place of ours."""
    golden = Golden(shared, "semantic_cluster__thesis_representative")
    labels, centroids = golden["in_labels"][None].long(), golden["in_centroids"][None].float()
    monkeypatch.setattr(semantic_plugin, "kmeans", lambda points, clusters, **_: (centroids, labels))
    keys = golden["in_k"][0]
    params = golden.params
    method = load_method("semantic", budget=params["budget"], num_clusters=params["num_clusters"], strategy="thesis")
    assert method.protected() == (0, params["recent_window"])
    layer = LayerContext(0, 1, keys, keys, keys)
    for row in method.score(layer):
        assert (row > keys.shape[1]).nonzero()[:, 0].tolist() == golden["out_representatives"].tolist()
    for positions in method.compress(layer).positions():
        assert positions.tolist() == golden["out_kept"].tolist()


@pytest.mark.parametrize(("budget", "recent"), [(16, 1), (40, 4), (9, 1), (50, 5)])
def test_the_original_is_representatives_and_then_the_most_recent(budget: int, recent: int) -> None:
    layer = layer_of(70)
    method: Any = load_method("semantic", budget=budget, num_clusters=12, strategy="thesis")
    labels, nearness = method.clusters(layer.keys.mean(0, keepdim=True))
    groups = [(labels[0] == cluster).nonzero()[:, 0] for cluster in labels[0].unique()]
    best_first = sorted(groups, key=lambda group: -len(group))
    representatives = [int(group[nearness[0, group].argmax()]) for group in best_first]
    expected = set(range(70 - recent, 70))
    for token in [*representatives, *reversed(range(70))]:
        if len(expected) < budget:
            expected.add(token)
    one, other = method.select(layer).tolist()
    assert one == other
    if budget > 12 + recent:
        assert set(one) == expected
    else:  # which of equally large clusters lose theirs is open here
        assert len(set(one) & set(representatives)) >= budget - recent


@pytest.mark.parametrize(("settings", "protected", "least"), [
    ({}, (4, 8), 13),
    ({"sink_size": 0, "recent_size": 3}, (0, 3), 4),
    ({"strategy": "thesis"}, (0, 4), 2),
    ({"strategy": "thesis", "sink_size": 2}, (2, 4), 4),
    ({"strategy": "thesis", "recent_size": 0}, (0, 0), 1),
])  # fmt: skip
def test_what_is_protected(settings: dict[str, Any], protected: tuple[int, int], least: int) -> None:
    assert load_method("semantic", budget=40, **settings).protected() == protected
    smallest = load_method("semantic", budget=least, **settings)
    assert smallest.least_budget() == least == sum(smallest.protected()) + 1
    with pytest.raises(UserError, match="nothing to choose"):
        load_method("semantic", budget=least - 1, **settings)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_attention_is_looked_at_where_it_counts(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = strategy in ("hybrid", "attention")
    asked = []
    whole = LayerContext.window_attention
    monkeypatch.setattr(LayerContext, "window_attention", lambda *each: asked.append(each[1]) or whole(*each))
    monkeypatch.setattr(LayerContext, "attention_mass", None)
    method = load_method("semantic", budget=30, strategy=strategy)
    method.compress(layer_of(70))
    assert asked == ([8] if looks else []) and method.recent_queries == (8 if looks else 0)


def test_clusters_are_shared_by_strategies_and_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    kmeans = semantic_plugin.kmeans
    monkeypatch.setattr(semantic_plugin, "kmeans", lambda *args, **named: asked.append(1) or kmeans(*args, **named))
    layer = layer_of(70)
    for strategy in STRATEGIES[:3]:
        for budget in (20, 40):
            load_method("semantic", budget=budget, strategy=strategy).compress(layer)
    assert len(asked) == 1


def test_keys_are_clustered_as_if_they_had_no_position() -> None:
    """What is stored, at its true positions, gives the clusters of the same keys elsewhere."""
    layer = layer_of(60)
    plain = rotated(layer.keys, -torch.arange(60)[None], FREQUENCIES)
    true = torch.stack([torch.arange(60) * 3, torch.arange(60) * 2 + 7])
    moved = LayerContext(
        0, 1, layer.queries, rotated(plain, true, FREQUENCIES), layer.values, None, FREQUENCIES, listed_positions=true
    )
    method = load_method("semantic", budget=20, strategy="representative", num_clusters=6)
    assert torch.equal(method.select(layer), method.select(moved))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_clusters": 0}, "--num_clusters is 0"),
        ({"kernel_size": 4}, "--kernel_size is 4"),
        ({"strategy": "representative", "window_size": 16}, "--window_size 16: --strategy representative"),
        ({"strategy": "thesis", "gqa_score_agg": "max"}, "--gqa_score_agg max: --strategy thesis"),
        ({"recent_size": 30}, "budget 30 leaves"),
    ],
)
def test_settings_that_do_nothing_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load_method("semantic", budget=30, **settings)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_composes(strategy: str, tmp_path: Path) -> None:
    """With each way to split a budget, to merge, to store and to go on while decoding: as many entries as were asked for."""
    table = tmp_path / "layers.json"
    table.write_text(json.dumps([3, 2, 1]))
    parts: list[dict[str, Any]] = [
        {"allocator": "uniform", "quant_method": "kivi"},
        {"allocator": "uniform", "merge": "weighted", "decode_budget": "same"},
        {"allocator": "pyramid", "quant_method": "kivi"},
        {"allocator": "head-adaptive", "decode_budget": "same", "kv_cache_granularity": "query_head"},
        {"allocator": "layer-table", "layer_table": str(table), "merge": "pivot"},
    ]
    methods = [load_method("semantic", budget=24, strategy=strategy, num_clusters=8, **each) for each in parts]
    engine = Engine(tiny_model())
    sequences = engine.prefill(tiny_prompts(60)[0][0], methods)
    for sequence in sequences:
        assert abs(sum(sequence.cache.kept()) - 3 * 24) <= 3
    branches = [sequence.fork() for sequence in sequences]
    tokens = engine.decode(sequences, 6)
    assert engine.decode(branches, 6) == tokens
    for each, sequence in zip(parts, sequences, strict=True):
        grown = 0 if "decode_budget" in each else 5
        assert abs(sum(sequence.cache.kept()) - 3 * (24 + grown)) <= 3


class TestSemantic(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method("semantic", budget=budget, num_clusters=6, decode_budget="same")


class TestSemanticByAttention(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        settings = {"strategy": "attention", "kv_cache_granularity": "query_head", "decode_budget": "same"}
        return load_method("semantic", budget=budget, **settings)


class TestSemanticRepresentatives(MethodContract):
    def make(self, budget: int) -> Method:
        return load_method("semantic", budget=budget, strategy="representative", allocator="head-adaptive")


class TestSemanticOfTheThesis(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        settings = {"strategy": "thesis", "num_clusters": 8, "decode_budget": "same", "decode_interval": 4}
        return load_method("semantic", budget=budget, **settings)
