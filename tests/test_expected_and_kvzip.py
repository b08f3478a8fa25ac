"""ExpectedAttention and KVzip: against golden vectors, and against slow versions of their rules written here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from kvfactory_plugins.expected_attention import ExpectedAttention
from kvfactory_plugins.kvzip import KVzip, RepeatedLayer, RepeatStore
from test_golden_methods import Golden, inverse_frequencies, rotate
from torch import Tensor

from kvfactory import DenseStore, Engine, LayerContext, Method, Store, UserError, compress, load_method
from kvfactory.context import Prompt
from kvfactory.testing import MethodContract, generate, tiny_model, tiny_prompts

# ---- ExpectedAttention ----


@pytest.mark.parametrize("case", ["cov1_vnorm1", "cov0_vnorm1", "cov1_vnorm0"])
def test_expected_attention_as_kvpress_scores(shared: Any, case: str) -> None:
    golden = Golden(shared, f"expected_attention__kvpress_{case}")
    params, keys, values = dict(golden.params), golden["in_k"][0], golden["in_v"][0]
    frequencies = inverse_frequencies(params.pop("rope_theta"), keys.shape[-1])
    queries = rotate(golden["in_q_pre"][0], torch.arange(keys.shape[1]))
    layer = LayerContext(0, 1, queries, keys, values, inverse_frequencies=frequencies)
    score = load_method("expected_attention", budget=20, **params).score(layer)
    sinks = params["n_sink"]  # kvpress lifts them above all others; here they are protected, whatever their score
    torch.testing.assert_close(score[:, sinks:], golden["out_score"][0][:, sinks:], rtol=1e-3, atol=1e-5)


def rotation(position: int, frequencies: Tensor) -> Tensor:
    """The matrix that rotates a vector to a position."""
    cos, sin = ((position * frequencies.double()).cos().diag(), (position * frequencies.double()).sin().diag())
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


def expected_attention(q: Tensor, k: Tensor, v: Tensor, at: list[int], frequencies: Tensor, future: int) -> Tensor:
    """Score of each key behind 4 sinks, query head by query head; q [heads, n, dim] are at positions `at`."""
    dim, rows = q.shape[-1], []
    average = sum(rotation(at[-1] + 1 + step, frequencies) for step in range(future)) / future
    for head, queries in enumerate(q.double()):
        keys = k[head // (len(q) // len(k))].double()[4:]
        plain = [rotation(-place, frequencies) @ query for place, query in zip(at, queries, strict=True) if place >= 4]
        mean = sum(plain) / len(plain)
        covariance = sum(torch.outer(each - mean, each - mean) for each in plain) / len(plain)
        mean, covariance = average @ mean, average @ covariance @ average.T
        logits = [key @ mean / math.sqrt(dim) + key @ covariance @ key / (2 * dim) for key in keys]
        rows.append(torch.stack(logits).softmax(0))
    return torch.stack(rows).unflatten(0, (len(k), -1)).mean(1) * v.double()[:, 4:].norm(dim=-1)


FREQUENCIES = inverse_frequencies(500.0, 6)


def test_expected_attention_of_a_prompt_and_while_decoding() -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(heads, 30, 6, generator=generator) for heads in (4, 2, 2))
    method = ExpectedAttention(budget=12, n_future_positions=9)
    prompt = LayerContext(0, 1, q, k, v, inverse_frequencies=FREQUENCIES)
    slow = expected_attention(q, k, v, list(range(30)), FREQUENCIES, 9)
    torch.testing.assert_close(method.score(prompt)[:, 4:].double(), slow, rtol=1e-4, atol=1e-6)
    listed = torch.tensor([[0, 1, 2, 3, 40, 41, 55, 60, 61, 62]] * 2)
    stored = replace(prompt, queries=q[:, :3], keys=k[:, :10], values=v[:, :10], listed_positions=listed, _shared={})
    slow = expected_attention(q[:, :3], k[:, :10], v[:, :10], [60, 61, 62], FREQUENCIES, 9)
    torch.testing.assert_close(method.score(stored)[:, 4:].double(), slow, rtol=1e-4, atol=1e-6)


def test_expected_attention_decodes_with_the_statistics_of_the_latest_queries() -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(heads, 40, 6, generator=generator) for heads in (4, 2, 2))
    method = ExpectedAttention(budget=12, decode_budget="same", query_window=5)
    store = method.compress(LayerContext(0, 1, q[:, :30], k[:, :30], v[:, :30], inverse_frequencies=FREQUENCIES))
    for step in range(30, 40):
        before = torch.stack(store.positions())
        store.append(k[:, step : step + 1], v[:, step : step + 1], step)
        store.read(q[:, step : step + 1])
        store.observe(None)
        listed = torch.cat([before, torch.full((2, 1), step)], 1)
        keys, values = (torch.stack([each[head, listed[head]] for head in range(2)]) for each in (k, v))
        slow = expected_attention(
            q[:, step - 4 : step + 1], keys, values, list(range(step - 4, step + 1)), FREQUENCIES, 512
        )
        weakest = slow.argmin(1) + 4
        expected = [
            [each for each in row if each != row[gone]] for row, gone in zip(listed.tolist(), weakest, strict=True)
        ]
        assert [each.tolist() for each in store.positions()] == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_future_positions": 0}, "--n_future_positions is 0"),
        ({"epsilon": -1.0}, "--epsilon is -1"),
        ({"epsilon": 0.1, "use_vnorm": False}, "without --use_vnorm"),
        ({"query_window": 9}, "give one"),
        ({"query_window": 0, "decode_budget": "same"}, "--query_window is 0"),
        ({"sink_size": -1}, "--sink_size is -1"),
    ],
)
def test_settings_that_expected_attention_refuses(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_method("expected_attention", budget=32, **settings)
    assert "\n" not in str(caught.value)


class TestExpectedAttention(MethodContract):
    keeps_newest = False
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method("expected_attention", budget=budget, decode_budget="same", query_window=12)


# ---- KVzip ----


def test_kvzip_official_chunk_score(shared: Any) -> None:
    golden = Golden(shared, "kvzip__official_chunk_score")
    names = ("sink", "start_idx", "end_idx", "repeat_len", "ratio")
    sinks, start, stop, repeated, ratio = map(golden.params.__getitem__, names)
    keys, queries = golden["in_k_all"][0], golden["in_q_repeat"][0]
    prompt = keys.shape[1] - repeated
    store = RepeatStore(keys[:, :prompt], keys[:, :prompt], sinks, slice(start, stop))
    store.append(keys[:, prompt:], keys[:, prompt:], prompt)
    store.read(queries)
    scores = store.importance.unflatten(0, (2, -1)).amax(1)
    torch.testing.assert_close(scores, golden["out_score"][0], rtol=1e-4, atol=1e-5)
    uniform = KVzip(budget=int((stop - start) * ratio), sink_size=0, recent_size=0, scope="layer")
    kept = uniform.select(scored(store.importance, heads=2))
    assert [each.tolist() for each in kept] == [row.nonzero()[:, 0].tolist() for row in golden["out_kept_uniform"][0]]
    # all heads of the model in one row: places go to the best of it, wherever they are
    places = int(scores.numel() * ratio) - 1  # the authors keep what exceeds the int(n * ratio)-th largest
    ((best,),) = KVzip(budget=places, sink_size=0, recent_size=0).best_of_model([scored(scores.view(1, -1), heads=1)])
    assert best.tolist() == golden["out_kept_nonuniform"].flatten().nonzero()[:, 0].tolist()


def scored(importance: Tensor, heads: int) -> RepeatedLayer:
    """A layer that is nothing but its scores [query_heads, tokens]."""
    keys = torch.zeros(heads, importance.shape[1], 2)
    return RepeatedLayer(0, 1, torch.zeros(len(importance), 0, 2), keys, keys, importance=importance)


class Spy(Method):
    """Keeps everything and shows what it was given."""

    def __init__(self) -> None:
        object.__setattr__(self, "layers", [])

    def compress(self, layer: LayerContext) -> Store:
        self.layers.append(layer)
        return DenseStore(layer.keys, layer.values)


def slow_scores(ids: list[int], chunk_size: int, sinks: int, recent: int) -> list[list[Tensor]]:
    """[layer][kv head][token between sinks and recent], by passes over the prompt and each repetition as one text."""
    parts: list[list[Tensor]] = [[] for _ in range(3)]
    for start in range(sinks, len(ids) - recent, chunk_size):
        stop = min(start + chunk_size, len(ids) - recent)
        repetition = ids[max(start - 8, 0) : stop]
        spy = Spy()
        Engine(tiny_model()).prefill(ids + repetition, [spy])
        for layer, part in zip(spy.layers, parts, strict=True):
            seen = [*range(sinks), *range(start, stop), *range(len(ids), len(ids) + len(repetition))]
            best = torch.zeros(2, stop - start, dtype=torch.float64)
            for head in range(8):
                for at in range(len(ids), len(ids) + len(repetition)):
                    visible = [each for each in seen if each <= at]
                    keys = layer.keys[head // 4, visible].double()
                    weights = (keys @ layer.queries[head, at].double() / math.sqrt(8)).softmax(0)
                    best[head // 4] = best[head // 4].maximum(weights[sinks : sinks + stop - start])
            part.append(best)
    return [list(torch.cat(part, 1)) for part in parts]


def kept_of(method: Method, ids: list[int]) -> list[list[list[int]]]:
    sequence = Engine(tiny_model()).prefill(ids, [method])[0]
    return [[each.tolist() for each in store.positions()] for store in sequence.cache.stores]


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return tiny_prompts(60)[0][0].tolist()


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_kvzip_keeps_what_a_repetition_looks_at(ids: list[int], scope: str) -> None:
    method = load_method("kvzip", budget=20, chunk_size=21, sink_size=3, recent_size=5, scope=scope)
    scores = slow_scores(ids, chunk_size=21, sinks=3, recent=5)
    listed = [
        (x, y, z, float(s))
        for x, layer in enumerate(scores)
        for y, head in enumerate(layer)
        for z, s in enumerate(head)
    ]
    best = sorted(listed, key=lambda each: -each[3])[: 6 * 12]
    for x, layer in enumerate(kept_of(method, ids)):
        for y, head in enumerate(layer):
            chosen = [z for a, b, z, _ in best if (a, b) == (x, y)]
            if scope == "layer":
                chosen = scores[x][y].argsort(descending=True)[:12].tolist()
            assert head == [0, 1, 2, *sorted(z + 3 for z in chosen), 55, 56, 57, 58, 59]


def test_kvzip_spends_its_budget_to_the_last_entry(ids: list[int]) -> None:
    for granularity, heads in (("kv_head", 2), ("query_head", 8)):
        kept = kept_of(load_method("kvzip", budget=16, kv_cache_granularity=granularity), ids)
        assert [len(layer) for layer in kept] == [heads] * 3
        lengths = [len(head) for layer in kept for head in layer]
        assert sum(lengths) == 3 * heads * 16 and len(set(lengths)) > 1
    assert kept_of(load_method("kvzip", budget="30%"), ids) == kept_of(load_method("kvzip", budget=18), ids)


@pytest.mark.parametrize(
    "settings",
    [
        {"chunk_size": 9},
        {"sink_size": 2},
        {"recent_size": 3},
        {"scope": "layer"},
        {"kv_cache_granularity": "query_head"},
        {"scope": "layer", "allocator": "head-adaptive"},
    ],
)
def test_every_setting_of_kvzip_acts(ids: list[int], settings: dict[str, Any]) -> None:
    assert kept_of(load_method("kvzip", budget=16, **settings), ids) != kept_of(load_method("kvzip", budget=16), ids)


@pytest.mark.parametrize("settings", [{}, {"scope": "layer"}])
def test_kvzip_leaves_evicted_entries_to_a_merge(ids: list[int], settings: dict[str, Any]) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Recording:
        """Stands in for a merge."""

        name, weighs_scores = "recording", True

        def merge(self, keys: Tensor, values: Tensor, kept: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
            seen.append((kept, scores))
            return LayerContext(0, 1, keys, keys, values).gather(kept)

    method = load_method("kvzip", budget=16, **settings)
    merging = replace(method, merge=Recording())
    assert kept_of(merging, ids) == kept_of(method, ids)
    assert len(seen) == (3 if settings else 6), "one eviction a layer, or one a head where heads differ in length"
    for kept, scores in seen:
        competing = kept[:, 4:-8]
        best = scores[:, 4:-8].argsort(dim=1, descending=True)[:, : competing.shape[1]] + 4
        assert torch.equal(competing, best.sort(1).values)


def test_kvzip_feeds_nothing_after_a_short_prompt() -> None:
    keys = torch.randn(2, 20, 4)
    stores: list[Store] = [DenseStore(keys, keys)]
    fed: list[list[int]] = []
    prompt = Prompt(list(range(20)), lambda stores, ids: fed.append(ids), torch.device("cpu"))
    assert KVzip(budget=20).finish(stores, prompt) == stores and not fed


def test_kvzip_needs_token_ids() -> None:
    model = tiny_model()
    ids, mask = tiny_prompts(60)
    embeddings = model.get_input_embeddings()(ids)
    with compress(model, load_method("kvzip", budget=16)), pytest.raises(UserError, match="embeddings; give token ids"):
        model(inputs_embeds=embeddings, attention_mask=mask)
    assert generate(model, ids, mask).shape == (1, 12), "the model is whole again"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"allocator": "pyramid"}, "--allocator pyramid: .* --scope layer"),
        ({"decode_budget": "same"}, "--decode_budget same: .* leave it out"),
        ({"chunk_size": 0}, "--chunk_size is 0"),
        ({"recent_size": -1}, "--recent_size is -1"),
        ({"sink_size": -1}, "--sink_size is -1"),
        ({"sink_size": 30}, "more than 38"),
    ],
)
def test_settings_that_kvzip_refuses(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_method("kvzip", budget=32, **settings)
    assert "\n" not in str(caught.value)


class TestKVzip(MethodContract):
    layer_budgets_vary = True

    def make(self, budget: int) -> Method:
        return load_method("kvzip", budget=budget, chunk_size=20)


class TestKVzipInEachLayer(MethodContract):
    def make(self, budget: int) -> Method:
        return load_method("kvzip", budget=budget, scope="layer")
