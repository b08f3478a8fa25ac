"""Draw which tokens of a prompt each method keeps, methods side by side.

python scripts/visualize_retention.py --output plots
python scripts/visualize_retention.py --prompt_file letter.txt --method h2o --max_capacity_prompts 32,64,10%
python scripts/visualize_retention.py --plugin my_method.py --method mine,snapkv,snapkv:window_size=8

All of them go on from one reading of the prompt. `retention_layers` has a panel for each method and budget, layers
downwards and tokens to the right, and the colour says which share of a layer's heads kept the token. `retention_text` shows
the prompt itself, each token in the colour of the share of all heads in all layers that kept it. Both are PNG and SVG; the
numbers are in `retention.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import click
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from rich.cells import cell_len, chop_cells

from kvfactory import Engine
from kvfactory.cli import registry_for, run_command
from kvfactory.flag_types import BudgetType, CommaList
from kvfactory.folder_format import FULL
from kvfactory.jobs import Job, make_jobs
from kvfactory.recording import kept_by_layer, token_texts
from kvfactory.registry import Registry
from kvfactory.report.figures import (
    COLOUR_MAP,
    DOTS_PER_INCH,
    ink,
    new_figure,
    plain,
    printable,
    save_figure,
    show_image,
    token_ticks,
    wrapped,
)
from kvfactory.report.prompts import load_engine, passage, prompt_ids, prompt_options, read_prompt
from kvfactory.sweep import full_cache_bytes

METHODS = "streamingllm,h2o,snapkv,pyramidkv,adakv,expected_attention"
MOST_SHOWN = 400
"""Tokens of a text that a block has room for."""
LETTERS = 52
"""Of a line in a block."""
LETTER = 10 / DOTS_PER_INCH, 24 / DOTS_PER_INCH
"""Width and height of a letter with its spacing, in inches: whole pixels, for a PNG has no others."""
FONT = 72 * LETTER[0] / 0.602
"""The size of DejaVu Sans Mono, in points, whose letters are so wide."""


@dataclass(frozen=True)
class Retention:
    """What one configuration kept of the prompt."""

    method: str
    budget: int | str
    kept: np.ndarray
    """[layers, tokens]: share of the layer's stored heads that hold the token, 0 to 1."""
    kept_tokens_mean: float
    """Entries a head, mean over heads and layers."""
    ratio: float
    """Bytes, of the whole cache's."""

    @property
    def title(self) -> str:
        name = self.method if self.budget == FULL else f"{self.method}, {self.budget}"
        return f"{wrapped(name, 44)}\n{self.kept_tokens_mean:.1f} tokens a head, {self.ratio:.1%} of the full cache"


def read(engine: Engine, ids: Sequence[int], jobs: Sequence[Job]) -> list[Retention]:
    """Read the prompt once for all jobs; one `Retention` each, in order."""
    full = full_cache_bytes(engine.model, len(ids))
    sequences = engine.prefill(ids, [job.method for job in jobs])
    return [
        Retention(
            method=job.label,
            budget=FULL if job.budget is None else job.budget,
            kept=kept_by_layer(sequence.cache.stores, len(ids)).numpy(),
            kept_tokens_mean=fmean(sequence.cache.kept()),
            ratio=sequence.cache.nbytes() / full,
        )
        for job, sequence in zip(jobs, sequences, strict=True)
    ]


def draw_layers(found: Sequence[Retention], tokens: Sequence[str]) -> Figure:
    """A panel for each configuration: layers downwards, tokens to the right."""
    columns = min(2, len(found))
    lines = -(-len(found) // columns)
    height = float(np.clip(0.06 * len(found[0].kept), 1.2, 4.0))
    figure = new_figure(5.6 * columns + 0.8, (height + 0.75) * lines + 0.6)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(found) :]:
        axes.set_axis_off()
    for axes, each in zip(panels.flat, found, strict=False):
        image = show_image(axes, each.kept, cmap=COLOUR_MAP, vmin=0, vmax=1, aspect="auto")
        axes.set_title(each.title, fontsize=9, parse_math=False)
    token_ticks(panels[0, 0].xaxis, tokens, rotation=90)
    panels[0, 0].yaxis.set_major_locator(MaxNLocator(integer=True))
    tall = min(1.0, 4.0 / figure.get_figheight())
    figure.colorbar(image, ax=panels, label="Share of the layer's heads\nthat kept the token", shrink=tall, pad=0.01)
    figure.supxlabel("Token of the prompt", fontsize=10)
    figure.supylabel("Layer", fontsize=10)
    return plain(figure)


@dataclass(frozen=True)
class Piece:
    """Part of a token as it stands in a block of text."""

    token: int
    line: int
    column: int
    text: str


def set_lines(texts: Sequence[str], letters: int) -> list[Piece]:
    """The texts of tokens set in lines of so many letters, of which Chinese ones take two, broken between words if possible.

    A line end of the text is shown, and ends the line; a word longer than a line is broken between tokens, and a token
    longer than a line where the line ends.
    """
    pieces: list[Piece] = []
    line = column = word = 0  # word: the piece that the current word begins with
    for token, piece in _parts(texts, letters):
        if piece[0] == " ":
            word = len(pieces)
        if column + cell_len(piece) > letters:
            if word < len(pieces) and pieces[word].column == 0:
                word = len(pieces)
            moved, pieces = pieces[word:], pieces[:word]
            line, column = line + 1, 0
            for each in moved:
                pieces.append(Piece(each.token, line, column, each.text))
                column += cell_len(each.text)
            if column + cell_len(piece) > letters:
                line, column, word = line + 1, 0, len(pieces)
        pieces.append(Piece(token, line, column, piece))
        column += cell_len(piece)
        if piece[-1] == "↵":
            line, column, word = line + 1, 0, len(pieces)
    return pieces


def _parts(texts: Sequence[str], letters: int) -> Iterator[tuple[int, str]]:
    """Tokens with what of them fits a line: cut behind line ends, and where they are longer."""
    for token, text in enumerate(texts):
        for part in printable(text).replace("↵", "↵\n").splitlines():
            for piece in chop_cells(part, letters):
                yield token, piece


def draw_text(found: Sequence[Retention], tokens: Sequence[str]) -> Figure:
    """The prompt's text, a block for each configuration; of a long one the end."""
    shown = list(tokens[-MOST_SHOWN:])
    pieces = set_lines(shown, LETTERS)
    columns = {1: 1, 2: 2, 4: 2}.get(len(found), 3)
    lines = -(-len(found) // columns)
    above = 0.2 + 0.16 * max(each.title.count("\n") + 1 for each in found)  # inches, as all here
    gap, below = 0.25, 1.0
    width, height = LETTERS * LETTER[0], (pieces[-1].line + 1) * LETTER[1]
    page = (width + gap) * columns + gap, (height + above) * lines + below
    figure = Figure(figsize=page)
    for number, each in enumerate(found):
        left = gap + (width + gap) * (number % columns)
        bottom = page[1] - (height + above) * (number // columns + 1)
        axes = figure.add_axes((left / page[0], bottom / page[1], width / page[0], height / page[1]))
        draw_block(axes, pieces, each.kept.mean(0)[len(tokens) - len(shown) :])
        axes.set_xlim(0, LETTERS)
        axes.set_ylim(pieces[-1].line + 1, 0)
        axes.set_axis_off()
        axes.set_title(each.title, fontsize=9, loc="left", parse_math=False)
    bar = figure.add_axes((gap / page[0], 0.68 / page[1], width / page[0], 0.12 / page[1]))
    note = f"\nhere: the last {len(shown)} of {len(tokens)} tokens" if len(shown) < len(tokens) else ""
    colours = ScalarMappable(cmap=COLOUR_MAP)
    colours.set_clim(0, 1)
    figure.colorbar(colours, cax=bar, orientation="horizontal", label=f"Share of all heads that kept the token{note}")
    return plain(figure)


def draw_block(axes: Axes, pieces: Sequence[Piece], shares: np.ndarray) -> None:
    """Pieces of tokens on the colours of their shares, [tokens]; a letter is 1 wide and a line 1 high."""
    colours = matplotlib.colormaps[COLOUR_MAP]
    boxes = PatchCollection(
        [Rectangle((each.column, each.line), cell_len(each.text), 1) for each in pieces], cmap=COLOUR_MAP, linewidth=0.3
    )
    boxes.set_array(shares[[each.token for each in pieces]])
    boxes.set_clim(0, 1)
    boxes.set_edgecolor("face")  # or hairlines show between them where an SVG is drawn smoothly
    axes.add_collection(boxes)
    for each in pieces:
        axes.text(
            each.column,
            each.line + 0.72,
            each.text,
            color=ink(colours(float(shares[each.token]))[:3]),
            fontsize=FONT,
            family="DejaVu Sans Mono",
            parse_math=False,
        )


def visualize(
    registry: Registry, method: list[str], max_capacity_prompts: list[Any], output: Path, **flags: Any
) -> None:
    """Read, draw and say where the pictures are."""
    jobs = make_jobs(registry, method, max_capacity_prompts)
    text = read_prompt(flags, passage(Path(__file__).parent / "passages.json", paragraphs=2, question=1))
    engine = load_engine(flags)
    ids = prompt_ids(engine, text, flags)
    assert engine.tokenizer is not None
    tokens = token_texts(engine.tokenizer, ids)
    found = read(engine, ids, jobs)
    for name, figure in (
        ("retention_layers", draw_layers(found, tokens)),
        ("retention_text", draw_text(found, tokens)),
    ):
        for path in save_figure(figure, output, name):
            click.echo(path)
    configurations = [
        {
            "method": each.method,
            "budget": each.budget,
            "kept_tokens_mean": each.kept_tokens_mean,
            "ratio": each.ratio,
            "kept": np.round(each.kept.astype(float), 4).tolist(),
        }
        for each in found
    ]
    numbers = json.dumps({"tokens": tokens, "configurations": configurations})
    (output / "retention.json").write_text(numbers + "\n", "utf-8")
    click.echo(output / "retention.json")


def command(arguments: list[str]) -> click.Command:
    """The command, with the methods of `--plugin` known."""
    registry = registry_for(arguments)
    options = [
        click.Option(
            ["--method"],
            type=CommaList(click.STRING),
            default=METHODS,
            show_default=True,
            help="Methods, separated by commas; settings behind colons.",
        ),
        click.Option(
            ["--max_capacity_prompts"],
            type=CommaList(BudgetType()),
            default="64",
            show_default=True,
            help="Budgets: KV entries kept per head and layer, or shares of the prompt as 10%, separated by commas.",
        ),
    ]

    def run(**flags: Any) -> None:
        visualize(registry, **flags)

    return click.Command(
        "visualize_retention", params=[*options, *prompt_options("results/retention")], callback=run, help=__doc__
    )


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(command, arguments)


if __name__ == "__main__":
    main()
