"""Loops compiled by Numba against plain arithmetic in float64, and that nothing but time depends on them."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kvfactory_plugins.gear import GEAR
from test_triton_kernels import plain_mass
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvfactory import Engine, LayerContext, compiled, load_method
from kvfactory.attention import rotate
from kvfactory.kernels import KERNELS, kernel_of, sdpa_prefill
from kvfactory.quantisation import UniformColumn
from kvfactory.testing import tiny_model, tiny_prompts

if not compiled.is_installed():
    pytest.skip("numba is not installed", allow_module_level=True)

from kvfactory import numba_aging, numba_kernels, numba_loops

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("threads")


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}


def plain(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of query [queries, dim] over all of keys and values [length, dim], in float64."""
    logits = query.double() @ keys.double().T / query.shape[-1] ** 0.5
    return logits.softmax(-1) @ values.double()


@settings(max_examples=40)
@given(st.data())
def test_the_newest_token_sees_the_entries_of_each_head_and_nothing_behind_them(data: st.DataObject) -> None:
    rows, heads, queries = (data.draw(st.integers(1, most)) for most in (3, 3, 4))
    dim, dtype = data.draw(st.sampled_from([8, 20, 64])), data.draw(st.sampled_from(DTYPES))
    few = st.integers(1, 2 * numba_kernels.AT_ONCE + 3) if data.draw(st.booleans()) else st.integers(1, 40)
    lengths = torch.tensor([[data.draw(few) for _ in range(heads)] for _ in range(rows)])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    query, keys, values = (
        torch.randn(rows, heads, count, dim, generator=generator).to(dtype)
        for count in (queries, int(lengths.max()) + 5, int(lengths.max()) + 5)
    )
    behind = torch.arange(keys.shape[2]) >= lengths[..., None]
    keys[behind], values[behind] = torch.nan, torch.nan
    output = numba_kernels.newest(query, keys, values, lengths)
    assert output.shape == query.shape and output.dtype == dtype
    for row in range(rows):
        for head in range(heads):
            some = keys[row, head, : lengths[row, head]], values[row, head, : lengths[row, head]]
            expected = plain(query[row, head], *some)
            torch.testing.assert_close(output[row, head].double(), expected, **tolerance(dtype))
        own = [[side[row, head, : lengths[row, head]] for head in range(heads)] for side in (keys, values)]
        apart = numba_kernels.ragged(query[row].reshape(heads * queries, 1, dim), *own)
        assert torch.equal(apart.view(heads, queries, dim), output[row]), "rows alone are rows in company"


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_are_read_where_they_lie(dtype: torch.dtype) -> None:
    """A view of a longer buffer, one whose numbers are far apart, and logits in the hundreds."""
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(3, 70, 16, generator=generator).to(dtype) for _ in range(2))
    query = (60 * torch.randn(1, 3, 2, 16, generator=generator)).to(dtype)
    expected = torch.stack([plain(query[0, head], keys[head, 7:50], values[head, 7:50]) for head in range(3)])[None]
    apart = keys.transpose(1, 2).contiguous().transpose(1, 2)
    for held in (keys, apart):
        output = numba_kernels.newest(query, held[None, :, 7:50], values[None, :, 7:50], None)
        torch.testing.assert_close(output.double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_are_read_in_their_own_order(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(1, 3, 30, 16, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn(1, 2, 3, 16, generator=generator).to(dtype).transpose(1, 2)
    for each in (query, query.contiguous()):
        output, _ = numba_kernels.watched(each, keys, values, None)
        assert torch.equal(output, numba_kernels.watched(query.contiguous(), keys, values, None)[0])
        expected = torch.stack([plain(query[0, head], keys[0, head], values[0, head]) for head in range(3)])[None]
        newest = numba_kernels.newest(each, keys, values, None)
        torch.testing.assert_close(newest.double(), expected, **tolerance(dtype))


def test_numbers_of_another_type_are_not_read() -> None:
    query, entries = torch.ones(1, 1, 1, 8), torch.ones(1, 1, 3, 8, dtype=torch.bfloat16)
    for attend in (numba_kernels.newest, numba_kernels.watched):
        with pytest.raises(AssertionError, match="bfloat16"):
            attend(query, entries, entries, None)


def test_what_is_no_number_is_not_hidden() -> None:
    keys = torch.ones(1, 1, 30, 8)
    keys[0, 0, 3, 2] = torch.nan
    assert numba_kernels.newest(torch.ones(1, 1, 1, 8), keys, torch.ones(1, 1, 30, 8), None).isnan().all()


@given(st.lists(st.floats(-120, 0, width=32), min_size=1, max_size=200))
def test_exponentials_and_greatest(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    ours = torch.tensor([float(numba_loops.exponential(each)) for each in x.numpy()])
    torch.testing.assert_close(ours, x.exp(), rtol=1e-5, atol=1e-37)
    assert numba_loops.greatest(x.numpy()) == x.max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 17, 256, 600])
def test_a_prompts_attention_tells_its_sums_and_they_give_what_keys_received(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    queries, keys, values = (torch.randn(1, heads, tokens, 64, generator=generator).to(dtype) for heads in (6, 2, 2))
    output, log_sums = sdpa_prefill(queries, keys, values, None, None)
    repeated = (each.repeat_interleave(3, 1) for each in (keys, values))
    assert torch.equal(output, scaled_dot_product_attention(queries, *repeated, is_causal=tokens > 1))
    if tokens == 1:
        assert log_sums is None
        return
    assert log_sums is not None
    mass = LayerContext(0, 1, queries[0], keys[0], values[0], log_sums=log_sums[0]).attention_mass()
    torch.testing.assert_close(mass.double(), plain_mass(queries[0], keys[0]), rtol=1e-4, atol=1e-4)
    exact = 1e-5 if dtype == torch.float32 else 1e-4  # the fused operation takes coarser exponentials in bfloat16
    assert mass.sum(1).tolist() == pytest.approx([tokens] * 6, rel=exact)


@pytest.mark.parametrize(
    ("dim", "bits", "group", "dtype"),  # few: each is compiled anew
    [
        (64, 2, 32, torch.bfloat16),
        (32, 3, 24, torch.float32),
        (80, 4, 16, torch.float32),
        (16, 8, 1000, torch.bfloat16),
    ],
)
@settings(max_examples=15)
@given(st.data())
def test_encoded_and_recent_entries_are_attended_to_as_they_are_decoded(
    dim: int, bits: int, group: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    heads, queries, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(2, 1300))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    query, keys, values = (
        torch.randn(heads, count, dim, generator=generator).to(dtype) for count in (queries, length, length)
    )
    olds = [data.draw(st.integers(1, length - 1)) for _ in range(2)]
    both, left, later = min(olds), data.draw(st.integers(1, min(olds))), data.draw(st.booleans())
    columns, recent, decoded = [], [], []
    for x, old, quantise in zip(
        (keys, values), olds, (UniformColumn.per_channel, UniformColumn.per_token), strict=True
    ):
        encode = partial(quantise, bits=bits, group_size=group, dtype=torch.float16)
        column, rest = encode(x[:, :old]), x[:, old:]
        if left < both:  # an eviction leaves groups of different sizes
            some = [torch.randperm(both, generator=generator)[:left].sort().values for _ in range(heads)]
            column = column.keep(torch.stack([torch.cat([each, torch.arange(both, old)]) for each in some]))
        if later:  # there is room behind it then
            column, rest = column.joined(encode(rest)), rest[:, :0]
        columns.append(column.compiled)
        recent.append(rest)
        decoded.append(torch.cat([column.decoded(), rest.float()], 1))
    attended = numba_aging.attend(query, columns[0], recent[0], columns[1], recent[1])
    assert attended.dtype == dtype
    for each, key, value, output in zip(query, *decoded, attended, strict=True):
        torch.testing.assert_close(output.double(), plain(each, key, value), **tolerance(dtype))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.integers(1, 8),
    group=st.sampled_from([8, 24, 64, 1000]),
    tokens=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from([torch.float16, *DTYPES]),
    seed=st.integers(0, 99),
)
def test_levels_of_channels_are_those_of_torch_to_the_bit(
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    group: int,
    tokens: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    seed: int,
) -> None:
    later = tokens - tokens // 3  # the rest is put behind it
    x = torch.randn(3, tokens, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[0, :, :32] = 1.5  # a group of equal numbers has no scale
    columns = []
    for installed in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr("kvfactory.compiled.is_installed", lambda installed=installed: installed)
            column = UniformColumn.per_token(x[:, :later], bits, group, stored)
            columns.append(column.extended(x[:, later:]) if later < tokens else column)
    for name in ("packed", "scale", "least"):
        ours, expected = (getattr(column, name).read() for column in columns)
        assert torch.equal(ours, expected), name


@settings(max_examples=15)
@given(st.data())
def test_corrected_entries_are_attended_to_as_they_are_decoded(data: st.DataObject) -> None:
    """Directions in blocks, and numbers as they are."""
    heads, lengths = data.draw(st.integers(1, 3)), data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))
    gear = GEAR(nbits=4, rank=data.draw(st.integers(1, 3)), outlier_ratio=data.draw(st.sampled_from([0.02, 0.3])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    columns, decoded = [], []
    for axis in (0, 1):
        blocks = [torch.randn(heads, length, 32, generator=generator) for length in lengths]
        whole, *later = [gear.encode(each, axis) for each in blocks]
        for column in later:
            whole = whole.joined(column)
        columns.append(whole.compiled)
        decoded.append(whole.decoded())
    query = torch.randn(heads, 2, 32, generator=generator)
    nothing = query[:, :0]
    attended = numba_aging.attend(query, columns[0], nothing, columns[1], nothing)
    for each, key, value, output in zip(query, *decoded, attended, strict=True):
        torch.testing.assert_close(output.double(), plain(each, key, value), rtol=1e-4, atol=1e-4)


def test_other_kernels_and_devices_have_no_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_of("sdpa", torch.float32, CPU).newest is numba_kernels.newest
    assert kernel_of("eager", torch.float32, CPU) is KERNELS["eager"]
    assert kernel_of("sdpa", torch.float16, CPU) is KERNELS["sdpa"]
    assert kernel_of("sdpa", torch.bfloat16, torch.device("cuda")) is KERNELS["sdpa"]
    monkeypatch.setattr("kvfactory.compiled.is_installed", lambda: False)
    assert kernel_of("sdpa", torch.float32, CPU) is KERNELS["sdpa"]


def test_old_processors_have_no_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, capability, used in (
        ("x86_64", "AVX2", True),
        ("x86_64", "DEFAULT", False),
        ("aarch64", "DEFAULT", True),
    ):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda capability=capability: capability)
        assert compiled.is_installed.__wrapped__() == used


def test_tokens_are_the_same_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model())
    (ids,), _ = tiny_prompts(60)
    small = {"q_group_size": 8, "quant_residual_length": 8}
    methods = [
        load_method("fullkv"),
        *(load_method(name, budget=budget) for name in ("snapkv", "adakv", "h2o") for budget in (16, 24)),
        load_method("kivi", nbits=4, **small),
    ]

    def run() -> list[list[int]]:
        return engine.decode(engine.prefill(ids, methods), 12)

    with_numba = run()
    monkeypatch.setattr("kvfactory.compiled.is_installed", lambda: False)
    assert run() == with_numba


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 5),
    heads=st.sampled_from([(9, 3), (4, 4)]),
    dim=st.sampled_from([16, 80]),
    alike=st.booleans(),
    seed=st.integers(0, 99),
)
def test_single_tokens_are_turned_as_the_model_turns_them_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, rows: int, heads: tuple[int, int], dim: int, alike: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(rows, 1, h, dim, generator=generator).bfloat16().transpose(1, 2) for h in heads)
    cos, sin = torch.randn(2, 1 if alike else rows, 1, 1, dim, generator=generator).bfloat16()
    query[0, 0, 0, 0], key[0, 0, 0, 1] = torch.inf, torch.nan
    before = query.clone(), key.clone()
    ours = rotate(query, key, cos, sin)
    with monkeypatch.context() as patch:
        patch.setattr("kvfactory.compiled.is_installed", lambda: False)
        theirs = rotate(query, key, cos, sin)
    for x, y, given_, kept in zip(ours, theirs, (query, key), before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(given_, kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 9, 300])
def test_weights_are_those_of_the_output(length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(length)
    query, keys, values = (torch.randn(2, 3, count, 16, generator=generator).to(dtype) for count in (4, length, length))
    output, weights = numba_kernels.watched(query, keys, values, None)
    assert weights.dtype == torch.float32 and output.dtype == dtype
    expected = (query.double() @ keys.double().transpose(2, 3) / 4).softmax(-1)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.double(), expected @ values.double(), **tolerance(dtype))
    assert torch.equal(output, numba_kernels.newest(query, keys, values, None)) or dtype == torch.float32


def test_loops_work_where_nothing_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    program = "from kvfactory.numba_loops import KEPT, exponential; print(KEPT, exponential(0.0))"
    for cache, kept in ((tmp_path / "file", False), (tmp_path / "folder", True)):
        run = [sys.executable, "-c", program]
        answer = subprocess.run(run, env={**os.environ, "KVFACTORY_CACHE": str(cache)}, capture_output=True, text=True)
        assert answer.stdout.split() == [str(kept), "1.0"], answer.stderr
        assert any((tmp_path / "folder").rglob("*.nbc")) == kept
