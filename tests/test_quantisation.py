"""Quantised storage: packed integers, the authors' arithmetic and schedule, and every method that evicts on top of it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import small_settings, tiny_calibration
from hypothesis import given, settings
from hypothesis import strategies as st
from kvfactory_plugins.gear import GEAR, low_rank, outliers
from test_golden_methods import Golden
from torch import Tensor
from transformers import PreTrainedModel

from kvfactory import DenseStore, Engine, HeadwiseStore, UserError, compress, load_method, load_model
from kvfactory.jobs import make_jobs
from kvfactory.method import Method
from kvfactory.packing import Groups, Sparse, pack, unpack
from kvfactory.quantisation import UniformColumn
from kvfactory.registry import get_registry
from kvfactory.testing import MethodContract, compress_layer, generate, tiny_model, tiny_prompts

REGISTRY = get_registry()
EVICTING = sorted(
    name for name, entry in REGISTRY.methods.items() if REGISTRY.has_budget(name) and "key_pruning" not in entry.parts
)
STORAGES = sorted(REGISTRY.parts["quant_method"])
BITS = (2, 3, 4, 8)
SMALL: dict[str, Any] = {"quant_residual_length": 8, "q_group_size": 8}


def small(storage: str, layers: int = 3, kv_heads: int = 2, head_dim: int = 8) -> dict[str, Any]:
    """Settings under which entries of a small model leave their window soon, or are calibrated."""
    return {"calibration": tiny_calibration(layers, kv_heads, head_dim)} if storage == "kvquant" else SMALL


class TestKIVI(MethodContract):
    evicts = False

    def make(self, budget: int) -> Method:
        # room for all: nothing leaves the window
        return load_method("kivi", nbits=4, q_group_size=8, quant_residual_length=8 if budget < 500 else 500)


class TestGEAR(MethodContract):
    evicts = False

    def make(self, budget: int) -> Method:
        return load_method("gear", quant_residual_length=8 if budget < 500 else 500)


class TestTOVAInKIVI(MethodContract):
    decode_budget = 16
    keeps_newest = False

    def make(self, budget: int) -> Method:
        window = 4 if budget < 500 else 500
        return load_method(
            "tova", budget=budget, quant_method="kivi", nbits=8, q_group_size=4, quant_residual_length=window
        )

    def test_the_decode_budget_is_kept(self) -> None:
        """In entries; bytes go up and down as entries leave the window and groups end."""
        (_, early), (_, late) = self._rows(60, tokens=24), self._rows(60, tokens=48)
        assert all(max(store.lengths()) <= 16 for store in (*early[0].stores, *late[0].stores))
        assert late[0].nbytes() <= 1.1 * early[0].nbytes()


def random_layer(tokens: int = 75, dim: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(heads, tokens, dim, generator=generator) for heads in (4, 2, 2))  # type: ignore[return-value]


# ---- packing ----


@given(bits=st.sampled_from(BITS), rows=st.integers(0, 5), eights=st.integers(1, 4), seed=st.integers(0, 99))
def test_levels_come_back_and_take_their_bits(bits: int, rows: int, eights: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(2**bits, (2, rows, 8 * eights), generator=generator, dtype=torch.uint8)
    packed = pack(levels, bits)
    assert packed.shape == (2, rows, eights * bits) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), levels)


@given(data=st.data(), tokens=st.integers(1, 20), size=st.integers(1, 7))
def test_groups_follow_their_entries(data: st.DataObject, tokens: int, size: int) -> None:
    groups = Groups.of(2, tokens, size, torch.device("cpu"))
    plain = [[token // size for token in range(tokens)]] * 2
    assert groups.index().tolist() == plain
    count = data.draw(st.integers(1, tokens))
    index = [sorted(data.draw(st.permutations(range(tokens)))[:count]) for _ in range(2)]
    kept, left = groups.keep(torch.tensor(index))
    wanted = [[plain[head][token] for token in row] for head, row in enumerate(index)]
    names = sorted({group for row in wanted for group in row})
    assert left.nonzero()[:, 0].tolist() == names
    assert [[names[each] for each in row] for row in kept.index().tolist()] == wanted


@given(seed=st.integers(0, 99), first=st.integers(1, 5), second=st.integers(1, 5))
def test_sparse_numbers_move_with_their_entries(seed: int, first: int, second: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, first + second, 3, generator=generator)
    chosen = torch.rand(x.shape, generator=generator) < 0.4
    dense = x * chosen
    parts = [Sparse.of(x[:, part], chosen[:, part]) for part in (slice(first), slice(first, None))]
    joined = parts[0].joined(parts[1])
    assert torch.equal(joined.put_into(torch.zeros_like(x)), dense)
    index = torch.stack([torch.randperm(first + second, generator=generator)[:first].sort().values for _ in range(2)])
    rows = dense.gather(1, index[..., None].expand(-1, -1, 3))
    assert torch.equal(joined.keep(index).put_into(torch.zeros_like(rows)), rows)
    for head, each in enumerate(joined.heads()):
        assert torch.equal(each.put_into(torch.zeros(1, first + second, 3))[0], dense[head])


# ---- uniform levels ----

KIVI_CASES = [
    f"{kind}_b{bits}_g{group}"
    for kind, sizes in (("key_per_channel", ((2, 16), (2, 32), (4, 32), (8, 32))),)
    for bits, group in sizes
] + [f"value_per_token_b{bits}_g{group}" for bits, group in ((2, 16), (2, 32), (4, 32), (8, 32))]


@pytest.mark.parametrize("case", KIVI_CASES)
def test_kivi_quantiser(shared: Path, case: str) -> None:
    """Levels, scales, zero points and what comes back; the authors' 32-bit words lie along tokens and are not made here."""
    golden = Golden(shared, f"kivi__{case}")
    x, group = golden["in_x"][0], golden.params["group_size"]
    keys = case.startswith("key")
    quantise = UniformColumn.per_channel if keys else UniformColumn.per_token
    column = quantise(x, golden.params["bits"], group, torch.float32)
    assert torch.equal(unpack(column.packed.read(), column.bits), golden["out_levels"][0])
    torch.testing.assert_close(column.scale.read().flatten(), golden["out_scale"][0].flatten())
    torch.testing.assert_close(column.least.read().flatten(), golden["out_min"][0].flatten())
    torch.testing.assert_close(column.decoded(), golden["out_dequant"][0])


@pytest.mark.parametrize("case", ["k2v2_g16_r32_T75", "k4v2_g32_r32_T20"])
def test_kivi_stream(shared: Path, case: str) -> None:
    """Attention and the schedule over a prompt and the steps behind it."""
    golden = Golden(shared, f"kivi__attention_stream_{case}")
    params = golden.params
    q, k, v = golden.qkv()
    prompt, dim = params["prompt_len"], q.shape[-1]
    method = load_method(
        "kivi",
        nbits=params["k_bits"],
        q_group_size=params["group_size"],
        quant_residual_length=params["residual_length"],
        scale_dtype="model",
    )
    store = compress_layer(method, q[:, :prompt], k[:, :prompt], v[:, :prompt])
    if params["k_bits"] != params["v_bits"]:  # one setting serves both here: keys alone are compared then
        v = torch.zeros_like(v)
    outputs = []
    lengths = [stored_lengths(store)]
    for token in range(prompt, q.shape[1]):
        now = slice(token, token + 1)
        store.append(k[:, now], v[:, now], token)
        keys, values, _ = store.read(q[:, now])
        weights = (q[:, now] @ keys.transpose(1, 2) / math.sqrt(dim)).softmax(-1)  # type: ignore[union-attr]
        outputs.append(weights @ values)
        store.observe(None)
        lengths.append(stored_lengths(store))
    assert torch.equal(torch.tensor(lengths), golden["out_lengths"].long())
    if params["k_bits"] == params["v_bits"]:
        ours = torch.cat(outputs, 1).transpose(0, 1).flatten(1)
        torch.testing.assert_close(ours, golden["out_attn_output"][0, prompt:], rtol=1e-3, atol=1e-4)


def stored_lengths(store: Any) -> list[int]:
    """Quantised and full-precision keys, then values."""
    sides = store._buffer._keys, store._buffer._values
    return [length for (piece,) in sides for length in (piece.old_length, piece.recent.shape[1])]


@given(bits=st.sampled_from(BITS), tokens=st.integers(1, 40), along=st.sampled_from([0, 1]), seed=st.integers(0, 99))
def test_no_number_is_off_by_more_than_half_a_step(bits: int, tokens: int, along: int, seed: int) -> None:
    x = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(seed))
    x[0, :, 3] = 5.0  # a channel of equal numbers
    quantise = UniformColumn.per_channel if along == 0 else UniformColumn.per_token
    column = quantise(x, bits, 8, torch.float32)
    if along == 0:
        step = column.scale.read().repeat_interleave(8, 1)[:, :tokens]
        assert torch.equal(column.decoded()[0, :, 3], x[0, :, 3])
    else:
        step = column.scale.read().repeat_interleave(8, -1)
    assert ((column.decoded() - x).abs() <= step / 2 + 1e-5).all()


@pytest.mark.parametrize("bits", BITS)
def test_numbers_on_the_grid_are_exact(bits: int) -> None:
    levels = torch.arange(2**bits).repeat(1, 2, 64 // 2**bits if bits < 8 else 1).float()
    column = UniformColumn.per_token(levels * 0.5 - 3, bits, levels.shape[-1], torch.float32)
    assert torch.equal(column.decoded(), levels * 0.5 - 3)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    tokens=st.integers(1, 70),
    group_size=st.sampled_from([5, 8, 16, 32]),
    per_channel=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_multiplies_as_it_is_held_gives_what_is_written_out(
    bits: int, tokens: int, group_size: int, per_channel: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, query, weights = (torch.randn(2, *size, generator=generator) for size in ((tokens, 16), (3, 16), (3, tokens)))
    quantise = UniformColumn.per_channel if per_channel else UniformColumn.per_token
    column = quantise(x, bits, group_size, torch.float16)
    index = torch.arange(0, tokens, 2).expand(2, -1)
    for each in (
        column,
        column.keep(index),
        column.keep(index).joined(column),
        column.joined(column),
        column.heads()[1],
    ):
        heads, length, _ = each.decoded().shape
        some = weights.repeat(1, 1, 2)[:heads, :, :length]
        torch.testing.assert_close(
            each.products(query[:heads]), query[:heads] @ each.decoded().mT, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(each.mixed(some), some @ each.decoded(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", [*STORAGES, "think"])
def test_a_step_attends_to_what_the_store_says_it_holds(storage: str) -> None:
    kind = (
        {"key_pruning": "think"} if storage == "think" else {"quant_method": storage, **small(storage, 1, head_dim=32)}
    )
    store = compress_layer(load_method("fullkv", **kind), *random_layer())
    generator = torch.Generator().manual_seed(3)
    query, new = (torch.randn(heads, 1, 32, generator=generator) for heads in (4, 2))
    store.append(new, new, store.lengths()[0])
    attended = store.attend(query)
    assert attended is not None
    keys, values = (torch.stack(each()).repeat_interleave(2, 0) for each in (store.keys, store.values))
    expected = (query @ keys.transpose(1, 2) / math.sqrt(32)).softmax(-1) @ values
    torch.testing.assert_close(attended, expected, rtol=1e-4, atol=1e-5)


# ---- gear ----


@pytest.mark.parametrize("bits", [2, 4])
def test_gear(shared: Path, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `outliers_per_side` is 0; the authors' float16 in the sparse path is within the case's tolerance."""
    golden = Golden(shared, f"gear__full_b{bits}")
    x, start = golden["in_x"][0], golden["in_p0"][0]
    rows, directions = low_rank(x, start)
    torch.testing.assert_close(rows @ directions.transpose(1, 2), golden["out_lowrank_of_x"][0], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("kvfactory_plugins.gear.start", lambda x, rank: start)
    gear = GEAR(nbits=bits, q_group_size=16, rank=2, outlier_ratio=0, scale_dtype="model")
    for axis, kind in enumerate(("key", "value")):
        ours = gear.encode(x, axis).decoded()
        torch.testing.assert_close(ours, golden[f"out_{kind}_lowrank_only"][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, golden[f"out_{kind}_full"][0], rtol=0.02, atol=0.005)


@pytest.mark.parametrize("bits", [2, 4])
def test_gear_backbone(shared: Path, bits: int) -> None:
    golden = Golden(shared, f"gear__backbone_quant_b{bits}")
    x = golden["in_x"][0]
    gear = GEAR(nbits=bits, q_group_size=16, rank=0, outlier_ratio=0, scale_dtype="model")
    for axis, kind in enumerate(("key", "value")):
        torch.testing.assert_close(gear.encode(x, axis).decoded(), golden[f"out_{kind}_like"][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_error_falls_with_rank_and_outliers_are_exact(axis: int) -> None:
    x = random_layer(48, 16)[1]

    def error(rank: int, share: float = 0.0) -> float:
        gear = GEAR(nbits=2, rank=rank, outlier_ratio=share, scale_dtype="model")
        return float((gear.encode(x, axis).decoded() - x).norm())

    errors = [error(rank) for rank in (0, 1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.2 * errors[3]
    assert errors[-1] < 1e-4, "as many directions as channels leave no error"
    assert error(0, 1.0) == 0
    assert error(0, 0.25) < errors[0]
    chosen = outliers(x, 1 + axis, 0.25)
    decoded = GEAR(nbits=2, outlier_ratio=0.25).encode(x, axis).decoded()
    assert torch.equal(decoded[chosen], x[chosen])
    assert chosen.sum(1 + axis).unique().tolist() == [2 * int(x.shape[1 + axis] * 0.25 / 2)]


# ---- bytes ----


@pytest.mark.parametrize("bits", BITS)
def test_bytes_of_kivi(bits: int) -> None:
    """Levels, and a scale and a zero point of 2 bytes for each 32 numbers; nothing is in the window of a long prompt."""
    tokens, dim, group, window = 2048, 64, 32, 32
    _, k, v = random_layer(tokens, dim)
    method = load_method("kivi", nbits=bits, q_group_size=group, quant_residual_length=window)
    store = compress_layer(method, random_layer(tokens, dim)[0].half(), k.half(), v.half())
    key = dim * bits / 8 + 2 * dim * 2 / group
    value = dim * bits / 8 + 2 * (dim / group) * 2
    formula = 2 * (tokens * key + (tokens - window) * value + window * dim * 2)
    assert abs(store.nbytes() / formula - 1) < 0.05


@pytest.mark.parametrize("bits", BITS)
def test_bytes_of_gear(bits: int) -> None:
    tokens, dim, rank, share = 2000, 64, 4, 0.02
    store = compress_layer(load_method("gear", nbits=bits, rank=rank), *(x.half() for x in random_layer(tokens, dim)))
    levels = 2 * tokens * dim * bits / 8
    scales = 2 * 2 * dim + 2 * 2 * tokens
    low = 2 * rank * (tokens + dim) * 2
    sparse = (tokens * 2 * int(dim * share / 2) + dim * 2 * int(tokens * share / 2)) * (2 + 4)
    assert abs(store.nbytes() / (2 * (levels + scales + low + sparse)) - 1) < 0.05


@pytest.mark.parametrize("name", STORAGES)
def test_error_falls_with_bits(name: str) -> None:
    q, k, v = random_layer(96, 32)
    errors = []
    for bits in BITS:
        store = compress_layer(load_method(name, nbits=bits, **small(name, 1, 2, 32)), q, k, v)
        errors.append([float((torch.stack(held) - x).norm()) for held, x in ((store.keys(), k), (store.values(), v))])
    for side in zip(*errors, strict=True):
        assert all(a > 1.5 * b for a, b in pairwise(side))


# ---- with eviction ----


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", EVICTING)
def test_every_method_evicts_on_top_of_every_storage(name: str, storage: str) -> None:
    """What is kept is what the method keeps by itself, and what is stored of it is near to that, in fewer bytes."""
    ids, _ = tiny_prompts(90)
    engine = Engine(tiny_model())
    own = small_settings(name)
    stored = {"quant_method": storage, "nbits": 8, **small(storage)}
    methods = [load_method(name, budget=32, **own, **part) for part in ({}, stored)]
    plain, packed = engine.prefill(ids[0], methods)
    for ours, theirs in zip(packed.cache.stores, plain.cache.stores, strict=True):
        for a, b in zip(ours.positions(), theirs.positions(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip((*ours.keys(), *ours.values()), (*theirs.keys(), *theirs.values()), strict=True):
            assert (a - b).abs().max() <= 0.02 * b.abs().max()
    engine.decode([plain, packed], 24)
    assert packed.cache.kept() == plain.cache.kept()
    for store in packed.cache.stores:
        keys, values = store.keys(), store.values()
        assert [len(each) for each in keys] == [len(each) for each in values] == store.lengths()
        assert all(torch.isfinite(each).all() for each in (*keys, *values))


@settings(max_examples=50)
@given(data=st.data())
def test_entries_that_stay_are_not_quantised_twice(data: st.DataObject) -> None:
    """Whatever is evicted, and however differently by head, what is left reads as before, bit for bit."""
    storage = data.draw(st.sampled_from(STORAGES))
    q, k, v = random_layer(40, 16)
    store = compress_layer(load_method(storage, nbits=2, **small(storage, 1, 2, 16)), q, k, v)
    assert isinstance(store, DenseStore)
    for token in range(40, 60):
        before = torch.stack(store.keys()), torch.stack(store.values())
        count = data.draw(st.integers(4, store.lengths()[0]))
        index = torch.tensor([sorted(data.draw(st.permutations(range(store.lengths()[0])))[:count]) for _ in range(2)])
        store.keep(index)
        rows = index[..., None].expand(-1, -1, 16)
        assert torch.equal(torch.stack(store.keys()), before[0].gather(1, rows))
        assert torch.equal(torch.stack(store.values()), before[1].gather(1, rows))
        new = torch.full((2, 1, 16), float(token))
        store.append(new, new, token)
        assert torch.equal(torch.stack(store.keys())[:, -1:], new), "a step reads its own token as it came"
        store.observe(None)


def test_ragged_heads_have_a_buffer_each() -> None:
    store = compress_layer(load_method("adakv", budget=24, quant_method="kivi", **SMALL), *random_layer())
    assert isinstance(store, HeadwiseStore)
    assert len(set(store.lengths())) > 1


@pytest.mark.parametrize("storage", STORAGES)
def test_a_second_question_finds_no_trace_of_the_first(storage: str) -> None:
    engine = Engine(tiny_model())
    ids, _ = tiny_prompts(70)
    trunk = engine.prefill(ids[0], [load_method(storage, **small(storage))])[0]
    before = [x.clone() for store in trunk.cache.stores for x in (*store.keys(), *store.values())]
    size = trunk.cache.nbytes()
    engine.decode([engine.extend(trunk.fork(), ids[0, :9].tolist())], 30)
    after = [x for store in trunk.cache.stores for x in (*store.keys(), *store.values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert trunk.cache.nbytes() == size


# ---- flags ----


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"nbits": 5}, "--nbits"),
        ({"q_group_size": 0}, "--q_group_size is 0"),
        ({"quant_residual_length": 0}, "--quant_residual_length is 0"),
        ({"axis_key": 2}, "--axis_key"),
    ],
)
def test_bad_settings_are_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        compress_layer(load_method("kivi", **settings), *random_layer())


def test_a_storage_is_a_flag_that_goes_to_methods_that_can_have_it() -> None:
    jobs = make_jobs(REGISTRY, ["fullkv", "snapkv", "adakv"], [64], {"quant_method": "kivi"}, {"nbits": "4"})
    assert [job.method.settings()["quant_method"] for job in jobs] == ["kivi"] * 3
    assert {job.method.settings()["nbits"] for job in jobs} == {4}
    with pytest.raises(UserError, match="did you mean 'kivi'"):
        make_jobs(REGISTRY, ["snapkv"], [64], {"quant_method": "kivvi"})


# ---- a real model ----

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "The three primary colours are",
    "Dear Sir or Madam,\nI am writing to",
    "In 1969, two astronauts",
    "Photosynthesis is the process by which",
    "A recipe for bread: take flour,",
    "The museum opens at nine. The bakery opens at six. The museum opens at",
]


def test_eight_bits_give_the_full_caches_tokens() -> None:
    model, tokenizer = load_model(dtype="float32", device="cpu")
    engine = Engine(model, tokenizer)
    window = {"quant_residual_length": 32, "q_group_size": 32}
    methods = [load_method(storage, nbits=8, **({} if storage == "kvquant" else window)) for storage in STORAGES]
    sequences = []
    for prompt in PROMPTS:
        ids = tokenizer.encode("Rain fell on the quiet town all day. " * 12 + prompt)
        full, *packed = engine.prefill(ids, [load_method("fullkv"), *methods])
        assert all(sequence.cache.nbytes() < 0.6 * full.cache.nbytes() for sequence in packed)
        sequences += [full, *packed]
    answers = iter(engine.decode(sequences, 12))  # all in one batch, which reads the weights once a step
    for prompt in PROMPTS:
        tokens, *theirs = [next(answers) for _ in range(1 + len(STORAGES))]
        assert theirs == [tokens] * len(STORAGES), prompt


def test_generate_runs_on_quantised_entries() -> None:
    model: PreTrainedModel = tiny_model()
    ids, mask = tiny_prompts(60, 43)
    with compress(model, load_method("kivi", nbits=8, **SMALL)) as compression:
        output = generate(model, ids, mask)
    assert output.shape == (2, 12) and compression.cache is not None
    assert compression.cache.rows[0][0].nbytes() < 0.75 * 2 * 3 * 2 * 71 * 8 * 4


def test_blocks_of_fewer_tokens_than_directions() -> None:
    engine, method = Engine(tiny_model()), load_method("gear", quant_residual_length=2, rank=4)
    (ids,), _ = tiny_prompts(41)
    (sequence,) = engine.prefill(ids, [method])
    engine.decode([sequence], 6)
    assert sequence.cache.stores[0].lengths() == [46, 46]
