"""What Numba compiles for whole prompts: tiles of products, sums by keys and sparse attention, against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_minference import plain, seen
from test_triton_kernels import plain_mass
from torch import Tensor

from kvfactory import LayerContext, compiled
from kvfactory.kernels import sdpa_prefill
from kvfactory.moments import quadratic, turned_moments
from kvfactory.rotary import angles, turn
from kvfactory.sparse import Blocks, Lines, compiled_attention

if not compiled.is_installed():
    pytest.skip("numba is not installed", allow_module_level=True)

import numpy as np

from kvfactory import numba_loops
from kvfactory.numba_products import COLUMNS, MATRICES, ROWS, SIDE, add_tile, columns_of, rows_of, set_tile, tile_rows
from kvfactory.numba_prompt import attention_mass

DTYPES = [torch.float32, torch.bfloat16]
EXACT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@numba_loops.compiled
def add_whole_tile(tile: Any, at: Any, left: Any, row: Any, right: Any, column: Any) -> Any:
    set_tile(tile, at, left, row, right, column)
    add_tile(tile, at, left, row, right, column)
    return tile_rows(left)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "numbers"), [(1, 1, 2), (7, 70, 64), (33, 128, 80)])
def test_a_tile_is_a_part_of_a_product(rows: int, columns: int, numbers: int, dtype: torch.dtype) -> None:
    """Products of bfloat16 are exact, so sums are as good as those of float32."""
    left, right = random(2, rows, numbers, dtype=dtype), random(2, columns, numbers, dtype=dtype, seed=1)
    expected = left.double() @ right.double().transpose(1, 2)
    of_rows, of_columns = rows_of(left), columns_of(right)
    sums = torch.ones(2, of_rows.shape[1], of_columns.shape[1] * COLUMNS)
    tall = SIDE if MATRICES and dtype == torch.bfloat16 else ROWS
    for head in range(2):
        for row in range(0, rows, tall):
            for tile in range(of_columns.shape[1]):
                found = np.ones((3 * tall, COLUMNS), np.float32)
                at = head * of_columns.shape[1] + tile
                assert add_whole_tile(found, tall, of_rows, head * of_rows.shape[1] + row, of_columns, at) == tall
                assert (found[:tall] == 1).all() and (found[2 * tall :] == 1).all()
                part = torch.from_numpy(found[tall : 2 * tall])
                sums[head, row : row + tall, tile * COLUMNS : (tile + 1) * COLUMNS] = part
    torch.testing.assert_close(sums[:, :rows, :columns].double(), 2 * expected, rtol=1e-5, atol=1e-5)


def test_a_librarys_products_are_the_same_after_ours() -> None:
    """The processor's registers for matrices are left as a library expects them, in threads that it has too."""
    x, weight = random(64, 64, dtype=torch.bfloat16), random(96, 64, dtype=torch.bfloat16, seed=1)
    before = x @ weight.T
    queries, keys = random(2, 200, 64, dtype=torch.bfloat16), random(2, 200, 64, dtype=torch.bfloat16, seed=1)
    for _ in range(3):
        attention_mass(queries, keys, torch.zeros(2, 200))
        assert torch.equal(x @ weight.T, before)


@settings(max_examples=30)
@given(st.data())
def test_what_is_hidden_is_as_if_it_were_not_there(data: st.DataObject) -> None:
    """Diagonals, columns and blocks, of more tokens than are worked on together, and of none that a query sees at first."""
    tokens, dim = data.draw(st.integers(1, 400)), data.draw(st.sampled_from([8, 64, 80]))
    dtype, seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 99))
    query, key, value = random(3, tokens, dim, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if data.draw(st.booleans()):
        slashes = torch.rand(tokens, generator=generator) < data.draw(st.sampled_from([0.01, 0.5]))
        slashes[0] = True
        some = torch.rand(tokens, generator=generator) < data.draw(st.sampled_from([0, 0.02]))
        choice: Lines | Blocks = Lines(some.nonzero().flatten(), slashes, 64)
    else:
        size = data.draw(st.sampled_from([1, 16, 64, 150]))
        count = -(-tokens // size)
        order = torch.rand(count, count, generator=generator)
        later = torch.ones(count, count, dtype=torch.bool).triu(1)
        choice = Blocks(order.masked_fill(later, -1).argsort(descending=True)[:, : data.draw(st.integers(1, 3))], size)
    expected = plain(query, key, value, seen(choice, tokens))
    output = compiled_attention(query, key, value, choice)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=EXACT[dtype], atol=EXACT[dtype])


def test_a_plain_processor_gets_other_tiles() -> None:
    """Sixteen numbers at a time, and bfloat16 as float32."""
    program = """
import torch
import test_compiled_prompt as here
assert here.COLUMNS == 16
for dtype in here.DTYPES:
    here.test_a_tile_is_a_part_of_a_product(7, 70, 64, dtype)
    here.check_mass(dtype)
"""
    lesser = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", program], env={**os.environ, **lesser}, capture_output=True, text=True)
    assert not run.returncode, run.stderr


def check_mass(dtype: torch.dtype) -> None:
    queries, keys = random(1, 6, 150, 64, dtype=dtype), random(1, 2, 150, 64, dtype=dtype, seed=1)
    _, log_sums = sdpa_prefill(queries, keys, keys, None, None)
    assert log_sums is not None
    mass = LayerContext(0, 1, queries[0], keys[0], keys[0], log_sums=log_sums[0]).attention_mass()
    torch.testing.assert_close(mass.double(), plain_mass(queries[0], keys[0]), rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@given(st.data())
def test_moments_are_those_of_torch(data: st.DataObject) -> None:
    """Of queries and keys that lie by heads or by tokens, fewer than are worked on together or more."""
    tokens, dim = data.draw(st.sampled_from([1, 5, 70, 600])), data.draw(st.sampled_from([64, 128]))
    dtype, seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 99))
    queries, keys = random(6, tokens, dim, dtype=dtype, seed=seed), random(2, tokens, dim, dtype=dtype, seed=seed + 1)
    if data.draw(st.booleans()):
        queries, keys = (each.transpose(0, 1).contiguous().transpose(0, 1) for each in (queries, keys))
    first = data.draw(st.integers(0, tokens - 1))
    queries, keys = queries[:, first:], keys[:, first:]
    cos, sin = (each[first:tokens] for each in angles(10000.0 ** -(torch.arange(0, dim, 2) / dim), tokens))
    matrices = random(6, dim, dim, dtype=torch.float32, seed=seed + 2)
    matrices, vectors = matrices @ matrices.transpose(1, 2), random(6, dim, dtype=torch.float32, seed=seed + 3)
    mean, covariance = turned_moments(queries, cos, sin)
    x = turn(queries.double(), cos.double(), sin.double())
    spread = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(mean.double(), x.mean(1), rtol=1e-4, atol=1e-5)
    expected = spread.transpose(1, 2) @ spread / x.shape[1]
    torch.testing.assert_close(covariance.double(), expected, rtol=1e-4, atol=1e-4)
    repeated = keys.repeat_interleave(3, 0).double()
    products = (repeated * (repeated @ matrices.double() + vectors.double()[:, None])).sum(-1)
    torch.testing.assert_close(quadratic(keys, matrices, vectors).double(), products, rtol=1e-4, atol=1e-3)
