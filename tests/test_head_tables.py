"""Budgets by heads: how tables are read, HeadKV and DuoAttention."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvfactory_plugins.duoattention import DuoAttention, distinct, retrieval_heads
from test_golden_methods import Golden

from kvfactory import Engine, LayerContext, Method, UserError, budget_tables, load_method
from kvfactory.budget_tables import HeadTable, LayerTable, head_budgets, read_head_table
from kvfactory.testing import MethodContract, compress_layer, reference_attention, tiny_model, tiny_prompts

TABLE = [[0.5, 0.25, 0.0, 1.0], [2.0, 0.125, 0.75, 0.375]]


def written(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


# ---- tables ----


def test_one_table_in_three_forms(tmp_path: Path) -> None:
    published = {f"{x}-{y}": [score, 0.0, 2 * score] for x, row in enumerate(TABLE) for y, score in enumerate(row)}
    lines = "\n".join("\t".join(f"{score:.6e}" for score in row) for row in TABLE)
    for name, content in {"a.json": published, "b.json": TABLE, "c.tsv": lines}.items():
        assert read_head_table(written(tmp_path / name, content)).tolist() == TABLE


def test_a_table_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    assert read_head_table(written(path, [[1, 2]])).tolist() == [[1, 2]]
    path.unlink()
    assert read_head_table(written(path, [[3, 4]])).tolist() == [[3, 4]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"0-0": [1], "1-1": [1]}, "no head 0-1"),
        ({"first": [1]}, "not such a table"),
        ({"0-0": []}, "0 or more"),
        ([[1, 2], [3]], "not such a table"),
        ([1, 2], "one list of numbers a layer"),
        ([[1, -1]], "0 or more"),
        ([[0, 0]], "not all of them 0"),
        ("[[1, Infinity]]", "0 or more"),
        ("nothing", "not such a table"),
        (7, "not such a table"),
    ],
)
def test_what_is_no_head_table_is_told(tmp_path: Path, content: Any, words: str) -> None:
    path = written(tmp_path / "table.json", content)
    for method, flag in (("headkv", "head_table"), ("duoattention", "head_patterns")):
        with pytest.raises(UserError, match=words) as caught:
            load_method(method, budget=32, **{flag: path})
        assert f"--{flag} {path}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_that_is_missing_or_of_another_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--head_table nowhere\.json: No such file"):
        load_method("headkv", budget=32, head_table="nowhere.json")
    q, k = torch.randn(6, 60, 4), torch.randn(3, 60, 4)
    for method, flag in (("headkv", "head_table"), ("duoattention", "head_patterns")):
        other = load_method(method, budget=32, **{flag: written(tmp_path / "table.json", TABLE)})
        with pytest.raises(UserError, match=f"--{flag} is of a model with 2 layers of 4 heads; .* 2 layers of 3"):
            compress_layer(other, q, k, k, 0, 2)


def test_a_layer_table_splits_the_budget_of_the_model(tmp_path: Path) -> None:
    path = written(tmp_path / "layers.json", [3, 0, 1.5, 2])
    allocator = LayerTable(layer_table=path)
    shares = {"budget": 20, "protected": 5, "num_layers": 4}
    counts = [allocator.counts(torch.zeros(2, 30), layer_index=layer, **shares) for layer in range(4)]
    assert counts == [[30, 30], [0, 0], [13, 13], [20, 20]], "37, 0, 18 and 25 of 80, 5 of each protected, 30 at most"
    with pytest.raises(UserError, match="has 4 numbers; this model has 3 layers"):
        allocator.counts(torch.zeros(2, 30), layer_index=0, budget=20, protected=5, num_layers=3)
    for content in (TABLE, {"a": 1}, 3):
        with pytest.raises(UserError, match="--layer_table"):
            LayerTable(layer_table=written(tmp_path / "layers.json", content))


# ---- HeadKV ----


@pytest.mark.parametrize(("case", "window"), [("official", 8), ("kvf", 0)])
def test_capacities_of_headkv(shared: Path, case: str, window: int) -> None:
    """KVCache-Factory splits the whole budget and keeps the window besides."""
    golden = Golden(shared, f"headkv__{case}_capacity_table")
    cases = [name for name in golden.arrays if name.startswith("out_")]
    assert cases
    for name in cases:
        budget, beta, temperature = re.fullmatch(r"out_\w+_B(\d+)_beta([\d.]+)(?:_temp([\d.]+))?", name).groups()
        ours = head_budgets(golden["in_head_score"], int(budget) - window, float(beta), float(temperature or 1))
        assert torch.equal(ours, golden[name].double()), name


@pytest.mark.parametrize("granularity", ["query_head", "kv_head"])
def test_headkv_keeps_by_capacities(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granularity: str
) -> None:
    golden = Golden(shared, f"headkv__kvf_select_{granularity}")
    capacities = golden["in_head_capacity"].double()
    monkeypatch.setattr(budget_tables, "head_budgets", lambda *_: capacities)
    settings = golden.settings("window_size", "kernel_size", "pooling")
    path = written(tmp_path / "table.json", capacities.tolist())
    method = load_method("headkv", budget=golden.params["max_capacity_prompt"], head_table=path, **settings)
    store = compress_layer(method, *golden.qkv(), golden.params["layer_idx"], len(capacities))
    assert store.lengths() == golden["out_head_lens"].tolist()
    for positions, row in zip(store.positions(), golden["out_kept"].tolist(), strict=True):
        assert positions.tolist() == [each for each in row if each != -1]


def lengths(method: Method, layers: int = 2, heads: int = 4, tokens: int = 200, seed: int = 1) -> list[list[int]]:
    """Entries of each stored head, layer by layer, of random layers."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(layers, heads * group, tokens, 8, generator=generator) for group in (2, 1))
    return [compress_layer(method, q[each], k[each], k[each], each, layers).lengths() for each in range(layers)]


def flat(rows: list[list[int]]) -> list[int]:
    return [each for row in rows for each in row]


def test_a_larger_beta_makes_heads_more_equal(tmp_path: Path) -> None:
    path = written(tmp_path / "table.json", TABLE)
    spans = []
    for beta in (1, 2, 8, 1000):
        held = flat(lengths(load_method("headkv", budget=40, head_table=path, beta=beta)))
        assert abs(sum(held) - 8 * 40) <= 2, "the model's budget, but for roundings"
        assert min(held) >= 8 + 32 - 32 // beta, "the window and what each head is sure of"
        spans.append(max(held) - min(held))
    assert spans == sorted(spans, reverse=True) and len(set(spans)) == 4 and spans[-1] == 0
    assert load_method("headkv", budget=40, head_beta=2) == load_method("headkv", budget=40, beta=2)
    even = load_method("headkv", budget=40, head_table=path, table_temperature=0)
    assert lengths(even) == [[40] * 4] * 2


def test_without_a_table_heads_share_by_the_mass_of_their_scores() -> None:
    scores = torch.tensor([[1.0, 0, 1, 0], [3, 3, 0, 0], [0, 0, 0, 0]]).repeat(1, 20)
    share = {"budget": 17, "protected": 5, "layer_index": 0, "num_layers": 1}
    assert HeadTable(beta=2).counts(scores, **share) == [round(6 + 18 * 2 / 8), round(6 + 18 * 6 / 8), 6]
    assert HeadTable(beta=2).counts(torch.zeros(3, 80), **share) == [12, 12, 12]


# ---- DuoAttention ----


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_retrieval_heads_by_the_authors_rule(shared: Path, sparsity: float) -> None:
    golden = Golden(shared, "duoattention__official_sparsify")
    alpha, expected = golden["in_alpha"], golden[f"out_full_heads_{sparsity}"].bool()
    assert torch.equal(retrieval_heads(alpha, sparsity), expected)
    assert torch.equal(retrieval_heads(distinct(alpha), sparsity), expected)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40), st.data())
def test_as_many_heads_retrieve_as_are_asked_for(alpha: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(alpha)))
    chosen = retrieval_heads(distinct(torch.tensor(alpha)), 1 - count / len(alpha)).nonzero()[:, 0].tolist()
    assert chosen == sorted(sorted(range(len(alpha)), key=lambda each: -alpha[each])[:count])


@given(st.integers(6, 120), st.integers(10, 200), st.integers(1, 7), st.integers(1, 5), st.booleans())
def test_duoattention_fits_its_budget(budget: int, tokens: int, layers: int, heads: int, fixed: bool) -> None:
    recent = budget // 3 if fixed else None
    method = DuoAttention(budget=budget, sink_size=2, recent_size=recent, decode_budget=None)
    held = flat(lengths(method, layers, heads, tokens))
    room = len(held) * budget - sum(held)
    if tokens <= budget:
        assert held == [tokens] * len(held)
        return
    whole = held.count(tokens)
    short = 2 + (budget // 3 if fixed else max(budget // 2 - 2, 1))
    assert whole == len(held) * (budget - short) // (tokens - short)
    assert 0 <= room < (tokens - short if fixed else len(held))
    assert {each for each in held if each != tokens} == {min(held)}
    assert max(each.count(tokens) for each in (held[i : i + heads] for i in range(0, len(held), heads))) <= -(
        -whole // layers
    )


def test_heads_are_ranked_by_the_attention_that_streaming_would_lose() -> None:
    torch.manual_seed(3)
    q, k = torch.randn(8, 60, 8), torch.randn(4, 60, 8)
    method = DuoAttention(budget=30, sink_size=3, window_size=10)
    weights, recent = reference_attention(q, k), 15 - 3
    lost = [sum(weights[head, at, 3 : at - recent + 1].sum() for at in range(50, 60)) / 10 for head in range(8)]
    pairs = torch.stack(lost).view(4, 2).mean(1)
    torch.testing.assert_close(method.missed(LayerContext(0, 1, q, k, k)).double(), pairs, rtol=1e-4, atol=1e-6)
    kept = compress_layer(method, q, k, k).lengths()
    assert kept.count(60) == 4 * 15 // 45 == 1 and kept[pairs.argmax()] == 60


def test_a_pattern_ranks_the_heads_of_the_whole_model(tmp_path: Path) -> None:
    path = written(tmp_path / "pattern.json", TABLE)
    method = load_method("duoattention", budget=100, head_patterns=path, recent_size=20)
    assert lengths(method) == [[24, 24, 24, 200], [200, 24, 200, 24]], "3 of 8, since 8 * (100 - 24) // (200 - 24) is 3"
    per_query_head = load_method("duoattention", budget=100, head_patterns=path, kv_cache_granularity="query_head")
    assert [row.count(200) for row in lengths(per_query_head)] == [2, 3], "5 of 16: the earlier of two that are equal"


def test_streaming_heads_slide_and_retrieval_heads_grow() -> None:
    settings = {"budget": 32, "sink_size": 2, "recent_size": 8}
    ids = tiny_prompts(60)[0]
    engine = Engine(tiny_model())
    for extra, growth in (({}, 0), ({"decode_budget": "none"}, 20)):
        sequence = engine.prefill(ids, [load_method("duoattention", **settings, **extra)])[0]
        before = [store.lengths() for store in sequence.cache.stores]
        assert sorted(flat(before)) == [10, 10, 10, 10, 60, 60]
        engine.decode([sequence], 21)
        for store, old in zip(sequence.cache.stores, before, strict=True):
            for positions, length in zip(store.positions(), old, strict=True):
                recent = list(range(52 + 20 - growth, 80))
                assert positions.tolist() == (list(range(80)) if length == 60 else [0, 1, *recent])


def test_sliding_may_free_several_entries_at_once() -> None:
    k = torch.randn(2, 60, 4)
    store = compress_layer(load_method("duoattention", budget=20, decode_interval=4), k, k, k)
    seen = []
    for position in range(60, 68):
        store.append(k[:, :1], k[:, :1], position)
        store.observe(None)
        seen.append(store.lengths()[0])
    assert seen == [17, 18, 19, 20] * 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"allocator": "head-adaptive"}, "--allocator head-adaptive: duoattention splits the budget itself"),
        ({"decode_budget": 40}, "--decode_budget 40: retrieval heads keep every token"),
        ({"decode_interval": 13}, "--decode_interval is 13; .* 12 or less"),
        ({"head_patterns": "any.json", "window_size": 9}, "--window_size 9: .* leave one out"),
        ({"window_size": 0}, "--window_size is 0"),
        ({"recent_size": 0}, "--recent_size is 0"),
        ({"recent_size": 29}, "more than 32"),
        ({"sink_size": -1}, "--sink_size is -1"),
    ],
)
def test_settings_that_duoattention_refuses(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_method("duoattention", budget=32, **settings)
    assert "\n" not in str(caught.value)


class TestHeadKV(MethodContract):
    def make(self, budget: int) -> Method:
        return load_method("headkv", budget=budget)


class TestDuoAttention(MethodContract):
    budget = 32
    layer_budgets_vary = True

    def make(self, budget: int) -> Method:
        return load_method("duoattention", budget=budget)
