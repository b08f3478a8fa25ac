"""Draw how popular each token of a prompt is while text is generated, and how the tiers grow and shrink.

python scripts/visualize_popularity.py --output plots
python scripts/visualize_popularity.py --method hierarchical:mode=offload --prompts prompts.jsonl --new_tokens 200

A line of the prompts' file is JSON with a `name` and a `prompt`; passages with and without a question before them are the
default. Each prompt gives two pictures, `popularity_NAME` (tokens downwards, windows to the right, hits as colour, with the
tiers below) and its line in `cache_size`, entries that a head may read at each window's end. All are PNG and SVG; what they
show is in `popularity.json` as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
import numpy as np
from kvfactory_plugins.hierarchical import HITS, TIERS, Hierarchical, popularity_stores
from matplotlib.figure import Figure
from rich.progress import track

from kvfactory import Engine, Method, UserError, load_model, require
from kvfactory.chat import chat_ids, stop_ids
from kvfactory.cli import run_command
from kvfactory.engine import Sequence as DecodedSequence
from kvfactory.jobs import make_jobs
from kvfactory.models import prepare_process
from kvfactory.registry import get_registry
from kvfactory.report.figures import COLOUR_MAP, PALETTE, free_name, new_figure, plain, save_figure, styles

PASSAGES = Path(__file__).parent / "passages.json"
TIER_COLOURS = dict(zip(reversed(TIERS), (PALETTE[each] for each in (0, 5, 4, 1)), strict=True))
GONE = "#DDDDDD"


@dataclass(frozen=True)
class Popularity:
    """What happened to one prompt's tokens."""

    name: str
    prompt_tokens: int
    hits: np.ndarray
    """[tokens, windows]: mean hits over layers and heads that hold the token, NaN where it was not there yet."""
    held: np.ndarray
    """[tokens, windows]: share of layers and heads that may read the token at the window's end."""
    tiers: list[dict[str, float]]
    """The tiers at each window's end, as rows have them."""


def read_prompts(path: Path | None) -> list[tuple[str, str]]:
    """Names and prompts."""
    if path is None:
        first = json.loads(PASSAGES.read_text("utf-8"))[:2]
        asked = [(each["title"], each["text"], each["questions"][2]["question"]) for each in first]
        behind = "\n\nTell what the text is about."
        return [
            pair
            for title, text, question in asked
            for pair in (
                (f"{title}, no question", text + behind),
                (f"{title}, question before", f"{question}\n\n{text}{behind}"),
            )
        ]
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        return [(str(line["name"]), str(line["prompt"])) for line in lines]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--prompts {path}: not a file of lines such as {{'name': ..., 'prompt': ...}} in JSON"
        ) from None


def watch(engine: Engine, method: Hierarchical, name: str, prompt: str, new_tokens: int) -> Popularity:
    """Generate text behind a prompt, and look at every window's end."""
    assert engine.tokenizer is not None
    (sequence,) = engine.prefill(chat_ids(engine.tokenizer, prompt), [method])
    stop = stop_ids(engine.model, engine.tokenizer)
    windows = max(1, new_tokens // method.window_size)
    tokens = sequence.prompt_tokens + windows * method.window_size
    looks = [look(sequence, tokens)]
    for window in range(windows):
        steps = method.window_size + (window == 0)  # the token chosen last has not been read yet
        engine.decode([sequence], steps, stop=stop, min_new_tokens=steps + 1)
        looks.append(look(sequence, tokens))
    hits, held = (np.stack(each, 1) for each in zip(*looks, strict=True))
    return Popularity(name, sequence.prompt_tokens, hits, held, method.row_fields(sequence.cache.stores)["tiers"])


def look(sequence: DecodedSequence, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean hits of each token in the window that has ended, and the share of heads that may read it; [tokens] each."""
    stores = popularity_stores(sequence.cache.stores)
    hits, held, known = np.zeros(tokens), np.zeros(tokens), np.zeros(tokens)
    for store in stores:
        at = store.entry_positions().numpy(force=True)
        hits[at] += store.records[:, HITS].numpy(force=True)
        held[at] += 1
        known[at] += 1
        aside = store.aside.positions.numpy(force=True)
        hits[aside] += store.aside.records[:, HITS].numpy(force=True)
        known[aside] += 1
    mean = np.divide(hits, known, out=np.zeros(tokens), where=known > 0)
    seen = np.arange(tokens) < sequence.cache.seen
    return np.where(seen, mean, np.nan), np.where(seen, held / len(stores), np.nan)


def picture(found: Popularity) -> Figure:
    """Tokens by windows, how many may read each, and the tiers below."""
    figure = new_figure(11, 9)
    panels = figure.subplots(2, 2, height_ratios=[3, 1.2])
    marks = [window["new_tokens"] for window in found.tiers]
    step = marks[1] - marks[0]
    extent = (marks[0] - step / 2, marks[-1] + step / 2, len(found.hits), 0)
    for axes, values, label, top in (
        (panels[0, 0], found.hits, "Hits in the window, mean of the heads that hold it", None),
        (panels[0, 1], found.held, "Share of all heads that may read it", 1.0),
    ):
        image = axes.imshow(
            values, aspect="auto", cmap=COLOUR_MAP, extent=extent, vmin=0, vmax=top, interpolation="nearest"
        )
        axes.axhline(found.prompt_tokens, color="white", linewidth=1, linestyle="--")
        axes.set(xlabel="Tokens generated", ylabel="Position (dashed: end of the prompt)", xticks=marks)
        figure.colorbar(image, ax=axes, label=label)
    below = panels[1, 0]
    sizes = [[window[tier] for window in found.tiers] for tier in TIER_COLOURS]
    names = [f"{tier} (level {TIERS.index(tier)})" for tier in TIER_COLOURS]
    below.stackplot(
        marks,
        *sizes,
        [window["gone"] for window in found.tiers],
        labels=[*names, "let go"],
        colors=[*TIER_COLOURS.values(), GONE],
    )
    below.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    below.set(
        xlabel="Tokens generated", ylabel="Entries a head", title="Tiers", xticks=marks, xlim=(marks[0], marks[-1])
    )
    draw_sizes(panels[1, 1], [found])
    figure.suptitle(found.name)
    return figure


def draw_sizes(axes: Any, found: Sequence[Popularity]) -> None:
    """Entries that a head may read, by tokens generated, beside a full cache."""
    looks = styles(each.name for each in found)
    for each in found:
        marks = [window["new_tokens"] for window in each.tiers]
        label = each.name if len(found) > 1 else "read"
        axes.plot(marks, [window["readable"] for window in each.tiers], label=label, **looks[each.name].line())
    longest = max(found, key=lambda each: each.prompt_tokens)
    marks = [window["new_tokens"] for window in longest.tiers]
    full = [longest.prompt_tokens + mark for mark in marks]
    axes.plot(
        marks, full, color="black", linestyle="--", label="full cache" + (" of the longest" if len(found) > 1 else "")
    )
    axes.set(xlabel="Tokens generated", ylabel="Entries a head may read", title="Effective cache size", xticks=marks)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


@click.command(help=__doc__)
@click.option("--model_path", help="Hub id, folder or .gguf file.  [default: the embedded model]")
@click.option("--method", default="hierarchical:budget=none", show_default=True, help="A method and its settings.")
@click.option("--prompts", type=click.Path(path_type=Path), help="JSON lines.  [default: two passages, two ways]")
@click.option("--new_tokens", default=160, show_default=True, help="Tokens to generate, stop tokens barred.")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("results/popularity"), show_default=True)
def visualize(
    model_path: str | None, method: str, prompts: Path | None, new_tokens: int, dtype: str, output: Path
) -> None:
    prepare_process()
    texts = read_prompts(prompts)
    chosen: Method = make_jobs(get_registry(), [method], [512])[0].method
    require(isinstance(chosen, Hierarchical), f"--method {method}: it has no tiers; give hierarchical and its settings")
    assert isinstance(chosen, Hierarchical)
    engine = Engine(*load_model(model_path, dtype=dtype))
    found = [watch(engine, chosen, *each, new_tokens) for each in track(texts, description="generating")]
    figures: dict[str, Figure] = {}
    for each in found:
        figures[free_name(f"popularity_{each.name.lower()}", figures)] = picture(each)
    together = figures["cache_size"] = new_figure(8, 5)
    draw_sizes(together.add_subplot(), found)
    for name, figure in figures.items():
        for path in save_figure(plain(figure), output, name):
            click.echo(path)
    facts = [{"name": each.name, "prompt_tokens": each.prompt_tokens, "tiers": each.tiers} for each in found]
    (output / "popularity.json").write_text(json.dumps({"method": method, "prompts": facts}, indent=1) + "\n", "utf-8")
    click.echo(output / "popularity.json")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(lambda _: visualize, arguments)


if __name__ == "__main__":
    main()
