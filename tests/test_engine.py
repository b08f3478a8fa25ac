"""The engine: one prefill for many, decoding that does not depend on company, and scores that are the model's own."""

from __future__ import annotations

import weakref
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibrations import tiny_calibration, tiny_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from kvfactory import (
    DenseStore,
    Engine,
    EvictionMethod,
    LayerContext,
    Method,
    Reading,
    Sequence,
    Store,
    TrackingMethod,
    compress,
    load_method,
)
from kvfactory.context import Prompt
from kvfactory.engine import DecodeRow
from kvfactory.models import load_tokenizer
from kvfactory.registry import get_registry
from kvfactory.testing import TINY_CONFIGS, compress_layer, generate, tiny_model, tiny_prompts

FAMILIES = sorted(TINY_CONFIGS)
BUILT_IN = [name for name, entry in sorted(get_registry().methods.items()) if entry.plugin.distribution == "kvfactory"]
WHILE_DECODING: dict[str, dict[str, Any]] = {
    "h2o": {"decode_budget": "same"},
    "streamingllm": {"decode_budget": "same", "cache_positions": True},
    "adakv": {"kv_cache_granularity": "query_head"},
}


def all_methods() -> list[Method]:
    """Every built-in method at two budgets, and those that act while decoding once more."""
    first_as_it_is: dict[str, dict[str, Any]] = {"minicache": {"start_layer": 2}, "think": {"pruning_ratio": 0}}
    first_as_it_is |= {"kivi": {"nbits": 8}, "gear": {"nbits": 8}}
    first_as_it_is["kvquant"] = {"nbits": 8, "calibration": tiny_calibration(3, 2, 8)}
    first_as_it_is["learned"] = {"weights": tiny_weights(3, 2, 8)}
    plain = [
        load_method(name, budget=budget, **first_as_it_is.get(name, {})) for name in BUILT_IN for budget in (20, 40)
    ]
    return plain + [load_method(name, budget=20, **settings) for name, settings in WHILE_DECODING.items()]


def prompt(length: int = 60, seed: int = 2) -> Tensor:
    return tiny_prompts(length, seed=seed)[0][0]


def question(length: int = 9) -> list[int]:
    return prompt(length, seed=8).tolist()


def fullkv() -> Method:
    return load_method("fullkv")


def prefilled(engine: Engine, ids: Tensor | None = None, method: Method | None = None) -> Sequence:
    return engine.prefill(prompt() if ids is None else ids, [method or fullkv()])[0]


def assert_same_state(one: Sequence, two: Sequence, rtol: float = 1e-4) -> None:
    """What two sequences keep, and all they could say next."""
    assert one.tokens == two.tokens and one.cache.seen == two.cache.seen
    for a, b in zip(one.cache.stores, two.cache.stores, strict=True):
        assert a.lengths() == b.lengths()
        assert all(torch.equal(x, y) for x, y in zip(a.positions(), b.positions(), strict=True))
        for x, y in zip((*a.keys(), *a.values()), (*b.keys(), *b.values()), strict=True):
            torch.testing.assert_close(x, y, rtol=rtol, atol=1e-5)


# ---- one prefill, one batch ----


@pytest.mark.parametrize(("family", "kernel"), [("llama", "sdpa"), ("qwen2", "eager"), ("mistral-window", "sdpa")])
def test_a_sweep_is_its_separate_runs(family: str, kernel: str) -> None:
    engine, methods = Engine(tiny_model(family, kernel)), all_methods()
    together = engine.prefill(prompt(), methods)
    engine.decode(together, 12)
    for method, sequence in zip(methods, together, strict=True):
        alone = prefilled(engine, method=method)
        assert engine.decode([alone], 12) == [sequence.tokens], method
        assert_same_state(sequence, alone)
        assert sequence.cache.nbytes() == alone.cache.nbytes()
    losses = engine.score(together, question())
    assert len({tuple(each.tolist()) for each in losses}) > len(methods) / 2, "or the methods would differ in nothing"


@cache
def a_crowd() -> tuple[Engine, list[Sequence], list[Sequence]]:
    """Sequences of three prompts and all methods, prefilled; and each of them decoded alone."""
    engine = Engine(tiny_model("qwen2"))  # whose rotary tables go by the longest row
    crowd = [each for length in (60, 43, 30) for each in engine.prefill(prompt(length), all_methods())]
    alone = [each.fork() for each in crowd]
    for each in alone:
        engine.decode([each], 8)
    return engine, crowd, alone


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_tokens_do_not_depend_on_what_shares_the_batch(data: st.DataObject) -> None:
    engine, crowd, alone = a_crowd()
    chosen = data.draw(st.lists(st.integers(0, len(crowd) - 1), min_size=2, max_size=12, unique=True))
    batch = [crowd[each].fork() for each in chosen]
    assert engine.decode(batch, 8) == [alone[each].tokens for each in chosen]
    for each, sequence in zip(chosen, batch, strict=True):
        assert_same_state(sequence, alone[each])


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_rows_may_join_and_leave_between_steps(data: st.DataObject) -> None:
    engine, crowd, alone = a_crowd()
    waiting = data.draw(st.lists(st.integers(0, len(crowd) - 1), min_size=3, max_size=9, unique=True))
    lengths = {each: data.draw(st.integers(1, 8)) for each in waiting}
    rows = {each: DecodeRow(crowd[each].fork(), lengths[each], stop=()) for each in waiting}
    active: list[DecodeRow] = []
    while active or waiting:
        for _ in range(data.draw(st.integers(0 if active else 1, 2))):
            if waiting:
                active.insert(0, rows[waiting.pop()])
        active = engine.step(active)
    for each, row in rows.items():
        assert row.sequence.tokens == alone[each].tokens[: lengths[each]]
        assert row.sequence.stop_reason == "length"


class FirstTokens(EvictionMethod):
    """Scores fall with position."""

    def score(self, layer: LayerContext) -> Tensor:
        return -torch.arange(layer.num_tokens).float().expand(layer.kv_heads, -1)


class LastTokens(FirstTokens):
    """The other way round, under settings that look the same."""

    def score(self, layer: LayerContext) -> Tensor:
        return -super().score(layer)


class FirstTokensByRight(FirstTokens):
    """Keeps the same, but some of it whatever the scores: others compete."""

    def protected(self) -> tuple[int, int]:
        return 3, 0


def test_methods_of_a_sweep_share_only_what_is_the_same() -> None:
    generator = torch.Generator().manual_seed(6)
    q, k = torch.randn(8, 60, 8, generator=generator), torch.randn(2, 60, 8, generator=generator)
    methods: list[Method] = [each(budget=10) for each in (FirstTokens, LastTokens, FirstTokensByRight)]
    for own in ({"window_size": 4}, {"window_size": 6}, {"kernel_size": 3}, {"gqa_score_agg": "max"}):
        methods.append(load_method("snapkv", budget=20, **own))
    for name in ("h2o", "snapkv"):
        methods.append(load_method(name, budget=20, kv_cache_granularity="query_head"))
    methods += [load_method("h2o", budget=20, recent_size=recent) for recent in (4, 8)]
    alone = [[each.tolist() for each in compress_layer(method, q, k, k).positions()] for method in methods]
    assert alone[0][0] == alone[2][0] == list(range(10)) and alone[1][0] == list(range(50, 60))
    assert len({str(each) for each in alone}) == len(methods) - 1
    for order in (1, -1):
        layer = LayerContext(0, 1, q, k, k)
        together = [[each.tolist() for each in method.compress(layer).positions()] for method in methods[::order]]
        assert together[::order] == alone


class CountsLayers(Method):
    """Keeps one token, and counts the layers it was shown before that are still held by anyone."""

    def __init__(self) -> None:
        vars(self).update(layers=[], held=0)

    def compress(self, layer: LayerContext) -> Store:
        layers: list[weakref.ref[LayerContext]] = vars(self)["layers"]
        vars(self)["held"] += sum(each() is not None for each in layers)
        layers.append(weakref.ref(layer))
        first = torch.zeros(layer.kv_heads, 1, dtype=torch.long)
        return DenseStore(*layer.gather(first), first.int())


def test_a_layers_keys_are_dropped_before_the_next_layer_comes() -> None:
    method = CountsLayers()
    sequences = Engine(tiny_model()).prefill(prompt(), [method])
    assert len(vars(method)["layers"]) == 3 and vars(method)["held"] == 0
    assert [each() for each in vars(method)["layers"]] == [None] * 3
    assert sequences[0].cache.kept() == [1, 1, 1]


# ---- when decoding ends ----


def stock_tokens(model: PreTrainedModel, ids: Tensor, stop: list[int], longest: int, shortest: int) -> list[int]:
    output = model.generate(
        input_ids=ids[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=longest,
        min_new_tokens=shortest,
        eos_token_id=stop,
        do_sample=False,
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize(("longest", "shortest"), [(1, 0), (1, 1), (4, 0), (4, 3), (12, 0), (12, 1), (12, 3), (12, 6)])
@pytest.mark.parametrize("seed", [1, 3])
def test_stop_tokens_end_a_row_as_in_generate(seed: int, longest: int, shortest: int) -> None:
    model, ids = tiny_model("qwen2"), prompt(30, seed)
    engine = Engine(model)
    free = engine.decode([prefilled(engine, ids)], 12)[0]
    stops = [[free[0]], [free[3]], [free[7], free[2]], [198], [free[1], 198, free[5]]]
    rows = [prefilled(engine, ids) for _ in stops]
    for stop, row in zip(stops, rows, strict=True):
        tokens = engine.decode([row], longest, stop=stop, min_new_tokens=shortest)[0]
        assert tokens == row.tokens == stock_tokens(model, ids, stop, longest, shortest)
        assert row.stop_reason == ("stop" if tokens[-1] in stop else "length")
    if longest == 12 and shortest < 3:
        assert any(row.stop_reason == "stop" for row in rows) and any(row.stop_reason == "length" for row in rows)


def test_rows_that_stop_leave_and_the_others_go_on() -> None:
    engine, ids = Engine(tiny_model("qwen2")), [prompt(30, seed) for seed in (1, 3, 5)]
    free = [engine.decode([prefilled(engine, each)], 12)[0] for each in ids]
    stop = {free[0][2]}
    rows = [prefilled(engine, each) for each in ids]
    tokens = engine.decode(rows, 12, stop)
    expected = [row[: row.index(free[0][2]) + 1] if free[0][2] in row else row for row in free]
    assert tokens == expected and len(expected[0]) <= 3
    assert [row.stop_reason for row in rows] == ["stop" if free[0][2] in row else "length" for row in free]
    assert [row.cache.seen for row in rows] == [30 + len(each) - 1 for each in tokens], "nothing is fed in vain"


def test_decoding_in_parts_is_decoding_at_once() -> None:
    engine = Engine(tiny_model())
    for method in all_methods():
        whole, parts = engine.prefill(prompt(), [method] * 2)
        engine.decode([whole], 9)
        assert engine.decode([parts], 4) == [whole.tokens[:4]]
        assert engine.decode([parts], 5) == [whole.tokens[4:]], "only what is new is returned"
        assert_same_state(parts, whole)


@pytest.mark.parametrize("longest", [0, -1])
def test_a_row_of_no_tokens_is_refused_as_in_generate(longest: int) -> None:
    engine = Engine(tiny_model())
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(tiny_model(), prompt()[None], torch.ones(1, 60, dtype=torch.long), tokens=longest)
    sequence = prefilled(engine)
    with pytest.raises(ValueError, match="max_new_tokens"):
        engine.decode([sequence], longest)
    assert sequence.tokens == []


# ---- one context, many questions ----


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_fork_with_a_question_is_the_stock_model_on_both(family: str, kernel: str) -> None:
    model = tiny_model(family, kernel)
    engine = Engine(model)
    trunk = prefilled(engine)
    for asked in (question(1), question(2), question(30)):
        whole = torch.cat([prompt(), torch.tensor(asked)])
        fork = engine.extend(trunk.fork(), asked)
        assert fork.logits is not None
        torch.testing.assert_close(fork.logits, model(whole[None]).logits[0, -1], rtol=1e-4, atol=1e-4)
        tokens = engine.decode([fork], 8)[0]
        assert tokens == generate(model, whole[None], torch.ones(1, len(whole), dtype=torch.long), 8)[0].tolist()
    assert trunk.cache.seen == 60 and trunk.cache.kept() == [60] * 3 and trunk.tokens == []


def test_an_answer_may_be_followed_by_a_question() -> None:
    model = tiny_model()
    engine = Engine(model)
    sequence = prefilled(engine)
    first = engine.decode([sequence], 4)[0]
    second = engine.decode([engine.extend(sequence, question())], 6)[0]
    whole = torch.tensor([[*prompt().tolist(), *first, *question()]])
    assert second == generate(model, whole, torch.ones_like(whole), 6)[0].tolist()
    assert sequence.tokens == first + second


def test_a_question_at_once_is_a_question_token_by_token() -> None:
    engine = Engine(tiny_model("mistral-window"))
    methods = [fullkv(), load_method("snapkv", budget=20), load_method("adakv", budget=20)]
    for method in methods:
        once, slowly = engine.prefill(prompt(), [method] * 2)
        engine.extend(once, question())
        for token in question():
            engine.extend(slowly, [token])
        assert_same_state(once, slowly)
        assert once.logits is not None and slowly.logits is not None
        torch.testing.assert_close(once.logits, slowly.logits, rtol=1e-4, atol=1e-4)


def test_an_empty_question_changes_nothing() -> None:
    engine = Engine(tiny_model())
    one, two = engine.prefill(prompt(), [fullkv()] * 2)
    assert engine.decode([engine.extend(one, [])], 5) == engine.decode([two], 5)


# ---- scores ----


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fullkvs_losses_are_the_stock_models(family: str) -> None:
    model = tiny_model(family, "eager")
    ids, given = prompt(), question(30)
    whole = torch.tensor([*ids.tolist(), *given])
    logits = model(whole[None]).logits[0, len(ids) - 1 : -1].float()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(given), reduction="none")
    engine = Engine(model)
    evicted = load_method("snapkv", budget=16)
    ours, squeezed = engine.score(engine.prefill(ids, [fullkv(), evicted]), torch.tensor(given))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert ours.dtype == torch.float32 and ours.shape == (30,)
    assert (squeezed - expected).abs().max() > 1e-3 and squeezed[0] == pytest.approx(expected[0].item(), abs=1e-4)


def test_scoring_is_stepping() -> None:
    engine, methods, given = Engine(tiny_model()), all_methods(), question(12)
    scored = engine.prefill(prompt(), methods)
    losses = engine.score(scored, given)
    for method, sequence, ours in zip(methods, scored, losses, strict=True):
        stepped = prefilled(engine, method=method)
        for token, loss in zip(given, ours.tolist(), strict=True):
            assert stepped.logits is not None
            assert -stepped.logits.log_softmax(-1)[token].item() == pytest.approx(loss, abs=1e-4)
            engine.extend(stepped, [token])
        assert engine.decode([sequence], 4) == engine.decode([stepped], 4), "a scored sequence ends behind the tokens"
        assert_same_state(sequence, stepped)


def test_what_was_generated_may_be_scored() -> None:
    engine = Engine(tiny_model())
    one, two = engine.prefill(prompt(), [fullkv()] * 2)
    tokens = engine.decode([one], 5)[0]
    engine.extend(two, tokens)
    for ours, expected in zip(engine.score([one], question()), engine.score([two], question()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_no_tokens_have_no_losses() -> None:
    engine = Engine(tiny_model())
    sequences = engine.prefill(prompt(), [fullkv()] * 2)
    assert [each.shape for each in engine.score(sequences, [])] == [(0,), (0,)]


# ---- shared scores ----


def test_methods_share_scores_if_they_score_alike_and_not_otherwise() -> None:
    """By what they do, not by their settings alone: two of a kind may have the same ones."""

    class First(TrackingMethod):
        def track_prompt(self, layer: LayerContext) -> Tensor:
            return self.per_stored_head(layer, layer.attention_mass())

        def track_step(self, state: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
            return state

        def value(self, state: Tensor, positions: Tensor) -> Tensor:
            return state

    class Second(First):
        def value(self, state: Tensor, positions: Tensor) -> Tensor:
            return -state

    class Renamed(First):
        pass

    q, k, v = (torch.randn(heads, 40, 8, generator=torch.Generator().manual_seed(1)) for heads in (4, 2, 2))
    layer = LayerContext(0, 1, q, k, v)
    first, second, renamed = (
        cls(budget=10).compress(layer).positions()[0].tolist() for cls in (First, Second, Renamed)
    )
    assert first != second and first == renamed
    alone = Second(budget=10).compress(LayerContext(0, 1, q, k, v)).positions()[0].tolist()
    assert second == alone
    assert layer.shared(First(budget=4)._score_key, lambda: None) is layer.shared(
        Renamed(budget=9)._score_key, lambda: None
    )


# ---- positions ----


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_new_tokens_get_their_true_positions(family: str) -> None:
    """Counted from tokens seen. In the first layer a key depends on its token and position alone: it tells."""
    engine, given = Engine(tiny_model(family)), question(10)
    methods = all_methods()
    whole = prefilled(engine)
    engine.extend(whole, given)
    true_keys = torch.stack(whole.cache.stores[0].keys())
    for method, sequence in zip(methods, engine.prefill(prompt(), methods), strict=True):
        engine.score([sequence], given)
        assert sequence.cache.seen == 69, "the last of the ten waits to be fed"
        for layer, store in enumerate(sequence.cache.stores):
            for head, (positions, keys) in enumerate(zip(store.positions(), store.keys(), strict=True)):
                evicts = getattr(method, "decode_budget", getattr(method, "budget", None)) is not None
                assert evicts or positions[-9:].tolist() == list(range(60, 69)), method
                assert positions[-1] <= 68
                if layer == 0:
                    expected = true_keys[head * 2 // len(store.keys()), positions]
                    few_bits = getattr(method, "quant_method", None) is not None
                    torch.testing.assert_close(keys, expected, rtol=1e-4, atol=0.05 if few_bits else 1e-4)


# ---- time ----


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still but for what the test adds to its `time`."""
    standing = SimpleNamespace(time=100.0)
    monkeypatch.setattr("kvfactory.clock.time", SimpleNamespace(perf_counter=lambda: standing.time))
    return standing


class Slow(Method):
    """Takes a second a layer for a measure of its own, and shares another of two; `deep` makes one from the other."""

    def __init__(self, clock: SimpleNamespace, deep: bool) -> None:
        vars(self).update(clock=clock, deep=deep)

    def work(self, seconds: float) -> float:
        vars(self)["clock"].time += seconds
        return seconds

    def compress(self, layer: LayerContext) -> Store:
        self.work(1)

        def shallow() -> float:
            return layer.shared("measure", lambda: self.work(2))

        if vars(self)["deep"]:
            layer.shared("deep measure", lambda: self.work(4) + shallow())
        else:
            shallow()
        shallow()  # asked for again, and charged once
        return SlowToRead(layer.keys, layer.values, vars(self)["clock"])


class SlowToRead(DenseStore):
    """Takes half a second to read."""

    def __init__(self, keys: Tensor, values: Tensor, clock: SimpleNamespace) -> None:
        super().__init__(keys, values)
        self._clock = clock

    def read(self, query: Tensor) -> Reading:
        self._clock.time += 0.5
        return super().read(query)


@pytest.mark.parametrize("order", [(False, True, True), (True, False), (True, True, False, False, True)])
def test_a_method_is_charged_as_if_it_ran_alone(clock: SimpleNamespace, order: tuple[bool, ...]) -> None:
    engine = Engine(tiny_model())
    alone = {deep: prefilled(engine, method=Slow(clock, deep)).cache for deep in (False, True)}
    assert {deep: each.compress_seconds for deep, each in alone.items()} == {False: 3 * 3, True: 3 * 7}
    assert all(each.own_seconds == each.compress_seconds for each in alone.values())
    started = clock.time
    shared = engine.prefill(prompt(), [Slow(clock, deep) for deep in order])
    assert [each.cache.compress_seconds for each in shared] == [3 * 7 if deep else 3 * 3 for deep in order]
    spent = clock.time - started
    assert sum(each.cache.own_seconds for each in shared) == spent == 3 * (len(order) + 2 + 4)
    assert [each.prefill_seconds for each in shared] == [0] * len(order), "compression is left out"


class SlowToFinish(Slow):
    """Takes a second for itself once the prompt is through, and shares a reading of five."""

    def compress(self, layer: LayerContext) -> Store:
        return DenseStore(layer.keys, layer.values)

    def finish(self, stores: list[Store], prompt: Prompt) -> list[Store]:
        self.work(1)
        assert prompt.shared("reading", lambda: self.work(5)) == 5
        return stores


def test_a_second_look_at_the_prompt_is_charged_as_if_it_were_ones_own(clock: SimpleNamespace) -> None:
    engine = Engine(tiny_model())
    for _ in range(2):  # nothing is left over for the next prompt
        started = clock.time
        shared = engine.prefill(prompt(), [SlowToFinish(clock, deep=False) for _ in range(3)])
        assert [each.cache.compress_seconds for each in shared] == [6] * 3
        assert sum(each.cache.own_seconds for each in shared) == clock.time - started == 3 + 5
        assert [each.prefill_seconds for each in shared] == [0] * 3


def test_a_step_is_charged_to_its_rows_in_equal_parts(clock: SimpleNamespace) -> None:
    engine = Engine(tiny_model())
    rows = engine.prefill(prompt(), [Slow(clock, deep=False)] * 2)
    engine.decode(rows, 5)  # the first token comes from the prefill, four are fed
    assert [row.decode_seconds for row in rows] == [4 * 3 * 0.5] * 2
    engine.decode(rows[:1], 1)
    assert [row.decode_seconds for row in rows] == [4 * 3 * 0.5 + 3 * 0.5, 4 * 3 * 0.5]


# ---- what is refused ----


@pytest.mark.parametrize("ids", [[], torch.zeros(0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)])
def test_an_empty_prompt_is_refused(ids: Any) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Engine(tiny_model()).prefill(ids, [fullkv()])


def test_a_prompt_is_one_row() -> None:
    engine = Engine(tiny_model())
    for ids in (prompt(), prompt()[None], prompt().tolist()):
        assert engine.prefill(ids, [fullkv()])[0].prompt_tokens == 60
    with pytest.raises(ValueError, match="one prompt"):
        engine.prefill(tiny_prompts(60, 60)[0], [fullkv()])


# ---- a real model ----


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Token ids of some English."""
    prose = " ".join(str(each.__doc__) for each in (str.format, str.split, dict, int, bytes, range, open, print, zip))
    ids: list[int] = load_tokenizer()(prose).input_ids
    assert len(ids) > 400
    return ids


def test_fullkv_on_the_embedded_model_is_stock(embedded: PreTrainedModel, text: list[int]) -> None:
    ids = torch.tensor([text[:300]])
    engine = Engine(embedded)
    tokens = engine.decode(engine.prefill(ids, [fullkv()]), 16)[0]
    stock = embedded.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert stock.shape[1] > 305, "it says more than a few tokens before it stops"
    assert tokens[: stock.shape[1] - 300] == stock[0, 300:].tolist()


def test_a_padded_batch_on_the_embedded_model_is_stock(embedded: PreTrainedModel, text: list[int]) -> None:
    ids, mask = torch.tensor([text[:200], [0] * 80 + text[260:380]]), torch.ones(2, 200, dtype=torch.long)
    mask[1, :80] = 0
    stock = generate(embedded, ids, mask, 12)
    with compress(embedded, fullkv()):
        assert torch.equal(generate(embedded, ids, mask, 12), stock)
    assert len(stock.unique()) > 8
