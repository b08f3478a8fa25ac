"""Needle in a haystack under compression: a fact hidden at some depth of a long text, and a question about it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfactory.benchmarks import Benchmark
from kvfactory.benchmarks.haystack import load_haystack
from kvfactory.benchmarks.needle import Needle
from kvfactory.benchmarks.needle_styles import STYLES
from kvfactory.chat import chat_ids, has_chat_template
from kvfactory.cli import registry_for, run_command, sweep_command
from kvfactory.flag_types import CommaList, PositiveInt
from kvfactory.report.heatmaps import save_heatmaps
from kvfactory.results import Row

OPTIONS = [
    click.Option(
        ["--style"], type=click.Choice(list(STYLES)), default="number", show_default=True, help="What is hidden."
    ),
    click.Option(
        ["--context_lengths"],
        type=CommaList(PositiveInt()),
        default="512,1024",
        show_default=True,
        help="Prompt lengths in tokens, separated by commas.",
    ),
    click.Option(
        ["--depths"],
        type=CommaList(click.FLOAT),
        default="10,30,50,70,90",
        show_default=True,
        help="Where the needle is, in percent of the text, separated by commas.",
    ),
    click.Option(["--samples"], type=PositiveInt(), default=10, show_default=True, help="Samples in each cell."),
    click.Option(["--digits"], type=PositiveInt(), help="Digits of the number; 7 is RULER's.  [default: 4]"),
    click.Option(["--haystack"], help="A text file, or a folder of .txt files.  [default: Python's own documentation]"),
    click.Option(["--chat_template"], type=click.Choice(["auto", "none"]), default="auto", show_default=True),
]


def make(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any]
) -> tuple[Benchmark, dict[str, Any]]:
    haystack = load_haystack(flags["haystack"])
    wrap = flags["chat_template"] == "auto" and has_chat_template(tokenizer)
    benchmark = Needle(
        tokenizer,
        style=flags["style"],
        lengths=flags["context_lengths"],
        depths=flags["depths"],
        samples=flags["samples"],
        digits=flags["digits"],
        haystack=haystack,
        seed=flags["seed"],
        chat=partial(chat_ids, tokenizer) if wrap else None,
    )
    return benchmark, {"haystack": haystack.record(), "chat_template": "the tokenizer's" if wrap else "none"}


def finish(rows: list[Row], folder: Path, console: Console) -> None:
    overview, *single = save_heatmaps(rows, folder)
    console.print(f"heatmap {overview}  (and {len(single)} of one configuration each beside it)", soft_wrap=True)


def command(arguments: list[str]) -> click.Command:
    return sweep_command("needle", __doc__ or "", OPTIONS, make, finish, registry_for(arguments))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(command, arguments)


if __name__ == "__main__":
    main()
