"""The Triton kernel for attention mass: interpreted on the CPU, compiled for a GPU that need not be there, and chosen.

Triton decides when a kernel is defined whether it is interpreted, so that happens in a process of its own: this file,
run as a script.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvfactory import LayerContext, triton_kernels
from kvfactory.triton_kernels import attention_mass

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

HEADS_AND_DIM = [(1, 1, 128), (6, 2, 64), (4, 1, 80)]
CASES = [
    *(
        (query_heads, kv_heads, tokens, dim, dtype, 1.0)
        for query_heads, kv_heads, dim in HEADS_AND_DIM
        for tokens in (1, 17, 128, 300)
        for dtype in (torch.float32, torch.bfloat16)
    ),
    (3, 1, 100, 96, torch.float16, 1.0),
    (2, 2, 150, 8, torch.float32, 1.0),
    (2, 1, 150, 64, torch.float32, 60.0),  # logits in the hundreds, whose exponentials no float32 holds
]
AGAIN = CASES[-3:]
LONG = 1024
"""Tokens of the run whose memory is measured."""


def inputs(query_heads: int, kv_heads: int, tokens: int, dim: int, dtype: torch.dtype, steep: float) -> list[Tensor]:
    torch.manual_seed(tokens + dim)
    queries = steep * torch.randn(tokens, query_heads, dim)  # heads in the middle, as a model has them
    return [queries.to(dtype).transpose(0, 1), torch.randn(kv_heads, tokens, dim).to(dtype)]


def plain_mass(queries: Tensor, keys: Tensor) -> Tensor:
    """Every weight written out, in float64."""
    tokens, dim = queries.shape[1:]
    repeated = keys.double().repeat_interleave(len(queries) // len(keys), 0)
    logits = queries.double() @ repeated.transpose(1, 2) / dim**0.5
    return (logits + torch.full((tokens, tokens), -torch.inf, device=keys.device).triu(1)).softmax(-1).sum(1)


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that torch made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, made.numel() if isinstance(made, Tensor) else 0)
        return made


def interpret(path: Path) -> None:
    """What the kernel gives for each case, for some again, and how large the tensors of a long run are, to a file."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, make = InterpreterBuilder.create_dot, TensorHandle.__init__
    sizes = []

    def multiply_numbers(self: Any, *sides: Any) -> Any:
        """The interpreter has bfloat16 as uint16, and as of Triton 3.9 multiplies these."""
        wide = [self.cast_impl(each, tl.float32) if each.dtype.scalar == tl.bfloat16 else each for each in sides[:2]]
        return multiply(self, *wide, *sides[2:])

    def make_counted(self: Any, data: Any, *others: Any) -> None:
        sizes.append(data.size)
        make(self, data, *others)

    InterpreterBuilder.create_dot = multiply_numbers
    masses, again = ([attention_mass(*inputs(*case)) for case in cases] for cases in (CASES, AGAIN))
    long = inputs(1, 1, LONG, 16, torch.bfloat16, 1.0)
    TensorHandle.__init__ = make_counted
    with LargestTensor() as made:
        attention_mass(*long)
    torch.save({"masses": masses, "again": again, "outside": made.elements, "inside": max(sizes)}, path)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("interpreted") / "mass.pt"
    subprocess.run([sys.executable, __file__, str(path)], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
    return torch.load(path, weights_only=True)


# ---- interpreted


@NEEDS_TRITON
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number])))
def test_it_is_the_column_sum_of_the_causal_softmax(number: int, interpreted: dict[str, Any]) -> None:
    queries, keys = inputs(*CASES[number])
    mass, steep = interpreted["masses"][number], CASES[number][-1]
    tight = 1e-5 if steep == 1 else 3e-4  # of a logit in the hundreds float32 knows four digits behind the point
    assert mass.dtype == torch.float32 and mass.shape == queries.shape[:2]
    torch.testing.assert_close(mass.double(), plain_mass(queries, keys), rtol=tight, atol=tight)
    total = torch.full([len(queries)], float(queries.shape[1]), dtype=torch.float64)
    torch.testing.assert_close(mass.double().sum(1), total, rtol=1e-6 if steep == 1 else tight, atol=0)


@NEEDS_TRITON
def test_it_is_the_loop_in_torch(interpreted: dict[str, Any]) -> None:
    for mass, case in zip(interpreted["masses"], CASES, strict=True):
        queries, keys = inputs(*case)
        tight = 1e-5 if case[-1] == 1 else 3e-4
        torch.testing.assert_close(
            mass, LayerContext(0, 1, queries, keys, keys).attention_mass(), rtol=tight, atol=tight
        )


@NEEDS_TRITON
def test_it_gives_the_same_bits_twice(interpreted: dict[str, Any]) -> None:
    """Whatever was in the memory it was given."""
    assert all(map(torch.equal, interpreted["masses"][-len(AGAIN) :], interpreted["again"]))


@NEEDS_TRITON
def test_no_pair_of_tokens_has_a_place_in_memory(interpreted: dict[str, Any]) -> None:
    """Neither outside of the kernels, where torch makes the tensors, nor inside of one."""
    assert LONG * 2 <= interpreted["outside"] <= LONG * 32
    assert interpreted["inside"] == 64 * 64


# ---- compiled


@NEEDS_TRITON
@pytest.mark.parametrize("kernel", ["row_log_sums", "column_sums"])
@pytest.mark.parametrize(("dtype", "product"), [("fp32", "fma.rn"), ("bf16", r"mma\.\S+\.f32\.bf16\.bf16\.f32")])
def test_it_compiles_to_exact_products_and_no_atomics(
    kernel: str, dtype: str, product: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter takes what the compiler refuses, and knows neither TF32 nor an order of threads."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(triton_kernels, kernel)
    kinds = {"queries": f"*{dtype}", "keys": f"*{dtype}", "lse": "*fp32", "mass": "*fp32", "scale": "fp32"}
    kinds |= {"tokens": "i32", "group": "i32", "dim": "constexpr", "padded": "constexpr", "block": "constexpr"}
    signature = {name: kinds[name] for name in function.arg_names}
    constants = {"dim": 80, "padded": 128, "block": triton_kernels.BLOCK_ROWS[4 if dtype == "fp32" else 2]}
    compiled = triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 80, 32))
    code = compiled.asm["ptx"]
    assert re.search(product, code)
    assert "tf32" not in code and not re.search(r"\b(atom|red)\.", code)
    assert compiled.metadata.shared <= 64 * 1024, "what the smallest GPU has"


# ---- chosen


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("kind", "installed", "runs"), [(OnGpu, True, True), (OnGpu, False, False), (Tensor, True, False)]
)
def test_the_kernel_runs_on_a_gpu_where_triton_is(
    kind: type[Tensor], installed: bool, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys = (each.as_subclass(kind) for each in inputs(4, 2, 20, 16, torch.float32, 1.0))
    kernel = mock.Mock(return_value=torch.ones(4, 20))
    monkeypatch.setattr("kvfactory.triton_kernels.attention_mass", kernel)
    monkeypatch.setattr("kvfactory.context.find_spec", {"triton": object() if installed else None}.get)
    mass = LayerContext(0, 1, queries, keys, keys).attention_mass()
    assert kernel.mock_calls == ([mock.call(queries, keys)] if runs else [])
    if not runs:
        exact = plain_mass(queries, keys).as_subclass(Tensor)
        torch.testing.assert_close(mass.as_subclass(Tensor).double(), exact, rtol=1e-5, atol=1e-5)


def test_the_module_can_be_imported_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("without_triton", triton_kernels.__file__)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.triton is None and callable(module.attention_mass)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (torch.zeros(4, 9, 16), torch.zeros(2, 10, 16)),
        (torch.zeros(4, 9, 16), torch.zeros(2, 9, 32)),
        (torch.zeros(4, 9, 16), torch.zeros(3, 9, 16)),
        (torch.zeros(4, 9, 16), torch.zeros(2, 9, 16).half()),
    ],
    ids=["tokens", "dimensions", "heads", "dtypes"],
)
def test_what_does_not_fit_is_told(queries: Tensor, keys: Tensor) -> None:
    with pytest.raises(ValueError, match=r"queries \[4, 9, 16\] of torch.float32 do not fit keys \["):
        attention_mass(queries, keys)


@pytest.mark.cuda
@ON_GPU
@NEEDS_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*HEADS_AND_DIM, (8, 8, 256)])
@pytest.mark.parametrize("tokens", [1, 300, 5000])
def test_a_gpu_gives_what_the_loop_gives(
    dtype: torch.dtype, shape: tuple[int, int, int], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query_heads, kv_heads, dim = shape
    queries, keys = (each.cuda() for each in inputs(query_heads, kv_heads, tokens, dim, dtype, 1.0))
    mass = LayerContext(0, 1, queries, keys, keys).attention_mass()
    assert torch.equal(mass, attention_mass(queries, keys))
    monkeypatch.setattr("kvfactory.context.find_spec", lambda name: None)
    loop = LayerContext(0, 1, queries, keys, keys).attention_mass()
    torch.testing.assert_close(mass, loop, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@ON_GPU
@NEEDS_TRITON
def test_a_gpu_needs_no_memory_for_pairs_of_tokens() -> None:
    queries, keys = (torch.randn(heads, 32768, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention_mass(queries, keys)
    assert torch.cuda.max_memory_allocated() - before < 4 * queries.numel(), "the weights would take 16 GiB"


if __name__ == "__main__":
    interpret(Path(sys.argv[1]))
