"""Needle in a haystack under compression: a fact hidden at some depth of a long text, and a question about it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from kvfactory.benchmarks import Benchmark
from kvfactory.flag_types import CommaList, PositiveInt
from kvfactory.hookspecs import RegisterBenchmark, hookimpl
from kvfactory.runner import CHAT_TEMPLATE, Runner, chat_template, run_benchmark

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvfactory.results import Row


def _listed(axis: Sequence[float]) -> str:
    return ",".join(f"{each:g}" for each in axis)


def options() -> list[click.Option]:
    """Flags of its own."""
    from kvfactory.benchmarks.needle import GRIDS, SPACINGS, STYLES

    short = GRIDS["list"]
    return [
        click.Option(
            ["--style"], type=click.Choice(list(STYLES)), default="number", show_default=True, help="What is hidden."
        ),
        click.Option(
            ["--grid"],
            type=click.Choice(list(GRIDS)),
            default="list",
            show_default=True,
            help="Lengths and depths that are not given: a short list, the first needle test's, or KVCache-Factory's.",
        ),
        click.Option(
            ["--context_lengths"],
            type=CommaList(PositiveInt()),
            help=f"Prompt lengths in tokens, separated by commas.  [default: the grid's, {_listed(short.lengths)}]",
        ),
        click.Option(
            ["--depths"],
            type=CommaList(click.FLOAT),
            help="Where the needle is, in percent of the text, separated by commas.  "
            f"[default: the grid's, {_listed(short.depths['linear'])}]",
        ),
        click.Option(
            ["--depth_spacing"],
            type=click.Choice(list(SPACINGS)),
            help="How the depths of a published grid are spaced; sigmoid crowds them at both ends.  [default: linear]",
        ),
        click.Option(["--samples"], type=PositiveInt(), default=10, show_default=True, help="Samples in each cell."),
        click.Option(["--digits"], type=PositiveInt(), help="Digits of the number; 7 is RULER's.  [default: 4]"),
        click.Option(
            ["--needles"],
            type=PositiveInt(),
            help="Numbers to hide, from the depth on, and to ask for at once.  [default: 1]",
        ),
        click.Option(
            ["--haystack"], help="A text file, or a folder of .txt files.  [default: Python's own documentation]"
        ),
        CHAT_TEMPLATE,
    ]


def make(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any]
) -> tuple[Benchmark, dict[str, Any]]:
    from kvfactory.benchmarks.haystack import load_haystack
    from kvfactory.benchmarks.needle import Needle, choose_grid
    from kvfactory.chat import chat_ids, context_window

    haystack = load_haystack(flags["haystack"])
    grid = choose_grid(
        flags["grid"],
        lengths=flags["context_lengths"],
        depths=flags["depths"],
        spacing=flags["depth_spacing"],
        window=context_window(model.config),
    )
    if grid.notice:
        print(f"notice: {grid.notice}", file=sys.stderr)
    wrap, chat = chat_template(tokenizer, flags)
    benchmark = Needle(
        tokenizer,
        style=flags["style"],
        lengths=grid.lengths,
        depths=grid.depths,
        samples=flags["samples"],
        digits=flags["digits"],
        needles=flags["needles"],
        haystack=haystack,
        seed=flags["seed"],
        chat=partial(chat_ids, tokenizer) if wrap else None,
    )
    return benchmark, {"haystack": haystack.record(), **chat}


def finish(rows: list[Row], folder: Path, console: Console) -> None:
    from kvfactory.report.heatmaps import save_heatmaps

    overview, *_ = save_heatmaps(rows, folder)
    console.print(f"heatmap {overview}  (and one of each configuration beside it, all as SVG too)", soft_wrap=True)


@hookimpl
def kvfactory_register_benchmarks(register: RegisterBenchmark) -> None:
    from kvfactory.benchmarks.needle import score

    grid = ("grid", "context_lengths", "depths", "depth_spacing", "samples")
    runner = Runner(help=__doc__ or "", options=options(), make=make, finish=finish, grows=grid, score=score)
    register("needle", runner)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_benchmark("needle", arguments)


if __name__ == "__main__":
    main()
