"""Learned eviction: the thesis' network, features by hand, weights files, and what the shipped weights are worth."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import tiny_weights
from kvfactory_plugins._training import Task, judge
from kvfactory_plugins.learned import SHIPPED, Learned, Scorer, features, read_weights
from safetensors.torch import load_file, save_file
from test_golden_methods import Golden, rotate
from torch import Tensor

from kvfactory import Engine, LayerContext, UserError, load_method, load_model
from kvfactory.benchmarks.haystack import load_haystack
from kvfactory.method import Method
from kvfactory.models import EMBEDDED_PACKAGE
from kvfactory.testing import MethodContract, compress_layer, reference_attention, tiny_model, tiny_prompts

TINY = tiny_weights(3, 2, 8)
FREQUENCIES = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
with_embedded_model = pytest.mark.skipif(
    not any(metadata.distributions(name=EMBEDDED_PACKAGE[0])), reason="the embedded model is not installed"
)


class TestLearned(MethodContract):
    def make(self, budget: int) -> Method:
        return load_method("learned", budget=budget, weights=TINY)


class TestLearnedWhileDecoding(MethodContract):
    decode_budget = 16

    def make(self, budget: int) -> Method:
        return load_method("learned", budget=budget, weights=TINY, decode_budget="same", recent_size=4)


class TestLearnedInKIVI(MethodContract):
    def make(self, budget: int) -> Method:
        whole = {"quant_residual_length": 500} if budget >= 500 else {}
        return load_method("learned", budget=budget, weights=TINY, quant_method="kivi", **whole)


# ---- the thesis ----


def thesis(golden: Golden, folder: Path) -> str:
    """The thesis' network as a file: one for all layers, of the keys' mean over heads."""
    tensors = {}
    for ours, theirs in enumerate((0, 3, 6)):
        for name in ("weight", "bias"):
            tensors[f"{ours}.{name}"] = golden[f"in_{theirs}_{name}"][None, None]
    save_file(tensors, folder / "thesis.safetensors")
    facts = {"format": 1, "num_layers": 1, "query_heads": 2, "kv_heads": 2, "head_dim": 6, "window_size": 1}
    (folder / "thesis.json").write_text(json.dumps(facts | {"features": ["head_mean_key"]}))
    return str(folder / "thesis.safetensors")


def test_the_thesis_network(shared: Path, tmp_path: Path) -> None:
    golden = Golden(shared, "learned__thesis_mlp_select")
    keys = golden["in_k"][0]
    settings = {"sink_size": 0, "recent_size": golden.params["recent_window"]}
    method = load_method("learned", budget=golden.params["budget"], weights=thesis(golden, tmp_path), **settings)
    assert isinstance(method, Learned)
    score = method.score(LayerContext(0, 1, keys, keys, keys))
    assert score.shape == (2, 30)
    torch.testing.assert_close(score, golden["out_prob"].expand(2, -1), rtol=1e-4, atol=1e-5)
    kept = compress_layer(method, keys, keys, keys).positions()
    assert [head.tolist() for head in kept] == [golden["out_kept_intended"].tolist()] * 2
    assert 29 in kept[0].tolist() and 29 not in golden["out_kept_reference"].tolist()


# ---- features ----


def a_layer(tokens: int = 20) -> tuple[LayerContext, Tensor]:
    """A layer of 4 query heads and 2 KV heads, and its keys before their rotation."""
    generator = torch.Generator().manual_seed(0)
    queries, plain, values = (torch.randn(heads, tokens, 8, generator=generator) for heads in (4, 2, 2))
    keys = rotate(plain, torch.arange(tokens))
    return LayerContext(1, 3, queries, keys, values, inverse_frequencies=FREQUENCIES), plain


def test_features_by_hand() -> None:
    layer, plain = a_layer()
    by_name = {name: features(layer, [name], 4) for name in ("unrotated_key", "key", "value", "head_mean_key")}
    torch.testing.assert_close(by_name["unrotated_key"], plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(by_name["key"], layer.keys) and torch.equal(by_name["value"], layer.values)
    torch.testing.assert_close(by_name["head_mean_key"], layer.keys.mean(0, keepdim=True))
    scalars = ["key_norm", "value_norm", "log_distance", "window_attention", "pooled_window_attention"]
    key_norm, value_norm, distance, window, pooled = features(layer, scalars, 4).unbind(-1)
    torch.testing.assert_close(key_norm.exp(), plain.norm(dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value_norm.exp(), layer.values.norm(dim=-1))
    torch.testing.assert_close(distance.exp(), ((20 - torch.arange(20)) / 20).expand(2, -1))
    attention = reference_attention(layer.queries, layer.keys)[:, -4:].mean(1).unflatten(0, (2, 2)).mean(1).float()
    torch.testing.assert_close(window.exp(), attention.clamp(min=1e-6), rtol=1e-4, atol=1e-6)
    for token in range(20):
        expected = attention[:, max(0, token - 3) : min(token + 4, 16)].amax(1) if token < 16 else torch.tensor(1e-6)
        torch.testing.assert_close(pooled[:, token].exp(), expected.expand(2), rtol=1e-4, atol=1e-6)


def test_the_network_by_hand() -> None:
    """Normalisation, two layers, and each head of each layer its own weights."""
    layer, plain = a_layer()
    generator = torch.Generator().manual_seed(3)
    tensors = {"mean": torch.randn(3, 2, 8, generator=generator), "std": torch.rand(3, 2, 8, generator=generator) + 0.1}
    for each, (given, made) in enumerate([(8, 5), (5, 1)]):
        tensors[f"{each}.weight"] = torch.randn(3, 2, made, given, generator=generator)
        tensors[f"{each}.bias"] = torch.randn(3, 2, made, generator=generator)
    layout = read_weights(tiny_weights(3, 2, 8, ("unrotated_key",))).layout
    logits = Scorer(layout, tensors).logits(layer)
    for head in range(2):
        x = (plain[head] - tensors["mean"][1, head]) / tensors["std"][1, head]
        x = (x @ tensors["0.weight"][1, head].T + tensors["0.bias"][1, head]).relu()
        x = x @ tensors["1.weight"][1, head].T + tensors["1.bias"][1, head]
        torch.testing.assert_close(logits[head], x[:, 0], rtol=1e-4, atol=1e-4)


def test_window_attention_is_computed_for_those_alone_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError("nothing reads the window's attention")

    without = Learned(budget=20, weights=tiny_weights(3, 2, 8, ("unrotated_key", "value_norm")))
    layer, _ = a_layer()
    monkeypatch.setattr(LayerContext, "window_attention", never)
    assert without.score(layer).shape == (2, 20)
    assert without.recent_queries == 0 and Learned(budget=20, weights=TINY).recent_queries == 4
    with pytest.raises(AssertionError, match="nothing reads"):
        Learned(budget=20, weights=TINY).score(layer)


# ---- composition ----


@pytest.mark.parametrize("allocator", ["uniform", "pyramid", "head-adaptive"])
@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
@pytest.mark.parametrize("decode_budget", ["same", "none"])
@pytest.mark.parametrize("merge", ["none", "pivot"])
def test_it_composes(allocator: str, granularity: str, decode_budget: str, merge: str) -> None:
    parts = {"allocator": allocator, "decode_budget": decode_budget, "kv_cache_granularity": granularity}
    method = load_method("learned", budget=20, weights=TINY, merge=merge, recent_size=4, **parts)
    engine = Engine(tiny_model())
    sequence = engine.prefill(tiny_prompts(60)[0][0], [method])[0]
    assert len(engine.decode([sequence], 6)[0]) == 6
    assert sum(sequence.cache.kept()) / 3 <= 20 + (5 if decode_budget == "none" else 1.5)


def test_heads_stored_apart_are_scored_by_their_own_networks() -> None:
    """While decoding each head is a layer of its own, which must say which head it is."""
    method = Learned(budget=20, weights=tiny_weights(3, 2, 8, ("unrotated_key",)))
    layer, _ = a_layer()
    whole = method.score(layer)
    for granularity in (2, 4):
        for head, alone in enumerate(layer.stored_heads(granularity)):
            kv_head = head * 2 // granularity
            store = method.decoding_store(alone, torch.arange(20)[None])
            again = store.as_layer()  # type: ignore[attr-defined]
            assert again.first_kv_head == kv_head
            torch.testing.assert_close(method.score(again)[0], whole[kv_head], rtol=1e-4, atol=1e-5)


# ---- files ----


def copied(folder: Path, **changes: Any) -> str:
    """The tiny file with other facts."""
    file = folder / "copy.safetensors"
    shutil.copy(TINY, file)
    facts = json.loads(Path(TINY).with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps(facts | changes))
    return str(file)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": 9}, "its format is 9"),
        ({"features": ["kye"]}, "unknown feature 'kye'; did you mean 'key'"),
        ({"features": ["key_norm"]}, "where 1 come in"),
        ({"kv_heads": 4}, "2 heads"),
        ({"num_layers": None}, "TypeError"),
    ],
)
def test_a_file_that_is_none_is_told_when_the_method_is_made(changes: Any, told: str, tmp_path: Path) -> None:
    file = copied(tmp_path, **changes)
    with pytest.raises(UserError, match=told) as error:
        load_method("learned", budget=32, weights=file)
    assert "\n" not in str(error.value) and file in str(error.value) and "kvfactory train-learned" in str(error.value)


def test_files_that_are_missing_or_torn_are_told(tmp_path: Path) -> None:
    torn = copied(tmp_path)
    Path(torn).write_bytes(Path(torn).read_bytes()[:100])
    for file in ("nowhere.safetensors", __file__, torn):
        with pytest.raises(UserError, match=r"--weights .*: no weights of a token scorer .*kvfactory train-learned"):
            load_method("learned", budget=32, weights=file)


def test_a_model_without_weights_is_told_how_to_make_them() -> None:
    method = load_method("learned", budget=32)
    told = (
        "no learned weights .* 3 layers, 2 KV heads and head_dim 8; make them with: kvfactory train-learned .*--weights"
    )
    with pytest.raises(UserError, match=told):
        Engine(tiny_model()).prefill(tiny_prompts(60)[0][0], [method])


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    ids = tiny_prompts(60)[0][0]
    other = tiny_weights(4, 2, 8)
    told = f"--weights {other} is of a model with 4 layers, 2 KV heads and head_dim 8, and this one has 3 layers, 2 KV"
    with pytest.raises(UserError, match=told):
        Engine(tiny_model()).prefill(ids, [load_method("learned", budget=32, weights=other)])
    file = Path(copied(tmp_path))
    save_file(load_file(file) | {"inverse_frequencies": 500.0 ** -(torch.arange(0, 8, 2) / 8)}, file)
    with pytest.raises(UserError, match="turns keys by other angles"):
        Engine(tiny_model()).prefill(ids, [load_method("learned", budget=32, weights=str(file))])


# ---- the shipped weights ----


@with_embedded_model
def test_the_shipped_weights_beat_recency_on_text_of_another_kind() -> None:
    model, tokenizer = load_model(dtype="float32", device="cpu")
    scorer = read_weights(str(next(SHIPPED.glob("learned-SmolLM2*.safetensors"))))
    task = Task(384, 192, 0.1, scorer.layout.features, scorer.layout.window_size)
    ids = tokenizer.encode(load_haystack().text, add_special_tokens=False, verbose=False)

    def recency(layer: LayerContext) -> Tensor:
        return layer.positions.float().expand(layer.kv_heads, -1)

    documents = [ids[start : start + 576] for start in (0, 40_000)]
    found = judge(Engine(model), documents, task, {"learned": scorer.logits, "recency": recency}, "two documents")
    assert found["learned"] > 0.8 and found["learned"] > found["recency"] + 0.1


@with_embedded_model
def test_the_shipped_weights_keep_the_budget_and_the_newest() -> None:
    model, tokenizer = load_model(dtype="float32", device="cpu")
    ids = tokenizer.encode(load_haystack().text[:3000])
    sequence = Engine(model).prefill(ids, [load_method("learned", budget=48)])[0]
    ends = [*range(4), *range(len(ids) - 8, len(ids))]
    for store in sequence.cache.stores:
        for positions in store.positions():
            assert len(positions) == 48 and set(ends) <= set(positions.tolist())


def test_what_ships_is_small_and_names_its_source() -> None:
    files = sorted(SHIPPED.glob("learned-*"))
    assert sum(file.stat().st_size for file in files) < 600_000
    for file in SHIPPED.glob("learned-*.json"):
        facts = json.loads(file.read_text())
        assert facts["texts"] and not [each for each in facts["texts"] if "/" in each["name"]]
