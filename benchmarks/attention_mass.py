"""What the attention each key got costs, beside the attention of the layer itself: one layer, random queries and keys.

    python benchmarks/attention_mass.py [--tokens 1024,2048,4096] [--repeats 5] [--dtype bfloat16] [--json FILE]

Prints milliseconds of the model's attention (torch's fused one), of the loop in torch and of the kernel, Triton's on a GPU
and Numba's on a CPU, the last two as multiples of the first too: medians over rounds in which they take turns. On a GPU also
what each takes of its memory at most, beside its inputs. Shapes are those of the embedded model unless flags say otherwise.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvfactory import LayerContext
from kvfactory.clock import now
from kvfactory.compiled import has_numba
from kvfactory.kernels import KERNELS
from kvfactory.models import prepare_process

MIB = 2**20


Way = Callable[[Tensor, Tensor, Tensor | None], object]
"""Takes queries, keys, and the log sums that the model's attention told of them, if it did."""


def attention(queries: Tensor, keys: Tensor, log_sums: Tensor | None = None) -> Tensor | None:
    """The model's own, with keys as values: it writes as many numbers. Returns its log sums."""
    _, found = KERNELS["sdpa"].prefill(queries[None], keys[None], keys[None], None, None)
    return None if found is None else found[0]


def mass(queries: Tensor, keys: Tensor, log_sums: Tensor | None) -> None:
    """Where `LayerContext` has it computed."""
    LayerContext(0, 1, queries, keys, keys, log_sums=log_sums).attention_mass()


def loop(queries: Tensor, keys: Tensor, log_sums: Tensor | None) -> None:
    """The same as if neither Triton nor Numba were installed."""
    with mock.patch("kvfactory.context.find_spec", return_value=None):
        mass(queries, keys, None)


def measure(ways: Mapping[str, Way], queries: Tensor, keys: Tensor, repeats: int) -> dict[str, float]:
    """Seconds by way, and on a GPU bytes."""
    log_sums = attention(queries, keys)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            if queries.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() if queries.is_cuda else 0
            started = now(queries.device)
            way(queries, keys, log_sums)
            if repeat:  # first calls are slow: kernels are compiled
                seconds[name].append(now(queries.device) - started)
            if queries.is_cuda:
                found[f"{name}_bytes"] = torch.cuda.max_memory_allocated() - held
    base = statistics.median(seconds["attention"])
    for name, each in seconds.items():
        found |= {f"{name}_seconds": statistics.median(each), f"{name}_times": statistics.median(each) / base}
    return found


@click.command(help=__doc__)
@click.option("--tokens", default="1024,2048,4096", show_default=True, help="Prompt lengths, separated by commas.")
@click.option("--query_heads", default=9, show_default=True)
@click.option("--kv_heads", default=3, show_default=True)
@click.option("--head_dim", default=64, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where to write the numbers too.")
@torch.inference_mode()
def main(
    tokens: str,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    device: str,
    repeats: int,
    file: Path | None,
) -> None:
    prepare_process()
    torch.manual_seed(0)
    ways: dict[str, Way] = {"attention": attention, "loop": loop}
    on_gpu = torch.device(device).type == "cuda"
    has_kernel = find_spec("triton") is not None if on_gpu else has_numba(torch.device(device))
    if has_kernel:
        ways["kernel"] = mass
    lines: list[dict[str, float]] = []
    for count in map(int, tokens.split(",")):
        sizes = [(heads, count, head_dim) for heads in (query_heads, kv_heads)]
        queries, keys = (torch.randn(size, dtype=getattr(torch, dtype), device=device) for size in sizes)
        lines.append({"tokens": count, **measure(ways, queries, keys, repeats)})
    where = torch.cuda.get_device_name() if on_gpu else f"{device}, {torch.get_num_threads()} threads"
    title = f"{query_heads} query heads, {kv_heads} KV heads, {head_dim} dimensions, {dtype}, {where}"
    memory = [f"{name} MiB" for name in ways if f"{name}_bytes" in lines[0]]
    times = [heading for name in list(ways)[1:] for heading in (f"{name} ms", "times attention")]
    table = Table("tokens", "attention ms", *times, *memory, title=title)
    for line in lines:
        cells = [f"{1000 * line['attention_seconds']:.2f}"]
        for name in list(ways)[1:]:
            cells += [f"{1000 * line[f'{name}_seconds']:.2f}", f"{line[f'{name}_times']:.2f}"]
        cells += [f"{line[key] / MIB:.1f}" for key in (f"{name}_bytes" for name in ways) if key in line]
        table.add_row(f"{line['tokens']:.0f}", *cells)
    console = Console(width=120)
    console.print(table)
    if not has_kernel:
        console.print("The kernel is not timed: it takes Triton on a GPU and Numba on a CPU.")
    if file:
        file.write_text(json.dumps({"title": title, "lines": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
