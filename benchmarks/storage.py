"""What storing and reading entries in other ways costs: each by itself, steps taken in turn, in one process.

    python benchmarks/storage.py [--tokens 2048] [--new_tokens 16] [--repeats 5] [--json FILE]

Prints for each method the share of the full cache's bytes, the seconds to compress, and milliseconds a decode step beside
FullKV's: medians over rounds in which all methods take turns, forwards and backwards.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import click
from rich.console import Console
from rich.table import Table

from kvfactory import Engine, load_model
from kvfactory.inference import for_inference
from kvfactory.jobs import make_jobs
from kvfactory.models import prepare_process
from kvfactory.registry import get_registry
from kvfactory.sweep import full_cache_bytes

METHODS = [
    "fullkv",
    "kivi:nbits=2",
    "kivi:nbits=3",
    "kivi:nbits=4",
    "kivi:nbits=8",
    "gear",
    "kvquant",
    "minicache",
    "fullkv:key_pruning=think",
    "quest",
    "snapkv",
    "think",
    "snapkv:quant_method=kivi:quant_residual_length=32",
    "tova",
    "tova:quant_method=kivi:quant_residual_length=32",
]


def measure(
    engine: Engine, ids: list[int], specs: Sequence[str], budget: int, new_tokens: int, repeats: int
) -> list[dict[str, object]]:
    """One line a method."""
    jobs = make_jobs(get_registry(), specs, [budget])
    trunks = engine.prefill(ids, [job.method for job in jobs])
    compress = [trunk.cache.compress_seconds for trunk in trunks]
    seconds: list[list[float]] = [[] for _ in jobs]
    order = list(range(len(jobs)))
    for repeat in range(repeats + 1):
        for place in order if repeat % 2 else reversed(order):
            branch = trunks[place].fork()
            engine.decode([branch], 2)  # a fork copies what it writes to
            started = time.perf_counter()
            engine.decode([branch], new_tokens, min_new_tokens=new_tokens)
            if repeat:  # first calls are slow
                seconds[place].append((time.perf_counter() - started) / new_tokens)
    full = full_cache_bytes(engine.model, len(ids))
    base = statistics.median(seconds[0])
    return [
        {
            "method": job.label,
            "share_of_full": trunk.cache.nbytes() / full,
            "compress_seconds": taken,
            "step_ms": 1000 * statistics.median(each),
            "times_fullkv": statistics.median(each) / base,
        }
        for job, trunk, taken, each in zip(jobs, trunks, compress, seconds, strict=True)
    ]


@click.command(help=__doc__)
@click.option("--method", default=",".join(METHODS), help="The first is what others are compared with.")
@click.option("--budget", default=128, show_default=True, help="Of methods that evict.")
@click.option("--tokens", default=2048, show_default=True, help="Prompt tokens.")
@click.option("--new_tokens", default=16, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--model_path", help="Hub id, folder or .gguf file.  [default: the embedded model]")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where to write the numbers too.")
def main(
    method: str,
    budget: int,
    tokens: int,
    new_tokens: int,
    repeats: int,
    dtype: str,
    model_path: str | None,
    file: Path | None,
) -> None:
    prepare_process()
    model, tokenizer = load_model(model_path, dtype=dtype)
    text = " ".join(topics[name] for name in sorted(topics))
    ids = tokenizer.encode(text, truncation=True, max_length=tokens)
    lines = measure(Engine(for_inference(model), tokenizer), ids, method.split(","), budget, new_tokens, repeats)
    title = f"{len(ids)} tokens, {str(model.dtype).removeprefix('torch.')}, {model.device}, budget {budget}"
    table = Table("method", "of full", "compress s", "step ms", "times FullKV", title=title)
    for line in lines:
        share, taken, step, times = (line[name] for name in list(line)[1:])
        table.add_row(str(line["method"]), f"{share:.1%}", f"{taken:.2f}", f"{step:.1f}", f"{times:.2f}")
    Console(width=100).print(table)
    if file:
        file.write_text(json.dumps({"title": title, "lines": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
