"""How well clusters of a layer's keys hold together: the mean silhouette of keys without their positions, head by head.

    python benchmarks/silhouettes.py [--tokens 2048] [--dtype float32]

A silhouette is 1 for a perfect grouping and 0 for none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rounds import common_options, load, show, where
from torch import Tensor

from kvfactory import Engine, LayerContext, Method, Store, load_method
from kvfactory.benchmarks.haystack import load_haystack
from kvfactory.clustering import kmeans, silhouette
from kvfactory.rotary import rotated

CLUSTERS = [8, 16, 32, 64]


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
        lines.append({"clusters": clusters, "mean": float(every.mean()), "least": float(every.min())})
        lines[-1]["most"] = float(every.max())
    return lines


@click.command(help=__doc__)
@click.option("--tokens", default=2048, show_default=True, help="Prompt tokens.")
@click.option("--sample_size", default=512, show_default=True, help="Tokens that centroids are fitted to.")
@common_options
def main(
    tokens: int,
    sample_size: int,
    repeats: int,
    dtype: str,
    threads: int | None,
    model_path: str | None,
    file: Path | None,
) -> None:
    model, tokenizer = load(model_path, dtype, threads)
    ids = tokenizer.encode(load_haystack().text, truncation=True, max_length=tokens)
    lines = silhouettes(Engine(model, tokenizer), ids, sample_size)
    title = f"silhouettes of the keys of {len(ids)} tokens; {where(model)}"
    show(title, lines, {"clusters": "", "mean": ".3f", "least": ".3f", "most": ".3f"}, file)


if __name__ == "__main__":
    main()
