"""Measure the key ranges and levels that KVQuant needs of a model, and save them.

python scripts/calibrate_kvquant.py --output kvquant.safetensors
python scripts/calibrate_kvquant.py --model_path meta-llama/Llama-3.1-8B-Instruct --samples 16 --output kvquant.safetensors
run_needle_in_haystack.py --method kvquant --calibration kvquant.safetensors

Samples of a text are read; of the keys before their rotation and of the values, each layer's are looked at together. The
range of a key channel is that of its numbers without the share of outliers; levels are centres of clusters of the numbers
that are no outliers, as shares of their ranges. Clusters are not weighted by gradients, as the authors' are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, get_args

import click
import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from kvfactory import DenseStore, Engine, LayerContext, Method, Store, load_model
from kvfactory.benchmarks.haystack import TokenizedHaystack, load_haystack
from kvfactory.cli import run_command
from kvfactory.flag_types import CommaList, OutputFile, PositiveInt
from kvfactory.models import prepare_process
from kvfactory.nonuniform import cluster_levels, dynamic_outliers, inner_range, normalised
from kvfactory.quantisation import Bits
from kvfactory.rotary import rotated

CLUSTERED = 100_000
"""Numbers of a layer that are clustered, drawn with a fixed seed."""


class Unrotated(DenseStore):
    """Keeps everything, and the keys as they were before their rotation, [kv_heads, tokens, head_dim]."""

    def __init__(self, layer: LayerContext) -> None:
        super().__init__(layer.keys, layer.values)
        self.unrotated = rotated(layer.keys, -layer.positions, layer.rotary_frequencies())


@dataclass(frozen=True, kw_only=True)
class Collect(Method):
    """FullKV that turns keys back."""

    def compress(self, layer: LayerContext) -> Store:
        return Unrotated(layer)


def collect(engine: Engine, samples: Sequence[list[int]]) -> list[tuple[Tensor, Tensor]]:
    """Keys before their rotation and values of each layer, [tokens of all samples, kv_heads, head_dim], float32."""
    layers: list[list[tuple[Tensor, Tensor]]] = []
    for ids in track(samples, description="reading"):
        stores = engine.prefill(ids, [Collect()])[0].cache.stores
        layers.append(
            [
                (store.unrotated.float().cpu().transpose(0, 1), torch.stack(store.values(), 1).float().cpu())
                for store in stores
                if isinstance(store, Unrotated)
            ]
        )
    return [
        (torch.cat(keys), torch.cat(values))
        for keys, values in (zip(*each, strict=True) for each in zip(*layers, strict=True))
    ]


def some(x: Tensor) -> Tensor:
    """At most `CLUSTERED` of the numbers, the same each time."""
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))[:CLUSTERED]
    return x.flatten()[order]


def calibrate(layers: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """The tables that a file holds: of each share of outliers the ranges of key channels, and levels for all bits."""
    found: dict[str, list[Tensor]] = {}
    for keys, values in track(layers, description="measuring"):
        for share in shares:
            bounds = channel_bounds(keys, share)
            inside = (keys >= bounds[..., 0]) & (keys <= bounds[..., 1])
            tokens = values.flatten(1)
            outlying = dynamic_outliers(tokens, share)
            lower, upper = inner_range(tokens, outlying)
            found.setdefault(f"key_bounds/{share}", []).append(bounds)
            numbers = {
                "key": some(normalised(keys, bounds[..., 0], bounds[..., 1])[inside]),
                "value": some(normalised(tokens, lower, upper)[~outlying]),
            }
            for kind, each in numbers.items():
                for bits in get_args(Bits):
                    found.setdefault(f"{kind}_levels/{share}/{bits}", []).append(cluster_levels(each, 2**bits))
    return {name: torch.stack(each) for name, each in found.items()}


def channel_bounds(keys: Tensor, share: float) -> Tensor:
    """Quantiles of each channel of keys [tokens, kv_heads, head_dim], half of the share beyond each.

    [kv_heads, head_dim, 2].
    """
    return keys.quantile(torch.tensor([share / 2, 1 - share / 2]), dim=0).movedim(0, -1)


@click.command(help="Measure the key ranges and levels that KVQuant needs of a model, and save them.")
@click.option("--model_path", help="Hub id, folder or .gguf file.  [default: the embedded model]")
@click.option("--output", type=OutputFile(".safetensors"), required=True, help="A .safetensors file.")
@click.option("--samples", type=PositiveInt(), default=4, show_default=True, help="Pieces of the text.")
@click.option("--context_length", type=PositiveInt(), default=2048, show_default=True, help="Tokens of each.")
@click.option(
    "--outlier_ratios",
    type=CommaList(click.FloatRange(0, 0.5)),
    default="0,0.01",
    show_default=True,
    help="Shares to measure for.",
)
@click.option("--haystack", help="A text file, or a folder of .txt files.  [default: Python's own documentation]")
def write_calibration(
    model_path: str | None,
    output: Path,
    samples: int,
    context_length: int,
    outlier_ratios: list[float],
    haystack: str | None,
) -> None:
    prepare_process()
    model, tokenizer = load_model(model_path)
    text = load_haystack(haystack)
    read = TokenizedHaystack(text, tokenizer)
    pieces = [read.window(sample * context_length, context_length) for sample in range(samples)]
    tables = calibrate(collect(Engine(model, tokenizer), pieces), [float(each) for each in outlier_ratios])
    facts = {"model": model_path or "embedded", "text": text.sha256, "samples": f"{samples} of {context_length} tokens"}
    save_file({name: table.contiguous() for name, table in tables.items()}, output, facts)
    click.echo(f"{len(tables)} tables of {model.config.num_hidden_layers} layers\n{output}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(lambda _: write_calibration, arguments)


if __name__ == "__main__":
    main()
