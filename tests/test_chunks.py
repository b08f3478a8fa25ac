"""Prompts in chunks: against the stock model with the same tokens masked, against plain loops, and against whole prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from calibrations import small_settings, tiny_calibration
from torch import Tensor

from kvfactory import Engine, EvictionMethod, LayerContext, UserError, load_method
from kvfactory.registry import get_registry
from kvfactory.testing import tiny_model, tiny_prompts

REGISTRY = get_registry()
TOKENS, CHUNK, BUDGET = 150, 32, 24
BUILT_IN = [name for name, entry in sorted(REGISTRY.methods.items()) if entry.plugin.distribution == "kvfactory"]
WHOLE = ["duoattention", "hierarchical", "kvzip", "minference", "minicache"]


def prompt() -> list[int]:
    return tiny_prompts(TOKENS)[0][0].tolist()


def method_of(name: str, **settings: Any) -> Any:
    own = {"calibration": tiny_calibration(3, 2, 8)} if name == "kvquant" else {}
    return load_method(name, budget=BUDGET, **small_settings(name, 3, 2, 8, skip_layers=()), **own, **settings)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_keeping_everything_by_chunks_is_keeping_everything(family: str) -> None:
    engine = Engine(tiny_model(family))
    whole, by_chunks = (engine.prefill(prompt(), [load_method("fullkv")], chunk=chunk)[0] for chunk in (None, CHUNK))
    assert whole.logits is not None and by_chunks.logits is not None
    torch.testing.assert_close(by_chunks.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert engine.decode([whole], 20) == engine.decode([by_chunks], 20)


def test_a_chunk_sees_what_was_kept_before_it_and_itself() -> None:
    """Sinks and recent tokens are known beforehand: the stock model, masked so, gives the same logits."""
    sinks, model = 4, tiny_model("llama", "eager")
    allowed = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for start in range(0, TOKENS, CHUNK):
        kept = [*range(start)] if start <= BUDGET else [*range(sinks), *range(start - BUDGET + sinks, start)]
        for query in range(start, min(start + CHUNK, TOKENS)):
            allowed[query, [*kept, *range(start, query + 1)]] = True
    mask = torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(~allowed, torch.finfo(torch.float32).min)
    ids = torch.tensor([prompt()])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=torch.arange(TOKENS)[None]).logits[0, -1]
    streaming = load_method("streamingllm", budget=BUDGET, sink_size=sinks)
    sequence = Engine(model).prefill(prompt(), [streaming], chunk=CHUNK)[0]
    torch.testing.assert_close(sequence.logits, expected, rtol=1e-4, atol=1e-4)
    kept = [*range(sinks), *range(TOKENS - BUDGET + sinks, TOKENS)]
    assert all(each.tolist() == kept for store in sequence.cache.stores for each in store.positions())


@dataclass(frozen=True, kw_only=True)
class Watching(EvictionMethod):
    """Shows all queries and keys of the first layer, by which others are checked, and the most entries it saw."""

    def compress(self, layer: LayerContext) -> Any:
        SEEN.append(layer)
        return super().compress(layer)

    def score(self, layer: LayerContext) -> Tensor:
        return layer.positions.float().expand(layer.kv_heads, -1)


SEEN: list[LayerContext] = []


def first_layer() -> LayerContext:
    """Of the whole prompt: in the first layer nothing depends on what was kept."""
    SEEN.clear()
    Engine(tiny_model()).prefill(prompt(), [Watching(budget=BUDGET)])
    return SEEN[0]


def attention(layer: LayerContext, queries: list[int], keys: list[int], head: int) -> Tensor:
    """Of the queries of one KV head's group over some keys, mean over the group, [queries, keys]."""
    group = layer.query_heads // layer.kv_heads
    q = layer.queries[head * group : (head + 1) * group, queries]
    logits = q @ layer.keys[head, keys].T / q.shape[-1] ** 0.5
    later = torch.tensor(keys)[None] > torch.tensor(queries)[:, None]
    return logits.masked_fill(later, -torch.inf).softmax(-1).mean(0)


def best(scores: list[float], tokens: list[int], count: int) -> list[int]:
    return [token for _, token in sorted(zip(scores, tokens, strict=True), key=lambda pair: (-pair[0], pair[1]))][
        :count
    ]


@pytest.mark.parametrize("head", [0, 1])
def test_a_window_votes_on_what_is_there(head: int) -> None:
    layer, window, kept = first_layer(), 4, list[int]()
    for start in range(0, TOKENS, CHUNK):
        there = [*kept, *range(start, min(start + CHUNK, TOKENS))]
        if len(there) > BUDGET:
            votes = attention(layer, there[-window:], there, head).mean(0)[:-window]
            kept = sorted(best(votes.tolist(), there[:-window], BUDGET - window)) + there[-window:]
        else:
            kept = there
    method = load_method("snapkv", budget=BUDGET, window_size=window, kernel_size=1)
    sequence = Engine(tiny_model()).prefill(prompt(), [method], chunk=CHUNK)[0]
    assert sequence.cache.stores[0].positions()[head].tolist() == kept


def test_records_of_attention_add_up_over_chunks(head: int = 1) -> None:
    layer, mass, kept, recent = first_layer(), dict[int, float](), list[int](), BUDGET // 2
    for start in range(0, TOKENS, CHUNK):
        new = [*range(start, min(start + CHUNK, TOKENS))]
        there = kept + new
        for token, more in zip(there, attention(layer, new, there, head).sum(0).tolist(), strict=True):
            mass[token] = mass.get(token, 0) + more
        heavy = best([mass[token] for token in there[:-recent]], there[:-recent], BUDGET - recent)
        kept = sorted(heavy) + there[-recent:]
    sequence = Engine(tiny_model()).prefill(prompt(), [load_method("h2o", budget=BUDGET)], chunk=CHUNK)[0]
    assert sequence.cache.stores[0].positions()[head].tolist() == kept


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in WHOLE])
def test_every_method_ends_with_what_its_budget_says(name: str) -> None:
    engine, method = Engine(tiny_model()), method_of(name)
    whole, by_chunks = (engine.prefill(prompt(), [method], chunk=chunk)[0] for chunk in (None, CHUNK))
    assert by_chunks.prompt_tokens == by_chunks.cache.seen == TOKENS
    assert by_chunks.cache.method == method and by_chunks.decode_seconds == 0 < by_chunks.prefill_seconds
    for ours, theirs in zip(by_chunks.cache.stores, whole.cache.stores, strict=True):
        assert type(ours) is type(theirs)
        assert sum(ours.lengths()) == pytest.approx(sum(theirs.lengths()), abs=2), "AdaKV's rounding may miss a few"
        assert all((each.diff() > 0).all() and each[-1] < TOKENS for each in ours.positions())
    assert len(engine.decode([by_chunks], 12)[0]) == 12


@pytest.mark.parametrize("name", WHOLE)
def test_methods_that_need_the_whole_prompt_say_so(name: str) -> None:
    with pytest.raises(UserError, match=r"does not go with --prefill_chunk: .+; leave one of them out"):
        Engine(tiny_model()).prefill(prompt(), [method_of(name)], chunk=CHUNK)


def test_parts_that_need_the_whole_prompt_say_so() -> None:
    for name, settings in {
        "fullkv": {"key_pruning": "think"},
        "streamingllm": {"cache_positions": True},
        "h2o": {"merge": "cam", "cam_rule": "kvcache-factory"},
    }.items():
        with pytest.raises(UserError, match="does not go with --prefill_chunk"):
            Engine(tiny_model()).prefill(prompt(), [load_method(name, budget=BUDGET, **settings)], chunk=CHUNK)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in WHOLE])
def test_a_prompt_of_one_chunk_is_read_at_once(name: str) -> None:
    engine, method = Engine(tiny_model()), method_of(name)
    whole, by_chunks = (engine.prefill(prompt(), [method], chunk=chunk)[0] for chunk in (None, TOKENS))
    assert torch.equal(whole.logits, by_chunks.logits)
    for ours, theirs in zip(by_chunks.cache.stores, whole.cache.stores, strict=True):
        assert all(map(torch.equal, ours.keys(), theirs.keys()))


@dataclass(frozen=True, kw_only=True)
class Counting(Watching):
    def score(self, layer: LayerContext) -> Tensor:
        COUNTS.append(layer.num_tokens)
        return super().score(layer)


COUNTS: list[int] = []


def test_no_layer_ever_holds_more_than_its_budget_and_a_chunk() -> None:
    COUNTS.clear()
    Engine(tiny_model()).prefill(tiny_prompts(1000)[0][0], [Counting(budget=BUDGET)], chunk=CHUNK)
    assert len(COUNTS) == 3 * 32 and max(COUNTS) == BUDGET + CHUNK


def test_configurations_share_no_more_than_the_first_chunk() -> None:
    engine = Engine(tiny_model())
    methods = [load_method("snapkv", budget=BUDGET), load_method("h2o", budget=16), load_method("fullkv")]
    together = engine.prefill(prompt(), methods, chunk=CHUNK)
    assert engine.decode(together, 12) == [
        engine.decode(engine.prefill(prompt(), [method], chunk=CHUNK), 12)[0] for method in methods
    ]
    assert engine.prefill(prompt(), methods[:1], chunk=CHUNK)[0].cache.compress_seconds > 0
