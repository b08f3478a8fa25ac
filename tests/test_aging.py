"""Steps in compiled loops beside the same in torch, whatever happens between them; and the integers they multiply."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfactory import Engine, LayerContext, compiled, load_method
from kvfactory.aging import AgingBuffer
from kvfactory.packing import pack
from kvfactory.quantisation import UniformColumn
from kvfactory.testing import tiny_model, tiny_prompts

if not compiled.is_installed():
    pytest.skip("numba is not installed", allow_module_level=True)

from kvfactory import numba_integers
from kvfactory.numba_aging import STEPS, attend
from kvfactory.numba_entries import put, vector
from kvfactory.numba_loops import compiled as in_loops
from kvfactory.numba_vectors import size

SHORT = {"quant_residual_length": 20, "q_group_size": 8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "2 bits": ("kivi", {"nbits": 2, **SHORT}),
    "3 bits, wide groups": ("kivi", {"nbits": 3, "quant_residual_length": 5, "q_group_size": 32}),
    "groups of channels": ("kivi", {"nbits": 8, "axis_key": 1, **SHORT}),
    "groups of entries": ("kivi", {"nbits": 4, "axis_value": 0, **SHORT}),
    "blocks": ("gear", {"nbits": 4, "quant_residual_length": 6}),
}
HEADS, DIM = 2, 32


def buffer(kind: str, x: Tensor) -> AgingBuffer:
    """What holds a prompt's keys and values, both x [heads, tokens, head_dim], after its prefill."""
    name, own = KINDS[kind]
    context = LayerContext(
        layer_index=0,
        num_layers=1,
        queries=x,
        keys=x,
        values=x,
        hidden=x[0],
        inverse_frequencies=torch.ones(DIM // 2),
    )
    store = load_method(name, **own).compress(context)
    held = store._buffer  # type: ignore[attr-defined]
    assert isinstance(held, AgingBuffer)
    return held


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_steps_leave_what_torch_leaves(monkeypatch: pytest.MonkeyPatch, kind: str, data: st.DataObject) -> None:
    """To the bit, where tokens are appended, read, let go of and forked between steps."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))

    def random(tokens: int) -> Tensor:
        return torch.randn(HEADS, tokens, DIM, generator=generator).to(dtype)

    prompt, seen = random(data.draw(st.integers(30, 70))), 0
    pairs = [[buffer(kind, prompt), buffer(kind, prompt)]]
    doings = st.sampled_from(["step", "steps", "step", "steps", "append", "look", "keep", "fork"])
    for _ in range(data.draw(st.integers(1, 8))):
        doing = data.draw(doings)
        ours, plain = pair = data.draw(st.sampled_from(pairs))
        for _ in range({"step": 1, "steps": STEPS + 2}.get(doing, 0)):
            key, value, query = random(1), random(1), random(3)
            attended = []
            for each, installed in zip(pair, (True, False), strict=True):
                with monkeypatch.context() as patch:
                    patch.setattr("kvfactory.compiled.is_installed", lambda installed=installed: installed)
                    each.append(key, value)
                    found = each.attend(query, lambda: torch.arange(seen)[None])
                    if found is None:
                        keys, values = each.read(lambda: torch.arange(seen)[None])
                        found = (query.float() @ keys.float().mT / DIM**0.5).softmax(-1) @ values.float()
                    each.settle(lambda: torch.arange(seen)[None])
                    attended.append(found.float())
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(*attended, rtol=tolerance, atol=tolerance)
        more = random(data.draw(st.integers(1, 3))) if doing == "append" else random(0)
        length = ours.length
        count = data.draw(st.integers(length // 2, length)) if doing == "keep" else length
        index = torch.stack([torch.randperm(length, generator=generator)[:count].sort().values for _ in range(HEADS)])
        for each, installed in zip(pair, (True, False), strict=True):
            with monkeypatch.context() as patch:
                patch.setattr("kvfactory.compiled.is_installed", lambda installed=installed: installed)
                if doing == "append":
                    each.append(more, more)
                    each.settle(lambda: torch.arange(seen)[None])
                elif doing == "keep":
                    each.keep(index)
        if doing == "fork":
            pairs.append([each.fork() for each in pair])
        assert ours.length == plain.length
        room = 4 * STEPS * HEADS * DIM * dtype.itemsize
        assert plain.nbytes() / 1.05 <= ours.nbytes() <= plain.nbytes() * 1.05 + room
        if doing != "steps":  # looking at what there is ends a run of steps
            for one, other in zip(*(each.read(lambda: torch.arange(seen)[None]) for each in pair), strict=True):
                assert torch.equal(one, other)
    for ours, plain in pairs:
        for one, other in zip(*(each.read(lambda: torch.arange(seen)[None]) for each in (ours, plain)), strict=True):
            assert torch.equal(one, other)


def test_a_value_is_encoded_when_its_step_has_ended() -> None:
    """Between its attention and its end a step shows what was attended to."""
    x = torch.randn(HEADS, 60, DIM, generator=torch.Generator().manual_seed(0))
    held = buffer("2 bits", x)
    for _ in range(3):
        new = torch.randn(HEADS, 1, DIM)
        before = held.fork().read(lambda: torch.arange(0)[None])
        held.append(new, new)
        held.attend(new, lambda: torch.arange(0)[None])
        during = held.fork().read(lambda: torch.arange(0)[None])
        for one, other in zip(before, during, strict=True):
            assert torch.equal(one, other[:, :-1]) and torch.equal(other[:, -1:], new)
        held.settle(lambda: torch.arange(0)[None])
        _, values = held.fork().read(lambda: torch.arange(0)[None])
        assert not torch.equal(values[:, :-1], before[1])


def test_tokens_of_quantised_caches_are_the_same_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model())
    (ids,), _ = tiny_prompts(60)
    methods = [load_method(name, **own) for name, own in KINDS.values() if own.get("q_group_size") != 32]

    def run() -> list[list[int]]:
        return [engine.decode([each], 40)[0] for each in engine.prefill(ids, methods)]

    with_numba = run()
    monkeypatch.setattr("kvfactory.compiled.is_installed", lambda: False)
    assert run() == with_numba


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bits", [2, 8])
def test_small_weights_are_as_exact_as_large_ones(bits: int) -> None:
    """As in most heads one entry takes nearly all of the attention and has nothing to say, and the others share the rest."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(1, count, 64, generator=generator).bfloat16() for count in (3, 1500, 1500))
    keys[:, 0] = 25 * query.float().mean(1) / query.float().mean(1).norm() ** 2 * 8
    values[:, 0] = 0
    columns = (
        UniformColumn.per_channel(keys, bits, 32, torch.float16),
        UniformColumn.per_token(values, bits, 32, torch.float16),
    )
    of_keys, of_values = (column.compiled for column in columns)
    assert of_keys is not None and of_values is not None
    nothing = keys[:, :0]
    attended = attend(query, of_keys, nothing, of_values, nothing).double()
    exact, decoded = (column.decoded().double() for column in columns)
    weights = (query.double() @ exact.mT / 8).softmax(-1)
    assert (weights[..., 0] > 0.99).all()
    expected = weights @ decoded
    assert (attended - expected).norm() < 2**-8 * expected.norm()


# ---- integers ----

needs_integers = pytest.mark.skipif(not numba_integers.INTEGERS, reason="the processor does not multiply bytes")


@in_loops
def _by_channels(levels: Any, packed: Any, index: Any, channels: Any, bits: Any) -> None:
    numba_integers.put_channels(levels, 0, packed, index, channels, bits)


@in_loops
def _by_entries(levels: Any, packed: Any, index: Any, channels: Any, bits: Any, apart: Any) -> None:
    numba_integers.put_entries(levels, 0, packed, index, channels, bits, apart)


@in_loops
def _multiplied(sums: Any, levels: Any, digits: Any, x: Any, channels: Any, places: Any) -> None:
    numba_integers.put_digits(digits, 0, vector(x, 0, channels), places)
    put(sums, 0, numba_integers.level_products(levels, 0, digits, 0, channels, places))


@needs_integers
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [32, 64, 128])
@settings(max_examples=10)
@given(seed=st.integers(0, 99), largest=st.sampled_from([1e-3, 1.0, 300.0]))
def test_levels_are_multiplied_as_they_are_packed(dim: int, bits: int, seed: int, largest: float) -> None:
    """16 entries by four channels a row; sums as exact as two or three digits are."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(2**bits, (20, dim), dtype=torch.uint8, generator=generator)
    packed, first = pack(levels, bits).numpy(), seed % 5
    rows = np.zeros((dim // 4, 16), np.int32)
    _by_channels(rows, packed, first, size(dim), size(bits))
    fours = rows.view(np.uint8).reshape(dim // 4, 16, 4)
    some = levels[first : first + 16]
    assert np.array_equal(fours.transpose(1, 0, 2).reshape(16, dim), some.numpy())
    quads = np.zeros((dim // 16, 16), np.int32)
    _by_entries(quads, packed, first, size(dim), size(bits), size(1))
    assert np.array_equal(quads.view(np.uint8).reshape(dim, 4).T, levels[first : first + 4].numpy())
    x = torch.rand(dim, generator=generator).mul(2).sub(1).mul(largest).double()
    for places, exact in ((2, 2**-15), (3, 2**-22)):
        unit = x.abs().max() / numba_integers.greatest_multiple(places)
        digits, sums = np.zeros((places, dim), np.int8), np.zeros((1, 16), np.float32)
        _multiplied(sums, rows, digits, (x / unit).float().numpy(), size(dim), size(places))
        error = (torch.from_numpy(sums[0]).double() * unit - some.double() @ x).abs()
        assert error.max() <= exact * x.abs().max() * some.double().sum(1).max() * 1.1


@needs_integers
def test_the_greatest_multiple_has_its_digits() -> None:
    """Whatever is rounded, the last digit is a byte with a sign."""
    for places in (1, 2, 3):
        for sign in (-1, 1):
            x = np.full(32, sign * numba_integers.greatest_multiple(places), np.float32)
            digits, sums = np.zeros((places, 32), np.int8), np.zeros((1, 16), np.float32)
            _multiplied(sums, np.full((8, 16), 0x01010101, np.int32), digits, x, size(32), size(places))
            assert (sums == 32 * x[0]).all()
