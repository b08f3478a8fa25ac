"""The monkeypatch: FullKV under it is the stock model, everything of generate() works, and nothing stays behind."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module  # type: ignore[import-untyped]
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from kvfactory import DenseStore, Engine, LayerContext, Method, Store, UserError, compress, load_method
from kvfactory.kernels import KERNELS
from kvfactory.testing import TINY_CONFIGS, generate, tiny_model, tiny_prompts

FAMILIES = sorted(TINY_CONFIGS)
BATCHES = [(60,), (60, 43, 30)]


def fullkv() -> Method:
    return load_method("fullkv")


def steps(model: PreTrainedModel, ids: Tensor, mask: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """What generate() says [rows, tokens], and the logits [rows, tokens, vocabulary] that it says it by."""
    greedy = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    output = model.generate(input_ids=ids, attention_mask=mask, **(greedy | settings | wanted))
    return output.sequences, torch.stack(output.logits, 1)


# ---- FullKV is the stock model ----


@pytest.mark.parametrize("lengths", BATCHES)
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fullkv_gives_the_stock_models_tokens(family: str, kernel: str, lengths: tuple[int, ...]) -> None:
    model, (ids, mask) = tiny_model(family, kernel), tiny_prompts(*lengths)
    stock, stock_logits = steps(model, ids, mask)
    with compress(model, fullkv()) as compression:
        ours, logits = steps(model, ids, mask)
    assert torch.equal(ours, stock)
    torch.testing.assert_close(logits, stock_logits, rtol=1e-4, atol=1e-4)
    assert compression.cache is not None
    for row, length in zip(compression.cache.rows, lengths, strict=True):
        assert row[0].seen == length + 11
        assert row[0].kept() == [length + 11] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", BATCHES)
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefill_logits_are_the_stock_models_bit_for_bit(
    family: str, kernel: str, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    model, (ids, mask) = tiny_model(family, kernel, dtype), tiny_prompts(*lengths)
    stock = model(ids, attention_mask=mask).logits
    for method in (fullkv(), load_method("snapkv", budget=16)):  # what is evicted afterwards changes nothing
        with compress(model, method):
            assert torch.equal(model(ids, attention_mask=mask).logits[mask.bool()], stock[mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_methods_see_what_the_layer_computed(family: str) -> None:
    """Keys are the projected hidden states, rotated by the frequencies, from position 0 on in a padded row too."""
    seen: list[LayerContext] = []

    class Look(Method):
        def compress(self, layer: LayerContext) -> Store:
            seen.append(layer)
            return DenseStore(layer.keys, layer.values)

    model, (ids, mask) = tiny_model(family), tiny_prompts(60, 43)
    with compress(model, Look()):
        generate(model, ids, mask, tokens=1)
    assert [(each.layer_index, each.num_tokens) for each in seen] == [(i, n) for i in range(3) for n in (60, 43)]
    for layer in seen:
        assert layer.num_layers == 3 and layer.hidden is not None and layer.inverse_frequencies is not None
        assert (layer.query_heads, layer.kv_heads, tuple(layer.values.shape)) == (8, 2, (2, layer.num_tokens, 8))
        attention = model.model.layers[layer.layer_index].self_attn
        for projection, rotated in ((attention.q_proj, layer.queries), (attention.k_proj, layer.keys)):
            plain = projection(layer.hidden).view(layer.num_tokens, -1, 8).transpose(0, 1)
            angles = torch.arange(layer.num_tokens)[:, None] * layer.inverse_frequencies
            left, right = plain.chunk(2, -1)
            turned = torch.cat(
                [left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], -1
            )
            torch.testing.assert_close(rotated, turned, rtol=1e-4, atol=1e-4)


# ---- all of generate() ----


class Streamer(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


WAYS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "several samples": {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False},
    "several beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "do_sample": False},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "no cache": {"use_cache": False, "do_sample": False},
    "a cache of one's own": {"past_key_values": DynamicCache, "do_sample": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate_is_the_stock_models(way: str) -> None:
    model, (ids, mask) = tiny_model(), tiny_prompts(40, 27)

    def run() -> Tensor:
        torch.manual_seed(4)
        settings = {key: value() if callable(value) else value for key, value in WAYS[way].items()}
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, **settings)

    stock = run()
    with compress(model, fullkv()):
        assert torch.equal(run(), stock)


def test_a_streamer_hears_each_token() -> None:
    model, (ids, mask) = tiny_model(), tiny_prompts(40)
    streams = Streamer(), Streamer()
    ask: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    stock = model.generate(streamer=streams[0], **ask)
    with compress(model, fullkv()):
        model.generate(streamer=streams[1], **ask)
    assert streams[0].tokens == streams[1].tokens == stock[0].tolist()
    assert streams[1].ended == 1


def test_a_prompt_may_come_as_embeddings() -> None:
    model, (ids, mask) = tiny_model(), tiny_prompts(40, 27)
    ask = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask, "do_sample": False}
    stock = model.generate(max_new_tokens=8, **ask)
    with compress(model, fullkv()):
        assert torch.equal(model.generate(max_new_tokens=8, **ask), stock)


@torch.no_grad()
def test_the_base_model_takes_its_arguments_by_place_too() -> None:
    model, (ids, mask) = tiny_model(), tiny_prompts(40, 27)
    stock = model.model(ids, mask)[0]
    with compress(model, fullkv()):
        assert torch.equal(model.model(ids, mask)[0][mask.bool()], stock[mask.bool()])


def test_a_conversation_goes_on_from_its_cache() -> None:
    model, (ids, mask) = tiny_model(), tiny_prompts(40, 27)
    question = tiny_prompts(9, 9, seed=8)[0]
    with compress(model, fullkv()) as compression:
        first, _ = steps(model, ids, mask, max_new_tokens=5, min_new_tokens=5)
        turn = torch.cat([first, question], 1)
        turn_mask = torch.cat([mask, torch.ones(2, 14, dtype=torch.long)], 1)
        cache = compression.cache
        ours, logits = steps(model, turn, turn_mask, past_key_values=cache)
        assert compression.cache is cache
    stock, stock_logits = steps(model, turn, turn_mask)
    assert torch.equal(ours, stock)
    torch.testing.assert_close(logits, stock_logits, rtol=1e-4, atol=1e-4)


def test_beams_of_a_batch_that_evicts_are_those_of_each_row_alone() -> None:
    model, (ids, mask) = tiny_model(), tiny_prompts(40, 27)
    method = load_method("h2o", budget=16, decode_budget="same")

    def beams(ids: Tensor, mask: Tensor) -> Tensor:
        settings = {"num_beams": 3, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
        with compress(model, method) as compression:
            output = model.generate(input_ids=ids, attention_mask=mask, **settings)
        assert compression.cache is not None
        assert all(row[0].kept() == [16] * 3 for row in compression.cache.rows)
        return output[:, ids.shape[1] :]

    together = beams(ids, mask)
    assert torch.equal(together[0], beams(ids[:1], mask[:1])[0])
    assert torch.equal(together[1], beams(ids[1:, -27:], mask[1:, -27:])[0])


# ---- nothing stays behind ----


def state(model: PreTrainedModel) -> list[Any]:
    """Everything that a patch could leave in a model: attributes and hooks of each module, and class forwards."""
    kept: list[Any] = []
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        kept.append((name, sorted(vars(module)), vars(module).get("forward"), vars(module).get("_old_forward")))
        kept.append(([len(each) for each in hooks], type(module).forward, sorted(vars(type(module)))))
    return kept


def test_nothing_is_left_patched() -> None:
    model, (ids, mask) = tiny_model.__wrapped__("llama"), tiny_prompts(40, 27)  # one that was never patched
    other = deepcopy(model)
    before, before_other, stock = state(model), state(other), generate(model, ids, mask)
    with compress(model, load_method("snapkv", budget=12)):
        assert state(model) != before
        squeezed = generate(model, ids, mask)
        assert state(other) == before_other, "another model of the same class is not touched"
        assert torch.equal(generate(other, ids, mask), stock)
    assert not torch.equal(squeezed, stock)
    assert state(model) == before
    assert torch.equal(generate(model, ids, mask), stock)
    engine = Engine(model)
    engine.decode(engine.prefill(ids[0], [load_method("snapkv", budget=12)]), 3)
    assert state(model) == before


class Fails(Method):
    """Fails in the second layer."""

    def compress(self, layer: LayerContext) -> Store:
        if layer.layer_index == 1:
            raise ArithmeticError("on purpose")
        return DenseStore(layer.keys, layer.values)


def test_nothing_is_left_patched_after_an_exception() -> None:
    model, (ids, mask) = tiny_model.__wrapped__("llama"), tiny_prompts(40, 27)
    before, stock = state(model), generate(model, ids, mask)
    with pytest.raises(ArithmeticError), compress(model, Fails()):
        generate(model, ids, mask)
    with pytest.raises(ArithmeticError), compress(model, Fails()):
        raise ArithmeticError
    with pytest.raises(ArithmeticError):
        Engine(model).prefill(ids[0], [Fails()])
    assert state(model) == before
    assert torch.equal(generate(model, ids, mask), stock)


def test_a_stock_cache_that_is_under_way_stays_stock() -> None:
    model, (ids, mask) = tiny_model(), tiny_prompts(40)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        stock = model(ids).logits[:, -1]
        with compress(model, load_method("snapkv", budget=12)) as compression:
            logits = model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, stock, rtol=1e-4, atol=1e-4)
    assert compression.cache is None and cache.get_seq_length() == 40


def test_without_a_cache_there_is_nothing_to_compress() -> None:
    model, (ids, mask) = tiny_model(), tiny_prompts(40)
    stock, _ = steps(model, ids, mask)
    with compress(model, load_method("snapkv", budget=12)) as compression:
        assert torch.equal(steps(model, ids, mask, use_cache=False)[0], stock)
    assert compression.cache is None


def test_an_engine_inside_the_context_is_right_or_refused() -> None:
    model, (ids, _) = tiny_model(), tiny_prompts(40)
    engine, method = Engine(model), load_method("streamingllm", budget=16)
    alone = engine.prefill(ids[0], [method])[0]
    tokens = engine.decode([alone], 6)
    try:
        with compress(model, fullkv()):
            inside = engine.prefill(ids[0], [method])[0]
            assert engine.decode([inside], 6) == tokens
    except UserError:
        return
    assert inside.cache.seen == alone.cache.seen == 45
    assert inside.cache.kept() == alone.cache.kept()


def test_a_context_inside_another_is_right_or_refused() -> None:
    model, (ids, mask) = tiny_model(), tiny_prompts(40)
    before, method = state(model), load_method("snapkv", budget=16)
    with compress(model, method):
        alone = generate(model, ids, mask)
    try:
        with compress(model, fullkv()), compress(model, method) as inner:
            ours = generate(model, ids, mask)
    except UserError:
        assert state(model) == before
        return
    assert inner.cache is not None and inner.cache.rows[0][0].seen == 51
    assert torch.equal(ours, alone)


# ---- accelerate ----


class Counts(ModelHook):
    calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        return args, kwargs


def test_accelerates_wrapper_is_kept_and_given_back() -> None:
    model, (ids, mask) = deepcopy(tiny_model()), tiny_prompts(40, 27)
    with compress(model, method := load_method("snapkv", budget=16)):
        expected = generate(model, ids, mask)
    stock, hook = generate(model, ids, mask), Counts()
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn, hook)
    before = state(model)
    with compress(model, method):
        assert torch.equal(generate(model, ids, mask), expected)
    assert hook.calls == 12 * 3, "each step goes through accelerate's wrapper"
    assert state(model) == before
    assert torch.equal(generate(model, ids, mask), stock)
    for layer in model.model.layers:
        remove_hook_from_module(layer.self_attn)
    assert torch.equal(generate(model, ids, mask), stock)


# ---- what is refused ----


def mask_with(*zeros: int) -> Tensor:
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, list(zeros)] = 0
    return mask


@pytest.mark.parametrize("mask", [mask_with(39), mask_with(38, 39), mask_with(0, 1, 20)])
def test_padding_that_is_not_on_the_left_is_refused(mask: Tensor) -> None:
    model, (ids, _) = tiny_model(), tiny_prompts(40, 40)
    before = state(model)
    with pytest.raises(ValueError, match=r"padding_side = 'left'"), compress(model, fullkv()):
        generate(model, ids, mask)
    assert state(model) == before


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_weights_are_refused(kernel: str) -> None:
    model, (ids, _) = tiny_model("llama", kernel), tiny_prompts(40)
    with pytest.raises(ValueError, match="output_attentions"), compress(model, fullkv()):
        model(ids, output_attentions=True)


@pytest.mark.parametrize(
    ("model_type", "hint"),
    [("qwen3", "did you mean 'qwen2'?"), ("mistral3", "did you mean 'mistral'?"), ("opt", "llama, mistral")],
)
def test_an_unknown_architecture_is_refused_with_the_closest_one(model_type: str, hint: str) -> None:
    model = deepcopy(tiny_model())
    before = state(model)
    model.config.model_type = model_type
    uses: list[Callable[[], Any]] = [lambda: Engine(model), lambda: compress(model, fullkv()).__enter__()]
    for use in uses:
        with pytest.raises(UserError) as error:
            use()
        assert f"unknown model family '{model_type}'" in str(error.value) and hint in str(error.value)
    assert state(model) == before


# ---- flash attention ----


def plain_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """[batch, tokens, heads, dim], as flash-attn has it; key heads may be fewer."""
    groups = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value)


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """flash-attn in plain torch, as a module and inside transformers; lists the shapes of keys of each decode call."""
    calls: list[tuple[int, ...]] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        assert q.dim() == k.dim() == v.dim() == 4 and k.shape == v.shape
        assert {each.stride(-1) for each in (q, k, v)} == {1}, "flash-attn wants the last dimension contiguous"
        calls.append(tuple(k.shape))
        return plain_attention(q, k, v, causal)

    def flash_attention_forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, query_length: int, is_causal: bool, **_: Any
    ) -> Tensor:
        assert is_causal and query_length == query.shape[1]
        output = torch.zeros_like(query)
        for row in range(len(query)):
            real = slice(None) if mask is None else mask[row].bool()
            output[row, real] = plain_attention(
                query[row : row + 1, real], key[row : row + 1, real], value[row : row + 1, real], True
            )[0]
        return output

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> Tensor:
        assert q.dim() == k.dim() == v.dim() == 3 and k.shape == v.shape
        assert {each.dtype for each in (cu_seqlens_q, cu_seqlens_k)} == {torch.int32}, "flash-attn wants int32"
        lengths = cu_seqlens_k.diff().tolist()
        assert max(lengths) == max_seqlen_k and set(cu_seqlens_q.diff().tolist()) == {max_seqlen_q}
        calls.extend((1, length, 1, k.shape[2]) for length in lengths)
        parts = zip(q.split(max_seqlen_q), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([plain_attention(*(each[None] for each in part), False)[0] for part in parts])

    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)  # transformers looks for it where it imports a model's module
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr("transformers.modeling_flash_attention_utils._flash_attention_forward", flash_attention_forward)
    yield calls


def flash_model(family: str) -> PreTrainedModel:
    """A tiny model that takes flash-attn for granted, which transformers would look for on construction."""
    model = deepcopy(tiny_model(family))
    model.config._attn_implementation = model.model._attn_implementation = "flash_attention_2"
    return model


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "everything": ("fullkv", {}),
    "dense": ("snapkv", {"budget": 16}),
    "ragged": ("adakv", {"budget": 16, "floor": 0.1}),
    "ragged, query heads": ("adakv", {"budget": 16, "kv_cache_granularity": "query_head"}),
}


@pytest.mark.parametrize("lengths", BATCHES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "mistral"])
@pytest.mark.parametrize("kind", METHODS)
def test_flash_decodes_as_sdpa_does(
    kind: str, family: str, lengths: tuple[int, ...], flash_calls: list[tuple[int, ...]]
) -> None:
    name, settings = METHODS[kind]
    method, (ids, mask) = load_method(name, **settings), tiny_prompts(*lengths)
    with compress(tiny_model(family, "sdpa"), method):
        expected, expected_logits = steps(tiny_model(family, "sdpa"), ids, mask)
    model = flash_model(family)
    with compress(model, method) as compression:
        ours, logits = steps(model, ids, mask)
    assert torch.equal(ours, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert compression.cache is not None
    lengths_kept = {each for row in compression.cache.rows for store in row[0].stores for each in store.lengths()}
    assert {shape[1] for shape in flash_calls} & lengths_kept, "the last step reads what is stored then"
    heads = {shape[2] for shape in flash_calls}
    assert 1 in heads if "ragged" in kind else 1 not in heads, (
        "a ragged store is read head by head, a dense one at once"
    )


@pytest.mark.parametrize("kind", METHODS)
def test_flash_leaves_a_question_of_many_tokens_to_a_kernel_with_masks(
    kind: str, flash_calls: list[tuple[int, ...]]
) -> None:
    ids, question = tiny_prompts(60)[0][0], tiny_prompts(9, seed=8)[0][0].tolist()
    name, settings = METHODS[kind]
    sdpa, flash = Engine(tiny_model()), Engine(flash_model("llama"))
    one, two = (engine.prefill(ids, [load_method(name, **settings)])[0] for engine in (sdpa, flash))
    sdpa.extend(one, question)
    flash.extend(two, question)
    assert one.logits is not None and two.logits is not None
    torch.testing.assert_close(two.logits, one.logits, rtol=1e-4, atol=1e-4)
    assert flash_calls == []
    assert flash.decode([two], 5) == sdpa.decode([one], 5)
    assert flash_calls != []


def test_flash_leaves_a_sliding_window_to_a_kernel_with_masks(flash_calls: list[tuple[int, ...]]) -> None:
    ids = tiny_prompts(60)[0][0]
    sdpa, flash = tiny_model("mistral-window"), flash_model("mistral-window")
    for name, settings in METHODS.values():
        one, two = Engine(sdpa).prefill(ids, [load_method(name, **settings)] * 2)
        assert Engine(flash).decode([one], 6) == Engine(sdpa).decode([two], 6)
    assert flash_calls == []


@torch.no_grad()
def half_precision_is_the_stock_model(device: str, kernel: str, dtype: torch.dtype) -> None:
    """Prefill bit for bit; in decoding the order of sums differs, so losses over given tokens are compared."""
    model = deepcopy(tiny_model("llama", kernel, dtype)).to(device)
    ids, mask = (each.to(device) for each in tiny_prompts(60, 43))
    stock = model(ids, attention_mask=mask).logits
    with compress(model, fullkv()):
        assert torch.equal(model(ids, attention_mask=mask).logits[mask.bool()], stock[mask.bool()])
    engine = Engine(model)
    methods = [load_method(name, **settings) for name, settings in METHODS.values()]
    sequences = engine.prefill(ids[0, :40], methods)
    forks = [each.fork() for each in sequences]
    losses = engine.score(sequences, ids[0, 40:])
    expected = torch.nn.functional.cross_entropy(stock[0, 39:-1].float(), ids[0, 40:], reduction="none")
    torch.testing.assert_close(losses[0], expected, rtol=0.02, atol=0.05)
    model.config._attn_implementation = "eager"
    for ours, eager in zip(losses, engine.score(forks, ids[0, 40:]), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_bfloat16_on_a_cpu(kernel: str) -> None:
    half_precision_is_the_stock_model("cpu", kernel, torch.bfloat16)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flash_attention_2"])
def test_half_precision_on_a_gpu(kernel: str, dtype: torch.dtype) -> None:
    if kernel == "flash_attention_2":
        pytest.importorskip("flash_attn")
    half_precision_is_the_stock_model("cuda", kernel, dtype)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_decode_kernel_is_plain_attention(kernel: str, dtype: torch.dtype, queries: int) -> None:
    generator = torch.Generator().manual_seed(queries)
    query, keys, values = (torch.randn(2, 3, count, 16, generator=generator).to(dtype) for count in (queries, 40, 40))
    allowed = torch.arange(40) < torch.tensor([40, 25])[:, None, None, None]
    for mask in (None, allowed):
        logits = query.double() @ keys.double().transpose(2, 3) / 4
        logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
        output = KERNELS[kernel].decode(query, keys, values, mask)
        assert output.shape == query.shape and output.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(
            output.double(), logits.softmax(-1) @ values.double(), rtol=tolerance, atol=tolerance
        )
