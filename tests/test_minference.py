"""MInference: which keys each pattern chooses, its attention against plain masks, and prefills that are not shared."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvfactory_plugins import minference
from kvfactory_plugins.minference import MInference, Pattern, block_sparse
from test_golden_methods import Golden
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

import kvfactory.sparse
from kvfactory import Engine, LayerContext, Method, Sequence, compress, load_method
from kvfactory.compiled import is_installed
from kvfactory.errors import UserError
from kvfactory.kernels import PromptAttention
from kvfactory.sparse import Blocks, Lines, compiled_attention, gathered_attention, masked_attention
from kvfactory.testing import MethodContract, generate, tiny_model, tiny_prompts
from scripts import load_script

LAYERS, HEADS = 3, 8
FOLDER = TemporaryDirectory()


@cache
def write(text: str) -> str:
    """The path of a file with this text."""
    path = Path(FOLDER.name) / f"{write.cache_info().misses}.json"
    path.write_text(text, encoding="utf-8")
    return str(path)


def pattern_file(*heads: tuple[str, int, int]) -> str:
    """A file that gives the heads of every layer of the tiny model these patterns, over and over."""
    layer = {str(head): [*heads[head % len(heads)], 0.9] for head in range(HEADS)}
    return write(json.dumps([layer] * LAYERS))


def sparse(**changes: Any) -> MInference:
    """All three patterns, tight enough to leave out much of a prompt of a few hundred tokens."""
    file = pattern_file(("vertical_and_slash", 30, 50), ("stream_llm", 3, 9), ("block_sparse", 0, 0))
    return MInference(**{"patterns": file, "block_size": 16, "block_count": 2, **changes})


def seen(choice: Lines | Blocks | None, tokens: int) -> Tensor:
    """The mask of a choice, bool [tokens, tokens], slow and obvious."""
    behind = torch.arange(tokens)[:, None] - torch.arange(tokens)
    causal = behind >= 0
    if choice is None:
        return causal
    if isinstance(choice, Lines):
        column = torch.zeros(tokens, dtype=torch.bool)
        column[choice.columns] = True
        return causal & (column | choice.slashes[behind.clamp(0)])
    chosen = torch.zeros(len(choice.chosen), len(choice.chosen), dtype=torch.bool).scatter(1, choice.chosen, True)
    return causal & chosen.repeat_interleave(choice.size, 0).repeat_interleave(choice.size, 1)[:tokens, :tokens]


IN_TORCH = (gathered_attention, masked_attention)
WAYS = (*IN_TORCH, compiled_attention) if is_installed() else IN_TORCH


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention under a mask, float64, all [tokens, dim]."""
    logits = query.double() @ key.double().T / math.sqrt(query.shape[-1])
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ value.double()


@pytest.mark.parametrize("case", ["v40_s130", "v60_s110"])
def test_columns_and_diagonals_are_the_authors(shared: Path, case: str) -> None:
    golden = Golden(shared, f"minference__vertical_slash_{case}")
    query, key, value = (each[0] for each in golden.qkv())
    method = MInference(last_queries=golden.params["last_q"])
    pattern = Pattern("vertical_and_slash", golden.params["vertical_size"], golden.params["slash_size"])
    choice = method.choose(pattern, query, key)
    assert isinstance(choice, Lines)
    assert torch.equal(choice.columns, golden["out_vertical"].long())
    assert torch.equal(choice.slashes.nonzero().flatten(), golden["out_slash"].long())
    for way in WAYS:
        torch.testing.assert_close(way(query, key, value, choice), golden["out_out_token_mask"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["b16_top4", "b32_top3"])
def test_blocks_are_the_authors(shared: Path, case: str) -> None:
    golden = Golden(shared, f"minference__block_sparse_{case}")
    for query, key, expected in zip(golden["in_q"][0], golden["in_k"][0], golden["out_blocks"][0], strict=True):
        choice = block_sparse(query, key, golden.params["top_k"], golden.params["block_size"])
        assert isinstance(choice, Blocks)
        chosen = torch.zeros_like(expected).scatter(1, choice.chosen, True)
        assert torch.equal(chosen.tril(), expected)


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 300),
    size=st.sampled_from([1, 7, 16, 64]),
    kind=st.sampled_from(minference.KINDS),
    sizes=st.tuples(st.integers(0, 80), st.integers(1, 160)),
    count=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_pattern_is_its_mask(
    tokens: int, size: int, kind: str, sizes: tuple[int, int], count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, tokens, 8, generator=generator)
    method = MInference(block_size=size, block_count=count)
    choice = method.choose(Pattern(kind, *sizes), query, key)
    mask = seen(choice, tokens)
    if kind == "stream_llm":
        behind = torch.arange(tokens)[:, None] - torch.arange(tokens)
        assert torch.equal(mask, (behind >= 0) & ((behind < sizes[1]) | (torch.arange(tokens) < sizes[0])))
    if kind != "block_sparse":
        assert mask.diagonal().all(), "a token sees itself"
    for way in WAYS if choice is not None else ():
        output = way(query, key, value, choice)
        torch.testing.assert_close(output.double(), plain(query, key, value, mask), rtol=1e-4, atol=1e-5)


@settings(max_examples=40)
@given(tokens=st.integers(1, 200), rows=st.integers(1, 64), seed=st.integers(0, 99))
def test_sums_by_column_and_by_diagonal(tokens: int, rows: int, seed: int) -> None:
    query, key = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(seed))
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    weights = plain(query, key, torch.eye(tokens), causal)[-rows:]
    by_column, by_slash = minference.sums(query[-rows:], key)
    torch.testing.assert_close(by_column.double(), weights.sum(0), rtol=1e-4, atol=1e-5)
    whole = pad(weights, (0, 0, tokens - len(weights), 0))
    expected = torch.stack([whole.diagonal(-behind).sum() for behind in range(tokens)])
    torch.testing.assert_close(by_slash.double(), expected, rtol=1e-4, atol=1e-5)


def test_work_done_piece_by_piece_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(3, 150, 8, generator=torch.Generator().manual_seed(1))
    for kind in minference.KINDS:
        choice = sparse().choose(Pattern(kind, 5, 20), query, key)
        assert choice is not None
        wholes = [way(query, key, value, choice) for way in IN_TORCH]
        with monkeypatch.context() as patched:
            patched.setattr(kvfactory.sparse, "PAIRS", 1)
            for way, whole in zip(IN_TORCH, wholes, strict=True):
                torch.testing.assert_close(way(query, key, value, choice), whole)


def test_memory_never_grows_with_the_square_of_the_prompt() -> None:
    """The work of a block of queries is bounded by what was chosen, however long the prompt."""
    query, key = torch.randn(2, 5000, 4, generator=torch.Generator().manual_seed(1))
    for kind in minference.KINDS:
        choice = MInference(block_count=3).choose(Pattern(kind, 40, 120), query, key)
        assert choice is not None
        held = max(keys.numel() for _, _, keys in kvfactory.sparse.gathered(choice, 5000, query.device))
        assert choice.width <= 40 + 64 * 2 * 120 and held <= max(kvfactory.sparse.PAIRS, 64 * choice.width)


def test_heads_of_a_group_have_patterns_of_their_own() -> None:
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(heads, 101, 8, generator=generator) for heads in (8, 2, 2))
    layers = [None, {"1": ["stream_llm", 2, 5, 1.0], "6": ["block_sparse", 0, 0, 1.0], "7": None}]
    method = MInference(patterns=write(json.dumps(layers)), block_size=16, block_count=2)
    assert method.prefill_attention(LayerContext(0, 2, query, key, value)) is None, (
        "the default pattern leaves nothing out of 101 tokens"
    )
    output = method.prefill_attention(LayerContext(1, 2, query, key, value))
    assert output is not None
    for head, kind in enumerate(["", "stream_llm", "", "", "", "", "block_sparse", ""]):
        q, k, v = query[head], key[head // 4], value[head // 4]
        choice = method.choose(Pattern(kind, 2, 5), q, k) if kind else None
        expected = plain(q, k, v, seen(choice, 101))
        torch.testing.assert_close(output[head].double(), expected, rtol=1e-4, atol=1e-5)


DENSE = {
    "no file": lambda: MInference(),
    "all columns": lambda: MInference(patterns=pattern_file(("vertical_and_slash", 90, 50))),
    "all diagonals": lambda: MInference(patterns=pattern_file(("vertical_and_slash", 30, 90))),
    "a wide window": lambda: MInference(patterns=pattern_file(("stream_llm", 45, 45))),
    "all blocks": lambda: MInference(patterns=pattern_file(("block_sparse", 0, 0)), block_size=16, block_count=6),
}


@pytest.mark.parametrize("name", DENSE)
def test_what_leaves_nothing_out_is_fullkv(name: str) -> None:
    model, method = tiny_model(), DENSE[name]()
    ids, mask = tiny_prompts(90, 61)
    with compress(model, method):
        assert torch.equal(generate(model, ids, mask), generate_stock(model, ids, mask))
    full, ours = Engine(model).prefill(ids[0], [load_method("fullkv"), method])
    assert full.logits is not None and ours.logits is not None
    assert torch.equal(full.logits, ours.logits)


def generate_stock(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Greedy tokens of FullKV, from the engine: row by row, without padding."""
    engine = Engine(model)
    rows = [engine.prefill(row[real.bool()], [load_method("fullkv")])[0] for row, real in zip(ids, mask, strict=True)]
    return torch.tensor(engine.decode(rows, 12))


def counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the number of caches of each pass is put down."""
    passes: list[int] = []
    forward = engine._forward

    def count(rows: list[list[Any]], tokens: list[list[int]]) -> Tensor:
        passes.append(len(rows[0]))
        return forward(rows, tokens)

    monkeypatch.setattr(engine, "_forward", count)
    return passes


def test_each_method_gets_the_prefill_it_would_get_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ids = Engine(tiny_model()), tiny_prompts(150)[0][0]
    snapkv = load_method("snapkv", budget=40)
    methods: list[Method] = [sparse(), load_method("fullkv"), sparse(block_count=3), snapkv, sparse()]
    alone = [engine.prefill(ids, [method])[0] for method in methods]
    passes = counted(engine, monkeypatch)
    together = engine.prefill(ids, methods)
    assert passes == [2, 2, 1], "equal sparse methods share a pass, and so do all dense ones"
    for one, other, method in zip(together, alone, methods, strict=True):
        assert one.cache.method is method
        assert one.logits is not None and other.logits is not None and torch.equal(one.logits, other.logits)
    assert together[0].prefill_seconds == together[4].prefill_seconds != together[1].prefill_seconds
    assert together[1].prefill_seconds == together[3].prefill_seconds > 0
    with torch.no_grad():
        stock = engine.model.lm_head(engine.model.model(input_ids=ids[None])[0][:, -1:])[0, 0]
    assert torch.equal(together[1].logits, stock), "FullKV's prefill is the stock model's bit for bit"
    assert not torch.equal(logits_of(together[0]), logits_of(together[1])), "sparse is not dense"
    assert engine.decode(together, 8) == [engine.decode([each], 8)[0] for each in alone]


def logits_of(sequence: Sequence) -> Tensor:
    assert sequence.logits is not None
    return sequence.logits


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_padded_batch_is_its_rows(kernel: str) -> None:
    """The short row is dense, so kernel and pattern meet in one batch."""
    model, (ids, mask) = tiny_model(attn_implementation=kernel), tiny_prompts(150, 97, 12)
    with compress(model, sparse()):
        together = generate(model, ids, mask)
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = generate(model, ids[row : row + 1, -length:], mask[row : row + 1, -length:])
            assert torch.equal(together[row], alone[0])


def test_padding_attends_to_nothing() -> None:
    model, (ids, mask) = tiny_model(), tiny_prompts(150, 97)
    outputs: list[Tensor] = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    try:
        with compress(model, sparse()), torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
    finally:
        hook.remove()
    assert not outputs[0][1, : 150 - 97].any() and outputs[0][1, 150 - 97 :].any(-1).all()


def test_only_methods_with_an_attention_of_their_own_have_one() -> None:
    assert isinstance(sparse(), PromptAttention)
    assert not isinstance(load_method("fullkv"), PromptAttention)


def test_a_sliding_window_is_left_to_the_model() -> None:
    model, ids = tiny_model("mistral-window"), tiny_prompts(150)[0][0]
    full, ours = Engine(model).prefill(ids, [load_method("fullkv"), sparse()])
    assert torch.equal(logits_of(full), logits_of(ours))


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ({"0": []}, "it holds no list"),
        ([3], "layer 0 is no object"),
        ([{"a": ["stream_llm", 1, 2, 0.5]}], "a head is a number"),
        ([{}, {"2": ["streaming", 1, 2, 0.5]}], r"layer 1, head '2'.*vertical_and_slash"),
        ([{"0": ["stream_llm", 1]}], "vertical_size, slash_size, score"),
        ([{"0": ["stream_llm", 1, 0, 1.0]}], "a window is 1 or more"),
        ([{"0": ["vertical_and_slash", 1.5, 9, 1.0]}], "whole numbers"),
    ],
)
def test_a_bad_file_is_told(layers: Any, told: str) -> None:
    path = write(json.dumps(layers))
    with pytest.raises(UserError, match=told) as error:
        MInference(patterns=path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_no_file_and_no_json_are_told() -> None:
    for path in (write("[{"), "missing.json"):
        with pytest.raises(UserError, match=f"--patterns {path}: cannot be read"):
            MInference(patterns=path)


def test_a_file_of_a_larger_model_is_told() -> None:
    ids = tiny_prompts(20)[0][0]
    for layers in ([{}] * (LAYERS + 1), [{str(HEADS): ["stream_llm", 1, 2, 0.5]}]):
        method = MInference(patterns=write(json.dumps(layers)))
        with pytest.raises(UserError, match="the model has 3 and 8"):
            Engine(tiny_model()).prefill(ids, [method])


def test_the_authors_package_is_asked_for() -> None:
    with pytest.raises(UserError, match="--backend minference takes") as error:
        MInference(backend="minference")
    assert "\n" not in str(error.value)


class TestMInferenceContract(MethodContract):
    evicts = False

    def make(self, budget: int) -> Method:
        return sparse(block_count=3) if budget < 500 else MInference()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("search_patterns")


@pytest.mark.parametrize("kind", minference.KINDS)
def test_retained_attention_is_that_of_the_mask(script: ModuleType, kind: str) -> None:
    query, key = torch.randn(2, 150, 8, generator=torch.Generator().manual_seed(1))
    method = sparse()
    choice = method.choose(Pattern(kind, 5, 20), query, key)
    causal = torch.ones(150, 150, dtype=torch.bool).tril()
    weights = plain(query, key, torch.eye(150), causal)
    expected = (weights * seen(choice, 150)).sum(1)
    shares = script.retained(query, key, choice)
    torch.testing.assert_close(shares.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_search_gives_each_head_the_pattern_that_retains_most(script: ModuleType) -> None:
    engine, ids = Engine(tiny_model()), tiny_prompts(300)[0][0].tolist()
    layers = script.search(engine, ids, 140, 16)
    assert [len(layer) for layer in layers] == [HEADS] * LAYERS
    tried = script.candidates(140)
    method = script.Search(keys=140, sparse=MInference(block_size=16, block_count=8))
    store = engine.prefill(ids, [method])[0].cache.stores[1]
    for head, (*pattern, score) in layers[1].items():
        recall = store.recall[int(head)]
        assert len(recall) == len(tried) and 0 < score <= 1 and score == round(recall.max().item(), 5)
        assert Pattern(*pattern) == tried[recall.argmax()]
    found = MInference(patterns=write(json.dumps(layers)), block_size=16, block_count=8)
    assert not torch.equal(
        *(logits_of(each) for each in engine.prefill(ids, [load_method("fullkv"), found])),
    )


def test_the_search_writes_a_file(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, told in ((["--keys", "20"], "--keys is 20"), (["--keys", "200"], "less than --context_length")):
        with pytest.raises(SystemExit) as end:
            script.main(["--output", str(tmp_path / "p.json"), "--context_length", "200", *wrong])
        assert end.value.code == 2 and told in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        script.main(["--output", str(tmp_path / "p.json"), "--context_length", "200", "--keys", "130"])
    assert not end.value.code and "heads by pattern" in capsys.readouterr().out
    assert len(minference.read_patterns(str(tmp_path / "p.json"))) == 30
