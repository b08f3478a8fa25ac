"""Draw the attention of a prompt, layer by layer and head by head.

python scripts/visualize_attention.py --output plots
python scripts/visualize_attention.py --prompt "The cat sat on the mat because it" --chat_template none --layers 0,5,29
python scripts/visualize_attention.py --model_path Qwen/Qwen2-0.5B-Instruct --prompt_file question.txt --heads 0,1

Queries run downwards and keys to the right; colours are logarithmic, since most of a query's attention goes to few keys.
`attention_overview` has each layer's mean over heads, `attention_layer_N` the heads of a layer, and `attention_mass` what
each token gets of all queries together, by layer: sinks and heavy hitters are bright columns there. All are PNG and SVG. The
numbers behind them are in `attention.json` (tokens, and mass by layer) and `attention.npz` (mass, and means by layer in
half precision).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kvfactory import DenseStore, Engine, LayerContext, Method, Store, require
from kvfactory.attention import family_of
from kvfactory.cli import registry_for, run_command
from kvfactory.flag_types import CommaList, PositiveInt
from kvfactory.recording import token_texts
from kvfactory.registry import get_registry
from kvfactory.report.figures import (
    COLOUR_MAP,
    MOST_NAMED,
    grid_of,
    new_figure,
    plain,
    printable,
    save_figure,
    show_image,
    token_ticks,
)
from kvfactory.report.prompts import load_engine, passage, prompt_ids, prompt_options, read_prompt

LEAST = 1e-4
"""Attention weights below it have one colour."""
COLOURS = matplotlib.colormaps[COLOUR_MAP].with_extremes(bad="#E8E8E8")
"""Grey is what no query may look at: keys behind it."""


class SeenStore(DenseStore):
    """Keeps every token, and what attention did in its layer."""

    mean: np.ndarray
    """[queries, keys]: mean over query heads."""
    heads: np.ndarray | None
    """[query_heads, queries, keys], in layers that were asked for."""


@dataclass(frozen=True, kw_only=True)
class Watch(Method):
    """Keeps everything and remembers attention, that of all heads in some layers."""

    layers: tuple[int, ...]

    def compress(self, layer: LayerContext) -> Store:
        weights = layer.window_attention(layer.num_tokens)
        store = SeenStore(layer.keys, layer.values)
        store.mean = weights.mean(0).numpy(force=True)
        store.heads = weights.numpy(force=True) if layer.layer_index in self.layers else None
        return store


@dataclass(frozen=True)
class Attention:
    """The attention of one prompt, float32."""

    tokens: list[str]
    means: np.ndarray
    """[layers, queries, keys]: mean over query heads."""
    heads: dict[int, np.ndarray]
    """By layer [query_heads, queries, keys]."""

    @property
    def mass(self) -> np.ndarray:
        """[layers, keys]: what each token gets of all queries together, mean over query heads."""
        return self.means.sum(1)


def watch(engine: Engine, ids: Sequence[int], layers: Sequence[int]) -> Attention:
    """Read the prompt once; `heads` are those of these layers."""
    assert engine.tokenizer is not None
    (sequence,) = engine.prefill(ids, [Watch(layers=tuple(layers))])
    stores = [store for store in sequence.cache.stores if isinstance(store, SeenStore)]
    heads = {number: store.heads for number, store in enumerate(stores) if store.heads is not None}
    return Attention(token_texts(engine.tokenizer, ids), np.stack([store.mean for store in stores]), heads)


def draw_overview(found: Attention) -> Figure:
    """Each layer's mean over its heads."""
    titles = [f"layer {number}" for number in range(len(found.means))]
    return draw_panels("Attention, mean over the heads of a layer", found.means, titles, found.tokens, side=1.6)


def draw_layer(found: Attention, layer: int, heads: Sequence[int], kv_heads: int) -> Figure:
    """Heads of one layer, and which KV head each of them reads."""
    weights = found.heads[layer]
    group = len(weights) // kv_heads
    titles = [f"head {head}" + (f" (KV head {head // group})" if group > 1 else "") for head in heads]
    return draw_panels(f"Attention of layer {layer}", weights[list(heads)], titles, found.tokens, side=2.2)


def draw_panels(title: str, weights: np.ndarray, titles: Sequence[str], tokens: Sequence[str], side: float) -> Figure:
    """Small multiples: weights [panels, queries, keys], each panel `side` inches wide or as wide as its labels ask for."""
    if len(tokens) <= MOST_NAMED:
        side = max(side, 0.1 * len(tokens))
    lines, columns = grid_of(len(titles))
    figure = new_figure(1.6 + (side + 0.15) * columns, 1.0 + (side + 0.3) * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    hidden = np.triu(np.ones(weights.shape[1:], bool), 1)
    for number, axes in enumerate(panels.flat):
        if number >= len(titles):
            axes.set_axis_off()
            continue
        image = show_image(axes, np.ma.masked_where(hidden, weights[number]), cmap=COLOURS, norm=LogNorm(LEAST, 1))
        axes.set_title(titles[number], fontsize=8)
        token_ticks(axes.xaxis, tokens, rotation=90)
        token_ticks(axes.yaxis, tokens)
        below = number + columns < len(titles)
        axes.tick_params(labelsize=6, labelbottom=not below, labelleft=number % columns == 0)
    scale(figure, image, panels, "Attention weight (logarithmic)")
    figure.supxlabel("Key", fontsize=9)
    figure.supylabel("Query", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return plain(figure)


def draw_mass(found: Attention) -> Figure:
    """Layers downwards, tokens to the right; where tokens are many, those that get most are named on top."""
    mass = found.mass
    layers, tokens = mass.shape
    figure = new_figure(12.0, float(np.clip(1.6 + 0.14 * layers, 3.0, 9.0)))
    axes = figure.add_subplot()
    norm = LogNorm(max(float(mass.min()), 1e-2), float(mass.max()))
    image = show_image(axes, mass, cmap=COLOURS, norm=norm, aspect="auto")
    token_ticks(axes.xaxis, found.tokens, rotation=90)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="Token", ylabel="Layer")
    if tokens > MOST_NAMED:
        named = heaviest(mass.mean(0), most=16, apart=tokens / 80)
        labels = [f"{printable(found.tokens[each]).strip() or '·'} {each}" for each in named]
        top = axes.secondary_xaxis("top")
        top.set_xticks(named, labels, rotation=90, fontsize=7, parse_math=False)
    scale(figure, image, axes, "Attention, summed over queries")
    figure.suptitle("Attention that each token gets, mean over heads", fontsize=11)
    return plain(figure)


def heaviest(mass: np.ndarray, most: int, apart: float) -> list[int]:
    """The tokens with most mass, heaviest first, none nearer to a heavier one than `apart`."""
    named: list[int] = []
    for token in np.argsort(-mass, kind="stable").tolist():
        if len(named) < most and all(abs(token - other) > apart for other in named):
            named.append(token)
    return named


def scale(figure: Figure, image: AxesImage, panels: Axes | np.ndarray, label: str) -> None:
    """A colour bar for all panels, no taller than it needs to be."""
    tall = min(1.0, 4.0 / figure.get_figheight())
    bar = figure.colorbar(image, ax=panels, label=label, shrink=tall, extend="min", pad=0.01)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def choose(name: str, asked: Sequence[int] | None, usual: Sequence[int], there: int) -> list[int]:
    """What was asked for, each once, or what is usual; UserError for what is not there."""
    chosen = list(dict.fromkeys(usual if asked is None else asked))
    for each in chosen:
        require(each < there, f"--{name} {each}: the model has {name} 0 to {there - 1}")
    return chosen


def visualize(layers: list[int] | None, heads: list[int] | None, max_tokens: int, output: Path, **flags: Any) -> None:
    text = read_prompt(flags, passage(Path(__file__).parent / "passages.json", paragraphs=1, question=1))
    engine = load_engine(flags)
    config = engine.model.config
    count = config.num_hidden_layers
    shown = choose("layers", layers, [0, count // 2, count - 1], count)
    each_head = choose("heads", heads, range(config.num_attention_heads), config.num_attention_heads)
    ids = prompt_ids(engine, text, flags)
    require(
        len(ids) <= max_tokens,
        f"the prompt has {len(ids)} tokens, and --max_tokens is {max_tokens}; shorten the prompt, or give a larger number: "
        "memory and time grow with the square of the length",
    )
    window = family_of(engine.model, get_registry().families).sliding_window(config)
    require(
        window is None or len(ids) <= window,
        f"the prompt has {len(ids)} tokens, and the model attends to the last {window} alone; shorten it",
    )
    found = watch(engine, ids, shown)
    figures = {"attention_overview": draw_overview(found), "attention_mass": draw_mass(found)}
    figures |= {
        f"attention_layer_{layer}": draw_layer(found, layer, each_head, config.num_key_value_heads) for layer in shown
    }
    for name, figure in figures.items():
        for path in save_figure(figure, output, name):
            click.echo(path)
    numbers = {"tokens": found.tokens, "mass": np.round(found.mass.astype(float), 6).tolist()}
    (output / "attention.json").write_text(json.dumps(numbers) + "\n", "utf-8")
    np.savez_compressed(output / "attention.npz", means=found.means.astype(np.float16), mass=found.mass)
    click.echo(f"{output / 'attention.json'}\n{output / 'attention.npz'}")


def command(arguments: list[str]) -> click.Command:
    """The command, with the model families of `--plugin` known."""
    registry_for(arguments)
    numbers = CommaList(click.IntRange(min=0))
    options = [
        click.Option(["--layers"], type=numbers, help="Layers to draw head by head.  [default: first, middle, last]"),
        click.Option(["--heads"], type=numbers, help="Query heads to draw of each of them.  [default: all]"),
        click.Option(["--max_tokens"], type=PositiveInt(), default=1024, show_default=True, help="Longest prompt."),
    ]
    options += prompt_options("results/attention")
    return click.Command("visualize_attention", params=[*options], callback=visualize, help=__doc__)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(command, arguments)


if __name__ == "__main__":
    main()
