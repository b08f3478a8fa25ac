"""What each method keeps, against the code of its authors and of the programs that re-tell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfactory import Engine, load_method
from kvfactory.budget import HeadAdaptive, Pyramid
from kvfactory.context import LayerContext
from kvfactory.eviction import EvictionMethod
from kvfactory.testing import compress_layer, reference_attention


class Golden:
    """One case: its parameters, and its arrays as tensors without the batch dimension."""

    def __init__(self, shared: Path, case: str) -> None:
        folder = shared / "golden" / "methods_public"
        index = json.loads((folder / "index.json").read_text())
        self.params: dict[str, Any] = next(each["params"] for each in index["cases"] if each["id"] == case)
        self.arrays = np.load(folder / f"{case}.npz")

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self["in_q"][0], self["in_k"][0], self["in_v"][0]

    def settings(self, *names: str) -> dict[str, Any]:
        """The named parameters, where the case has them, and its granularity."""
        chosen = {name: self.params[name] for name in names if self.params.get(name) is not None}
        if "granularity" in self.params:
            chosen["kv_cache_granularity"] = self.params["granularity"]
        return chosen


SNAPKV = ("window_size", "kernel_size", "pooling", "gqa_score_agg")
SNAPKV_CASES = [
    "official_mha_avgpool3",
    "official_mha_avgpool5",
    "official_mha_maxpool7",
    "official_short_prompt_noop",
    "kvf_gqa_query_head_na_avgpool5",
    "kvf_gqa_kv_head_mean_avgpool5",
    "kvf_gqa_kv_head_max_avgpool5",
    "kvf_gqa_kv_head_sum_maxpool7",
    "kvf_gqa_kv_head_mean_maxpool7",
]


@pytest.mark.parametrize("case", SNAPKV_CASES)
def test_snapkv(shared: Path, case: str) -> None:
    golden = Golden(shared, f"snapkv__{case}")
    method = load_method("snapkv", budget=golden.params["max_capacity_prompt"], **golden.settings(*SNAPKV))
    store = compress_layer(method, *golden.qkv())
    assert torch.equal(torch.stack(store.positions()), golden["out_kept"][0].long())
    if "out_pooled_scores" in golden.arrays:
        scores = method.score(LayerContext(0, 1, *golden.qkv()))[:, : -golden.params["window_size"]]
        torch.testing.assert_close(scores, golden["out_pooled_scores"][0], rtol=1e-4, atol=1e-5)


def test_snapkv_as_kvpress_scores(shared: Path) -> None:
    golden = Golden(shared, "snapkv__kvpress_score")
    window = golden.params["window_size"]
    method = load_method(
        "snapkv",
        budget=20,
        pooling="avgpool",
        pool_order="heads_first",
        **golden.settings("window_size", "kernel_size"),
    )
    query = rotate(golden["in_q_pre"][0], torch.arange(golden["in_k"].shape[2]))
    layer = LayerContext(0, 1, query, golden["in_k"][0], golden["in_v"][0])
    mean = method.score(layer)[:, :-window] / window  # kvpress averages over the window where the authors sum
    torch.testing.assert_close(mean, golden["out_score"][0][:, :-window], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["query_head_na", "kv_head_mean", "kv_head_max"])
def test_pyramidkv(shared: Path, case: str) -> None:
    golden = Golden(shared, f"pyramidkv__kvf_{case}")
    settings = golden.settings(*SNAPKV, "beta")
    method = load_method(
        "pyramidkv", budget=golden.params["max_capacity_prompt"], pyramid_schedule="kvcache-factory", **settings
    )
    layers = golden.params["num_layers"]
    for layer in range(layers):
        store = compress_layer(method, *golden.qkv(), layer_index=layer, num_layers=layers)
        assert torch.equal(torch.stack(store.positions()), golden[f"out_kept_layer{layer}"][0].long())


def kept_by(allocator: Pyramid, tokens: int, budget: Any, window: int, layers: int) -> list[int]:
    """Entries of each layer, window included."""
    scores = torch.zeros(1, tokens - window)
    shares = {"budget": budget, "protected": window, "num_layers": layers}
    return [allocator.counts(scores, layer_index=layer, **shares)[0] + window for layer in range(layers)]


def test_pyramid_schedule_of_kvcache_factory(shared: Path) -> None:
    table = Golden(shared, "pyramidkv__layer_budget_grid")["out_table"].tolist()
    for layers, budget, window, beta, tokens, _, ok, *kept in table:
        if not ok:
            continue  # the reference raised: it asks for more tokens than the prompt has
        expected = [each for each in kept if each != -2]
        if tokens <= budget:
            assert expected == [tokens] * layers
        else:
            assert (
                kept_by(Pyramid(beta=beta, pyramid_schedule="kvcache-factory"), tokens, budget, window, layers)
                == expected
            )


def test_pyramid_schedule_of_adakv(shared: Path) -> None:
    for layers, base, window, beta, tokens, *kept in Golden(shared, "pyramidkv__adakv_repo_schedule")[
        "out_table"
    ].tolist():
        allocator = Pyramid(beta=beta, pyramid_schedule="never-uniform")
        expected = [each for each in kept if each != -2]
        assert kept_by(allocator, tokens, base, window, layers) == expected


def test_pyramid_schedule_of_kvpress(shared: Path) -> None:
    """Where kvpress would keep less than the window, the window is kept whole here: it is protected."""
    for layers, ratio, tokens, window, beta, *kept in Golden(shared, "pyramidkv__kvpress_layer_budget")[
        "out_table"
    ].tolist():
        layers, tokens, window = int(layers), int(tokens), int(window)
        allocator = Pyramid(beta=beta, pyramid_schedule="kvpress")
        expected = [max(int(each), window) for each in kept if each != -2]
        assert kept_by(allocator, tokens, window + tokens * (1 - ratio), window, layers) == expected


@pytest.mark.parametrize("case", ["query_head_na", "kv_head_mean", "kv_head_max", "kv_head_sum"])
def test_h2o_at_the_end_of_the_prompt(shared: Path, case: str) -> None:
    golden = Golden(shared, f"h2o__kvf_prefill_{case}")
    method = load_method(
        "h2o",
        budget=golden.params["max_capacity_prompt"],
        recent_size=golden.params["window_size"],
        **golden.settings("gqa_score_agg"),
    )
    store = compress_layer(method, *golden.qkv())
    assert torch.equal(torch.stack(store.positions()), golden["out_kept"][0].long())
    scores = method.score(LayerContext(0, 1, *golden.qkv()))[:, : -golden.params["window_size"]]
    torch.testing.assert_close(scores, golden["out_scores"][0], rtol=1e-4, atol=1e-5)


def test_h2o_real_drop_through_the_prompt_and_each_step(shared: Path) -> None:
    golden = Golden(shared, "h2o__official_real_drop_prefill_decode")
    heavy, recent, prompt = (golden.params[name] for name in ("hh_size", "recent_size", "prompt_len"))
    method = load_method("h2o", budget=heavy + recent, recent_size=recent, decode_budget="same")
    q, k, v = golden.qkv()
    store = compress_layer(method, q[:, :prompt], k[:, :prompt], v[:, :prompt])
    for step in range(golden.params["decode_steps"] + 1):
        if step:
            at = slice(prompt + step - 1, prompt + step)
            store.append(k[:, at], v[:, at], prompt + step - 1)
            weights = (q[:, at] @ store.read(q[:, at]).keys.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
            torch.testing.assert_close(weights, golden[f"in_attn_step{step}"][0], rtol=1e-4, atol=1e-5)
            store.observe(weights)
        assert torch.equal(torch.stack(store.positions()), golden["out_kept"][step].long())
        torch.testing.assert_close(store._state[..., 0], golden["out_hh_score"][step], rtol=1e-4, atol=1e-5)


def test_h2o_as_kvpress_scores(shared: Path) -> None:
    golden = Golden(shared, "h2o__kvpress_observed_attention")
    method = load_method("h2o", budget=8, average_over_queries=True)
    attention, keys = golden["in_attn"][0], golden["in_k"][0]
    layer = LayerContext(0, 1, torch.zeros(len(attention), *keys.shape[1:]), keys, keys)
    layer.shared("attention_mass", lambda: attention.sum(1))
    torch.testing.assert_close(method.score(layer), golden["out_score"][0], rtol=1e-4, atol=1e-5)


def test_h2o_of_the_thesis(shared: Path) -> None:
    golden = Golden(shared, "h2o__thesis_select")
    ratios = {name: golden.params[name] for name in ("heavy_ratio", "recent_ratio")}
    method = load_method("h2o", budget=golden.params["budget"], **ratios)
    importance = golden["in_importance"]
    keys = golden["in_k"][0][:, : len(importance)]
    layer = LayerContext(0, 1, keys, keys, keys)
    layer.shared("attention_mass", lambda: importance.expand(len(keys), -1))
    for positions in method.compress(layer).positions():
        assert positions.tolist() == golden["out_kept"].tolist()


def test_streamingllm(shared: Path) -> None:
    golden = Golden(shared, "streamingllm__kvf")
    method = load_method("streamingllm", budget=golden.params["max_capacity_prompt"], sink_size=golden.params["sinks"])
    store = compress_layer(method, *golden.qkv())
    assert torch.equal(torch.stack(store.positions()), golden["out_kept"][0].long())
    assert torch.equal(torch.stack(store.keys()), golden["out_k_out"][0])
    assert torch.equal(torch.stack(store.values()), golden["out_v_out"][0])


def streaming_store(golden: Golden, tokens: int) -> Any:
    start, recent = golden.params["start_size"], golden.params["recent_size"]
    method = load_method(
        "streamingllm", budget=start + recent, sink_size=start, recent_size=recent, decode_budget="same"
    )
    return compress_layer(method, *[torch.randn(1, tokens, 8) for _ in range(3)])


@pytest.mark.parametrize("length", [11, 12, 13, 33])
def test_streamingllm_official_prompt(shared: Path, length: int) -> None:
    golden = Golden(shared, "streamingllm__official_start_recent")
    store = streaming_store(golden, length)
    assert store.positions()[0].tolist() == golden[f"out_call_len{length}"].tolist()


@pytest.mark.parametrize(("length", "coming"), [(10, 1), (12, 1), (12, 4)])
def test_streamingllm_official_room_for_new_tokens(shared: Path, length: int, coming: int) -> None:
    golden = Golden(shared, "streamingllm__official_start_recent")
    store = streaming_store(golden, length)
    store.append(*torch.randn(2, 1, coming, 8), length)
    assert store.positions()[0].tolist()[:-coming] == golden[f"out_evict_len{length}_coming{coming}"].tolist()


def test_streamingllm_official_room_after_a_long_prompt(shared: Path) -> None:
    """The authors may call on a cache of 33 that was never cut; ours was, and keeps the same in the end."""
    golden = Golden(shared, "streamingllm__official_start_recent")
    store = streaming_store(golden, 33)
    store.append(*torch.randn(2, 1, 3, 8), 33)
    assert store.positions()[0].tolist()[:-3] == golden["out_evict_len33_coming3"].tolist()


def test_streamingllm_positions_inside_the_cache(shared: Path) -> None:
    golden = Golden(shared, "streamingllm__official_pos_shift_vs_original_positions")
    start, recent, prompt = (golden.params[name] for name in ("start_size", "recent_size", "prompt_len"))
    frequencies = inverse_frequencies(golden.params["rope_theta"], golden["in_k_pre"].shape[-1])
    keys = rotate(golden["in_k_pre"][0], torch.arange(prompt))
    query = rotate(golden["in_q_pre"][0], torch.tensor([prompt - 1]))
    for inside, expected in ((True, "out_attn_in_cache"), (False, "out_attn_original")):
        method = load_method("streamingllm", budget=start + recent, sink_size=start, cache_positions=inside)
        store = compress_layer(method, keys, keys, golden["in_v"][0], inverse_frequencies=frequencies)
        assert store.positions()[0].tolist() == golden["in_kept"].tolist()
        reading = store.read(query)
        weights = (query @ reading.keys.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
        torch.testing.assert_close(weights, golden[expected][0], rtol=1e-4, atol=1e-5)
        if inside:
            torch.testing.assert_close(weights @ reading.values, golden["out_out_in_cache"][0], rtol=1e-4, atol=1e-5)


def test_streamingllm_sink_cache(shared: Path) -> None:
    """The same state as transformers' SinkCache, which leaves one position free between the sinks and the window."""
    golden = Golden(shared, "streamingllm__hf_sinkcache_final_state")
    size, sinks, first = golden.params["window_length"], golden.params["num_sink_tokens"], golden.params["first_chunk"]
    k_pre, values = golden["in_k_pre"][0], golden["in_v"][0]
    tokens = k_pre.shape[1]
    keys = rotate(k_pre, torch.arange(tokens))
    method = load_method("streamingllm", budget=size, sink_size=sinks, decode_budget="same", cache_positions=True)
    frequencies = inverse_frequencies(golden.params["rope_theta"], k_pre.shape[-1])
    chunk = (keys[:, :first], keys[:, :first], values[:, :first])
    store = compress_layer(method, *chunk, inverse_frequencies=frequencies)
    for token in range(first, tokens):
        store.append(keys[:, token : token + 1], values[:, token : token + 1], token)
    reading = store.read(keys[:, -1:])
    assert torch.equal(reading.values, golden["out_v_cache"][0])
    expected = golden["out_k_cache"][0]
    expected = torch.cat([rotate(expected[:, :sinks], torch.ones(sinks)), expected[:, sinks:]], 1)
    ours = (reading.keys @ reading.keys.transpose(1, 2)).double()  # products see distances alone
    torch.testing.assert_close(ours, (expected @ expected.transpose(1, 2)).double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["cr0.4", "cr0.75"])
def test_streamingllm_as_kvpress_keeps(shared: Path, case: str) -> None:
    golden = Golden(shared, f"streamingllm__kvpress_{case}")
    keys = golden["in_k"][0]
    budget = int(keys.shape[1] * (1 - golden.params["compression_ratio"]))
    store = compress_layer(
        load_method("streamingllm", budget=budget, sink_size=golden.params["n_sink"]), keys, keys, keys
    )
    assert torch.equal(torch.stack(store.positions()), golden["out_kept"][0].long())


ADAKV_CASES = [
    "kvf_mha_floor0.2_norm",
    "kvf_mha_floor0.5_maxpool7",
    "kvf_gqa_kvhead_mean",
    "kvf_gqa_kvhead_max",
    "official_mha_floor0.2",
    "official_mha_floor0.0",
    "official_mha_floor1.0_is_uniform",
    "official_gqa_mean",
    "official_gqa_max",
]


@pytest.mark.parametrize("case", ADAKV_CASES)
def test_adakv(shared: Path, case: str) -> None:
    golden = Golden(shared, f"adakv__{case}")
    settings = golden.settings(*SNAPKV, "floor", "normalize")
    store = compress_layer(load_method("adakv", budget=golden.params["max_capacity_prompt"], **settings), *golden.qkv())
    assert store.lengths() == golden["out_head_lens"].tolist()
    for positions, row in zip(store.positions(), golden["out_kept"].tolist(), strict=True):
        assert positions.tolist() == [each for each in row if each != -1]


class Given(EvictionMethod):
    """Scores that are given, to test what becomes of them."""

    scores: Tensor

    def score(self, layer: LayerContext) -> Tensor:
        return self.scores


@pytest.mark.parametrize("case", ["alpha0.2", "alpha0.5"])
def test_adakv_as_kvpress_guards_heads(shared: Path, case: str) -> None:
    golden = Golden(shared, f"adakv__kvpress_knorm_{case}")
    scores = golden["in_score"][0]
    kept = int(scores.shape[1] * (1 - golden.params["compression_ratio"]))
    allocator = HeadAdaptive(floor=golden.params["alpha_safeguard"], normalize=False, floor_rule="guarantee")
    method = Given(budget=kept, allocator=allocator)
    object.__setattr__(method, "scores", scores)
    keys = torch.randn(*scores.shape, 8)
    store = compress_layer(method, keys, keys, keys)
    assert store.lengths() == golden["out_kept_per_head"][0].tolist()
    for positions, mask in zip(store.positions(), golden["out_kept_mask"][0], strict=True):
        assert positions.tolist() == mask.nonzero().flatten().tolist()


END_TO_END = {
    "fullkv": ("fullkv", {}),
    "snapkv_query_head": ("snapkv", {"kv_cache_granularity": "query_head"}),
    "snapkv_kv_head": ("snapkv", {}),
    "snapkv_kv_head_max": ("snapkv", {"gqa_score_agg": "max"}),
    "pyramidkv_query_head": ("pyramidkv", {"kv_cache_granularity": "query_head"}),
    "pyramidkv_kv_head": ("pyramidkv", {}),
    "h2o_query_head": ("h2o", {"kv_cache_granularity": "query_head"}),
    "h2o_kv_head": ("h2o", {}),
    "streamingllm_kv_head": ("streamingllm", {}),
    "l2norm_kv_head": ("l2norm", {}),
}


def test_end_to_end_on_the_embedded_model(shared: Path, embedded: Any) -> None:
    """KVCache-Factory's runs, token for token, all from one prefill."""
    golden = Golden(shared, "e2e__smollm2_kvcache_factory")
    shape = {"window_size": 8, "kernel_size": 5, "pooling": "avgpool"}
    own = {
        "fullkv": {},
        "h2o": {"recent_size": 8},
        "l2norm": {"skip_layers": (0, 1)},
        "streamingllm": {"sink_size": 4},
        "pyramidkv": {**shape, "beta": 20, "pyramid_schedule": "kvcache-factory"},
    }
    methods = [load_method(name, budget=64, **own.get(name, shape), **extra) for name, extra in END_TO_END.values()]
    sequences = Engine(embedded).prefill(golden["in_input_ids"], methods)
    kept = {
        case: {layer: sequence.cache.stores[layer].positions() for layer in (0, 14, 29)}
        for case, sequence in zip(END_TO_END, sequences, strict=True)
    }
    for case, sequence in zip(END_TO_END, sequences, strict=True):
        assert sequence.logits is not None
        top = golden[f"out_{case}__top20_ids"][0].long()
        torch.testing.assert_close(sequence.logits[top], golden[f"out_{case}__top20_logits"][0], rtol=0, atol=1e-3)
    tokens = dict(zip(END_TO_END, Engine(embedded).decode(sequences, 12), strict=True))
    for case, sequence in zip(END_TO_END, sequences, strict=True):
        assert tokens[case] == golden[f"out_{case}__tokens"].tolist(), case
        lengths = [round(each) for each in sequence.cache.kept()]
        assert lengths == golden[f"out_{case}__cache_len"].tolist(), case
        for layer, positions in kept[case].items():
            if f"out_{case}__kept_l{layer}" in golden.arrays:
                assert_nearly_the_same_sets(positions, golden[f"out_{case}__kept_l{layer}"])


def assert_nearly_the_same_sets(positions: list[Tensor], expected: Tensor) -> None:
    """Equal but for one entry a head: two scores may agree to 1e-6, and the reference was read back by nearest key."""
    for ours, theirs in zip(positions, expected.tolist(), strict=True):
        assert len(ours) == len(theirs)
        assert len(set(ours.tolist()) ^ set(theirs)) <= 2


def test_attention_mass_and_window_against_plain_attention() -> None:
    torch.manual_seed(3)
    q, k = torch.randn(6, 300, 8), torch.randn(2, 300, 8)
    weights = reference_attention(q, k)
    layer = LayerContext(0, 1, q, k, k)
    torch.testing.assert_close(layer.attention_mass().double(), weights.sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.window_attention(9).double(), weights[:, -9:], rtol=1e-4, atol=1e-5)


def inverse_frequencies(theta: float, dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)


def rotate(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """RoPE with halves split: x [heads, tokens, dim] at its positions [tokens]."""
    angles = positions[:, None].float() * inverse_frequencies(theta, x.shape[-1])
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin
