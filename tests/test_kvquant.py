"""KVQuant: the authors' arithmetic, keys before their rotation, calibration, and what is stored."""

from __future__ import annotations

import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import tiny_calibration
from hypothesis import given, settings
from hypothesis import strategies as st
from kvfactory_plugins.kvquant import EMBEDDED, KVQuant, read_calibration
from safetensors.torch import load_file
from test_golden_methods import Golden, rotate
from torch import Tensor

from kvfactory import Engine, UserError, load_method
from kvfactory.growing import Growing
from kvfactory.method import Method
from kvfactory.nonuniform import (
    Fixed,
    NonUniformColumn,
    PerToken,
    cluster_levels,
    dynamic_outliers,
    inner_range,
    nearest,
    normal_levels,
    quantiles,
    tamed,
    uniform_levels,
)
from kvfactory.packing import Sparse
from kvfactory.rotary import rotated
from kvfactory.testing import MethodContract, compress_layer, tiny_model, tiny_prompts

TINY = tiny_calibration(3, 2, 8)


class TestKVQuant(MethodContract):
    evicts = False

    def make(self, budget: int) -> Method:
        return load_method("kvquant", calibration=TINY, exact_size=1 if budget < 500 else 500)


class TestTOVAInKVQuant(MethodContract):
    keeps_newest = False

    def make(self, budget: int) -> Method:
        exact = 1 if budget < 500 else 500
        return load_method("tova", budget=budget, quant_method="kvquant", calibration=TINY, exact_size=exact)


# ---- the authors' functions ----


def per_channel(x: Tensor, outlying: Tensor, bounds: tuple[Tensor, Tensor], levels: Tensor) -> Tensor:
    """x [tokens, channels], each channel in its range, [1, channels] both."""
    bits = (len(levels) - 1).bit_length()
    return NonUniformColumn.of(
        x[None], outlying[None], Fixed(*(each[None] for each in bounds)), levels, bits
    ).decoded()[0]


@settings(max_examples=200)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 200)),
    share=st.sampled_from([0.0, 0.005, 0.01, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_outliers_and_ranges_in_one_call_are_those_of_two(
    shape: tuple[int, int, int], share: float, dtype: torch.dtype, seed: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    outlying = dynamic_outliers(x, share)
    for ours, expected in zip(tamed(x, share), (outlying, *inner_range(x, outlying)), strict=True):
        assert torch.equal(ours, expected)
        assert ours.dtype == expected.dtype


@pytest.mark.parametrize("case", ["dynamic_per_token", "dynamic_per_channel"])
def test_dynamic_ranges(shared: Path, case: str) -> None:
    golden = Golden(shared, f"kvquant__{case}")
    x, share = golden["in_x"], 1 - golden.params["sparsity_threshold"]
    dim = -1 if case == "dynamic_per_token" else 0
    outlying, nothing = dynamic_outliers(x, share, dim), torch.zeros_like(x, dtype=torch.bool)
    assert torch.equal(outlying, golden["out_outlier_mask"])

    def quantised(apart: Tensor, levels: Tensor, exact: int = 0) -> Tensor:
        stored = apart | (torch.arange(len(x)) < exact)[:, None]
        if dim == 0:
            return per_channel(x, stored, inner_range(x, apart, 0), levels)
        ranges = PerToken.of(*(each[None] for each in inner_range(x, apart)))
        return NonUniformColumn.of(x[None], stored[None], ranges, levels, (len(levels) - 1).bit_length()).decoded()[0]

    for bits in (2, 3, 4):
        for sparse, apart in enumerate((nothing, outlying)):
            ours = quantised(apart, uniform_levels(bits))
            torch.testing.assert_close(ours, golden[f"out_int_b{bits}_sparse{sparse}"], rtol=1e-4, atol=1e-5)
    levels = golden["in_lut"]
    torch.testing.assert_close(quantised(outlying, levels), golden["out_nuq3_sparse"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantised(nothing, levels), golden["out_nuq3_dense"], rtol=1e-4, atol=1e-5)
    assert torch.equal(quantised(outlying, levels)[outlying], x[outlying])
    # the reference takes the range of what is left when the first tokens are out: channels alone see a difference
    if dim == -1:
        first = quantised(outlying, levels, 2)
        torch.testing.assert_close(first, golden["out_nuq3_sparse_first2_fp16"], rtol=1e-4, atol=1e-5)


def test_calibrated_ranges_of_channels(shared: Path) -> None:
    golden = Golden(shared, "kvquant__static_key_calibrated")
    x, share = golden["in_x"], 1 - golden.params["sparsity_threshold"]
    lower, upper = golden["in_calib"].quantile(torch.tensor([share / 2, 1 - share / 2]), dim=0)[:, None]
    torch.testing.assert_close(lower[0], golden["out_lower"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(upper[0], golden["out_upper"], rtol=1e-4, atol=1e-5)
    outlying = (x < lower) | (x > upper)
    assert torch.equal(outlying, golden["out_outlier_mask"])
    levels = golden["out_lut"].sort().values
    ours = per_channel(x, outlying, (lower, upper), levels)
    torch.testing.assert_close(ours, golden["out_nuq"], rtol=1e-3, atol=1e-4)
    uniform = per_channel(x, outlying, (lower, upper), uniform_levels(3))
    torch.testing.assert_close(uniform, golden["out_int"], rtol=1e-3, atol=1e-4)


def test_clusters_are_as_good_as_the_references(shared: Path) -> None:
    """scikit-learn's centres differ from run to run; what counts is how far numbers are from them."""
    golden = Golden(shared, "kvquant__static_key_calibrated")
    lower, upper = golden["out_lower"], golden["out_upper"]
    x = golden["in_calib"]
    inside = (x >= lower) & (x <= upper)
    numbers = ((x - (upper + lower) / 2) / ((upper - lower) / 2))[inside]

    def distance(levels: Tensor) -> float:
        return float((numbers - levels[nearest(numbers, levels)]).square().mean())

    ours = cluster_levels(numbers, 8)
    assert torch.equal(ours, ours.sort().values)
    assert distance(ours) <= 1.02 * distance(golden["out_lut"].sort().values)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_levels(shared: Path, bits: int) -> None:
    golden = Golden(shared, "kvquant__normalfloat")
    levels = normal_levels(bits)
    torch.testing.assert_close(levels.double(), golden[f"out_nf{bits}"], rtol=1e-3, atol=1e-3)
    x, share = golden["in_x"], 1 - golden.params["sparsity_threshold"]
    outlying = dynamic_outliers(x, share, 0)
    ours = per_channel(x, outlying, inner_range(x, outlying, 0), levels.half().float())
    near = torch.isclose(ours, golden[f"out_nf{bits}_quant"], rtol=0.002, atol=0.002)
    assert (~near).sum() <= 2, "numbers half way between two levels, which the reference compares in float16"


@given(seed=st.integers(0, 99), bits=st.sampled_from([2, 3, 4, 8]))
def test_the_nearest_level_is_found(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = (torch.rand(2**bits, generator=generator) * 2 - 1).sort().values
    x = torch.randn(40, generator=generator)
    found = (x - levels[nearest(x, levels)]).abs()
    assert torch.equal(found, (x[:, None] - levels).abs().amin(1))


# ---- keys before their rotation ----


def test_keys_turn_back_and_forth() -> None:
    keys = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(1))
    frequencies = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    turned = rotate(keys, torch.arange(50))
    positions = torch.arange(50)[None]
    torch.testing.assert_close(rotated(keys, positions, frequencies), turned, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotated(turned, -positions, frequencies), keys, rtol=1e-4, atol=1e-5)


def layer(tokens: int, dim: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(heads, tokens, dim, generator=generator) for heads in (4, 2, 2))
    return q, k, v


def test_keys_are_quantised_before_their_rotation() -> None:
    """Channels whose numbers are all on levels before the rotation come back exactly, whatever their position."""
    q, _, v = layer(40)
    levels = uniform_levels(3)
    plain = 3 * levels[torch.randint(8, (2, 40, 16), generator=torch.Generator().manual_seed(2))]
    keys = rotate(plain, torch.arange(40))
    file = tiny_calibration(1, 2, 16)
    method = load_method("kvquant", calibration=file, levels="uniform", nbits=3, outlier_ratio=0.0, exact_size=0)
    store = compress_layer(method, q, keys, v)
    torch.testing.assert_close(torch.stack(store.keys()), keys, rtol=1e-4, atol=1e-4)
    assert store.nbytes() == 2 * 40 * 16 * 3 // 8 * 2 + 40 * 4


def test_evicted_keys_turn_by_their_true_positions() -> None:
    engine = Engine(tiny_model())
    ids, _ = tiny_prompts(60)
    settings = {"quant_method": "kvquant", "calibration": TINY, "nbits": 8, "outlier_ratio": 0.02}
    packed, plain = engine.prefill(ids[0], [load_method("snapkv", budget=20, **own) for own in (settings, {})])
    for ours, theirs in zip(packed.cache.stores, plain.cache.stores, strict=True):
        for a, b in zip(ours.keys(), theirs.keys(), strict=True):
            assert (a - b).abs().max() < 0.05 * b.abs().max()


# ---- what is stored ----


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes(bits: int) -> None:
    """Levels, two float16 a token, and outliers with their places, 6 bytes each."""
    tokens, dim = 2000, 64
    q, k, v = (x.half() for x in layer(tokens, dim))
    method = load_method(
        "kvquant", calibration=tiny_calibration(1, 2, dim), nbits=bits, outlier_ratio=0.0, exact_size=0
    )
    levels = 2 * 2 * tokens * dim * bits / 8
    assert compress_layer(method, q, k, v).nbytes() == levels + 4 * tokens
    sparse = load_method("kvquant", calibration=tiny_calibration(1, 2, dim), nbits=bits)
    keys = rotated(k, -torch.arange(tokens)[None], 10000.0 ** -(torch.arange(0, dim, 2) / dim)).abs() > 3 * 0.99
    outliers = keys[:, 1:].sum() + 2 * dim + (tokens - 1) * 2 + 2 * dim
    expected = levels + 4 * tokens + 6 * int(outliers)
    assert abs(compress_layer(sparse, q, k, v).nbytes() / expected - 1) < 0.01


def test_error_falls_with_bits_and_with_outliers() -> None:
    q, k, v = layer(96)

    def error(**settings: Any) -> float:
        store = compress_layer(load_method("kvquant", calibration=tiny_calibration(1, 2, 16), **settings), q, k, v)
        return float((torch.stack(store.keys()) - k).norm() + (torch.stack(store.values()) - v).norm())

    assert all(a > 1.3 * b for a, b in pairwise(error(nbits=bits) for bits in (2, 3, 4, 8)))
    assert error(nbits=3, outlier_ratio=0.5) < error(nbits=3, outlier_ratio=0.01)
    assert error(exact_size=96) < 1e-4


def test_the_first_token_is_exact() -> None:
    q, k, v = layer(30)
    store = compress_layer(load_method("kvquant", calibration=tiny_calibration(1, 2, 16), nbits=2), q, k, v)
    assert torch.equal(torch.stack(store.values())[:, 0], v[:, 0])
    torch.testing.assert_close(torch.stack(store.keys())[:, 0], k[:, 0])
    assert not torch.equal(torch.stack(store.values())[:, 1], v[:, 1])


def test_heads_that_part_ways_keep_what_they_have() -> None:
    """A token's values are one vector while heads hold the same tokens, and stay as they were when they do not."""
    q, k, v = layer(30)
    store = compress_layer(load_method("kvquant", calibration=tiny_calibration(1, 2, 16), nbits=3), q, k, v)
    for step in range(3):
        keys, values = torch.stack(store.keys()), torch.stack(store.values())
        length = keys.shape[1]
        index = torch.stack([torch.randperm(length)[: length - 2].sort().values for _ in range(2)])
        store.keep(index)  # type: ignore[attr-defined]
        rows = index[..., None].expand(-1, -1, 16)
        assert torch.equal(torch.stack(store.values()), values.gather(1, rows))
        torch.testing.assert_close(torch.stack(store.keys()), keys.gather(1, rows), rtol=1e-4, atol=1e-4)
        store.append(k[:, step : step + 1], v[:, step : step + 1], 30 + step)
        store.observe(None)


# ---- calibration ----


def test_the_embedded_models_tables() -> None:
    tables = load_file(EMBEDDED)
    assert tables["key_bounds/0.01"].shape == (30, 3, 64, 2)
    assert (tables["key_bounds/0.01"][..., 0] < tables["key_bounds/0.01"][..., 1]).all()
    for name, table in tables.items():
        if "levels" in name:
            assert (table.diff(dim=1) >= 0).all() and table.abs().max() <= 1
    assert EMBEDDED.stat().st_size < 400_000


def test_the_script_measures_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "scripts" / "calibrate_kvquant.py"
    calibrate_kvquant = runpy.run_path(str(path), run_name="calibrate_kvquant")
    output = tmp_path / "made.safetensors"
    arguments = ["--samples", "1", "--context_length", "120", "--outlier_ratios", "0,0.02", "--output", str(output)]
    with pytest.raises(SystemExit) as end:
        calibrate_kvquant["main"](arguments)
    assert not end.value.code and str(output) in capsys.readouterr().out
    method = load_method("kvquant", calibration=str(output), outlier_ratio=0.02)
    assert method.settings()["calibration"] == str(output)
    assert read_calibration(str(output), 0.02, 3).bounds.shape == (30, 3, 64, 2)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"calibration": "nowhere.safetensors"},
            "--calibration nowhere.safetensors: no calibration .*calibrate_kvquant",
        ),
        ({"calibration": __file__}, "no calibration"),
        ({"outlier_ratio": 0.2}, "--outlier_ratio 0.2: .* was made for 0.0, 0.01; take one of them"),
        ({"outlier_ratio": -1}, "--outlier_ratio is -1"),
    ],
)
def test_bad_settings_are_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_method("kvquant", **settings)


def test_a_model_of_another_shape_is_told() -> None:
    ids, _ = tiny_prompts(20)
    with pytest.raises(UserError, match="30 layers, 3 KV heads and head_dim 64, and this one has 3, 2 and 8; make one"):
        Engine(tiny_model()).prefill(ids[0], [load_method("kvquant")])
    assert KVQuant(calibration=TINY).nbits == 4


# ---- compiled loops ----


@settings(max_examples=20)
@given(
    bits=st.sampled_from([2, 4, 8]),
    tokens=st.integers(2, 90),
    share=st.sampled_from([0.0, 0.02, 0.5]),
    evict=st.sampled_from(["nothing", "the same", "others"]),
    seed=st.integers(0, 99),
)
def test_a_query_sees_what_is_read(bits: int, tokens: int, share: float, evict: str, seed: int) -> None:
    """Of whole caches and of what evictions left, with and without Numba, after steps that are encoded one by one."""
    chosen = {"calibration": tiny_calibration(1, 2, 16), "nbits": bits, "outlier_ratio": share}
    q, k, v = layer(tokens, seed=seed)
    more = layer(3, seed=seed + 1)[1:]
    generator = torch.Generator().manual_seed(seed)
    left = int(torch.randint(1, tokens + 1, (1,), generator=generator))
    rows = [torch.randperm(tokens, generator=generator)[:left].sort().values for _ in range(2)]
    index = torch.stack([rows[0], rows[0] if evict == "the same" else rows[1]])
    found = []
    for numba in (True, False):
        with pytest.MonkeyPatch.context() as patched:
            if not numba:
                patched.setattr("kvfactory.compiled.is_installed", lambda: False)
            store = compress_layer(load_method("kvquant", **chosen), q, k, v)
            if evict != "nothing":
                store.keep(index)  # type: ignore[attr-defined]
            for step in range(3):
                store.append(*(side[:, step : step + 1] for side in more), tokens + step)
                store.observe(None)
            buffer = store._buffer  # type: ignore[attr-defined]
            attended = buffer.attend(q.view(2, 2, tokens, 16)[:, :, -1], store._all_positions)  # type: ignore[attr-defined]
            keys, values = torch.stack(store.keys()), torch.stack(store.values())
            found.append((keys, values, attended, store.nbytes()))
    for keys, values, attended, _ in found:
        weights = (q.view(2, 2, tokens, 16)[:, :, -1] @ keys.transpose(1, 2) / 4).softmax(-1)
        torch.testing.assert_close(attended, weights @ values, rtol=1e-4, atol=1e-5)
    for with_numba, without in zip(*found, strict=True):
        assert with_numba == without if isinstance(without, int) else torch.allclose(with_numba, without, atol=1e-5)
    assert torch.equal(found[0][1], found[1][1]), "values are the same to the bit"


@given(
    shape=st.sampled_from([(1, 1), (3, 2), (2, 192), (4, 301)]),
    shares=st.sampled_from([(0.005, 0.995), (0.5,), (0.0, 0.3, 1.0)]),
    seed=st.integers(0, 99),
)
def test_quantiles_are_torchs(shape: tuple[int, int], shares: tuple[float, ...], seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for dim in (0, 1):
        expected = x.quantile(torch.tensor(shares), dim=dim, keepdim=True)
        assert torch.equal(torch.stack(quantiles(x, shares, dim)), expected)


@given(heads=st.integers(1, 3), tokens=st.integers(1, 20), dim=st.sampled_from([1, 8, 20]), seed=st.integers(0, 99))
def test_numbers_apart_stay_where_they_are(heads: int, tokens: int, dim: int, seed: int) -> None:
    """Through joining, letting go and parting, with Numba and without."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, tokens, dim, generator=generator)
    chosen = torch.rand(x.shape, generator=generator) < 0.3
    expected, cut = x * chosen, tokens // 2
    index = torch.stack([torch.randperm(tokens, generator=generator)[: cut + 1].sort().values for _ in range(heads)])
    for numba in (True, False):
        with pytest.MonkeyPatch.context() as patched:
            if not numba:
                patched.setattr("kvfactory.packing.has_numba", lambda device: False)
            parts = [Sparse.of(x[:, some], chosen[:, some]) for some in (slice(None, cut), slice(cut, None))]
        joined = parts[0].joined(parts[1])
        where = joined.where.read()[0]
        assert torch.equal(where, where.unique()), "ascending"
        assert torch.equal(joined.put_into(torch.zeros_like(x)), expected)
        kept = joined.keep(index)
        where = kept.where.read()[0]
        assert torch.equal(where, where.unique())
        rows = index[..., None].expand(-1, -1, dim)
        assert torch.equal(kept.put_into(torch.zeros(heads, cut + 1, dim)), expected.gather(1, rows))
        for head, own in enumerate(kept.heads()):
            assert torch.equal(own.put_into(torch.zeros(1, cut + 1, dim))[0], expected[head][index[head]])


def test_too_many_entries_for_places_of_four_bytes_are_told() -> None:
    nothing = Growing(torch.empty(1, 0, dtype=torch.int32))
    assert Sparse(nothing, nothing, (8, 2**21, 128)).nbytes() == 0
    with pytest.raises(UserError, match="2097153 entries of 8 heads and head_dim 128 are too many"):
        Sparse(nothing, nothing, (8, 2**21 + 1, 128))
