"""What choosing tokens costs beside the prompt's own pass, and how well clusters of keys hold together.

    python benchmarks/scorers.py [--tokens 2048] [--repeats 5] [--dtype auto] [--json FILE]

Prints for each method the seconds to compress and their share of a prefill: medians over rounds, in each of
which all methods look at one prefill. What methods share is counted with each of them, as if it were alone.
A second table has the mean silhouette of keys without their positions, over all layers and KV heads.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvfactory import Engine, LayerContext, Method, Store, load_method, load_model
from kvfactory.benchmarks.haystack import load_haystack
from kvfactory.clustering import kmeans, silhouette
from kvfactory.jobs import make_jobs
from kvfactory.models import default_threads
from kvfactory.registry import get_registry
from kvfactory.rotary import rotated

METHODS = [
    "semantic",
    "semantic:strategy=attention",
    "semantic:strategy=representative",
    "semantic:strategy=thesis",
    "learned",
    "snapkv",
    "h2o",
]
CLUSTERS = [8, 16, 32, 64]


def measure(engine: Engine, ids: list[int], specs: Sequence[str], budget: int, repeats: int) -> list[dict[str, object]]:
    """One line a method."""
    jobs = make_jobs(get_registry(), specs, [budget])
    prefill: list[float] = []
    compress: list[list[float]] = [[] for _ in jobs]
    for repeat in range(repeats + 1):
        sequences = engine.prefill(ids, [job.method for job in jobs])
        if repeat:  # first calls are slow
            prefill.append(sequences[0].prefill_seconds)
            for each, sequence in zip(compress, sequences, strict=True):
                each.append(sequence.cache.compress_seconds)
    base = statistics.median(prefill)
    return [
        {
            "method": job.label,
            "compress_seconds": statistics.median(each),
            "least_seconds": min(each),
            "share_of_prefill": statistics.median(each) / base,
            "prefill_seconds": base,
        }
        for job, each in zip(jobs, compress, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Keys(Method):
    """Looks at every layer's keys as they would be at position 0, and keeps everything."""

    seen: list[Tensor]

    def compress(self, layer: LayerContext) -> Store:
        self.seen.append(rotated(layer.keys.float(), -layer.positions, layer.rotary_frequencies()))
        return load_method("fullkv").compress(layer)


def silhouettes(engine: Engine, ids: list[int], sample_size: int) -> list[dict[str, float]]:
    """One line a number of clusters."""
    method = Keys(seen=[])
    engine.prefill(ids, [method])
    lines = []
    for clusters in CLUSTERS:
        each = [silhouette(keys, kmeans(keys, clusters, sample_size=sample_size)[1]) for keys in method.seen]
        every = torch.cat(each)
        lines.append({"num_clusters": clusters, "mean": float(every.mean()), "least": float(every.min())})
        lines[-1]["most"] = float(every.max())
    return lines


@click.command(help=__doc__)
@click.option("--method", default=",".join(METHODS), help="Methods to compare, separated by commas.")
@click.option("--budget", default=128, show_default=True, help="Of methods that evict.")
@click.option("--tokens", default=2048, show_default=True, help="Prompt tokens.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--sample_size", default=512, show_default=True, help="Tokens that centroids are fitted to.")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--model_path", help="Hub id, folder or .gguf file.  [default: the embedded model]")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where to write the numbers too.")
def main(
    method: str,
    budget: int,
    tokens: int,
    repeats: int,
    sample_size: int,
    dtype: str,
    model_path: str | None,
    file: Path | None,
) -> None:
    torch.set_num_threads(default_threads())
    model, tokenizer = load_model(model_path, dtype=dtype)
    ids = tokenizer.encode(load_haystack().text, truncation=True, max_length=tokens)
    engine = Engine(model, tokenizer)
    lines = measure(engine, ids, method.split(","), budget, repeats)
    where = f"{len(ids)} tokens, {str(model.dtype).removeprefix('torch.')}, {model.device}"
    title = f"{where}, prefill {lines[0]['prefill_seconds']:.2f} s, budget {budget}"
    table = Table("method", "compress s", "least s", "of prefill", title=title)
    for line in lines:
        table.add_row(
            str(line["method"]),
            f"{line['compress_seconds']:.3f}",
            f"{line['least_seconds']:.3f}",
            f"{line['share_of_prefill']:.1%}",
        )
    quality = silhouettes(engine, ids, sample_size)
    second = Table("clusters", "silhouette", "least", "most", title="mean silhouette of a layer's KV head")
    for each in quality:
        second.add_row(*[f"{value:.3f}" if isinstance(value, float) else str(value) for value in each.values()])
    console = Console(width=100)
    console.print(table)
    console.print(second)
    if file:
        saved = {"title": title, "lines": lines, "silhouettes": quality}
        file.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
