"""LongBench under compression: `run_longbench.py --method h2o --attn_implementation sdpa`.

Prompts, truncation, stop rules and metrics are the official ones. Rows come from `--data_dir`, or else from the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfactory.benchmarks import Benchmark
from kvfactory.benchmarks.longbench import ENGLISH, LongBench
from kvfactory.chat import chat_ids, has_chat_template, max_prompt_tokens
from kvfactory.cli import registry_for, run_command, sweep_command
from kvfactory.flag_types import CommaList, PositiveInt
from kvfactory.report.tables import wide
from kvfactory.results import Row

OPTIONS = [
    click.Option(
        ["--datasets", "--dataset"],
        type=CommaList(click.STRING),
        default=",".join(ENGLISH),
        help="Datasets, separated by commas.  [default: the 16 that are not Chinese]",
    ),
    click.Option(
        ["--data_dir"],
        type=click.Path(path_type=Path),
        help="Folder with <dataset>.jsonl files or the official data.zip.  [default: the hub's]",
    ),
    click.Option(["--max_num_examples"], type=PositiveInt(), help="Examples of each dataset.  [default: all]"),
    click.Option(["--sample_method"], type=click.Choice(["topk", "random"]), default="topk", show_default=True),
    click.Option(
        ["--max_prompt_tokens"],
        type=PositiveInt(),
        help="Longer prompts lose their middle.  [default: the context window less 500]",
    ),
    click.Option(["--chat_template"], type=click.Choice(["auto", "none"]), default="auto", show_default=True),
]


def make(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any]
) -> tuple[Benchmark, dict[str, Any]]:
    wrap = flags["chat_template"] == "auto" and has_chat_template(tokenizer)
    longest = flags["max_prompt_tokens"] or max_prompt_tokens(model.config)
    benchmark = LongBench(
        tokenizer,
        flags["datasets"],
        data_dir=flags["data_dir"],
        max_prompt_tokens=longest,
        chat=partial(chat_ids, tokenizer) if wrap else None,
        max_num_examples=flags["max_num_examples"],
        sample_method=flags["sample_method"],
        seed=flags["seed"],
    )
    return benchmark, {"max_prompt_tokens": longest, "chat_template": "the tokenizer's" if wrap else "none"}


def finish(rows: list[Row], folder: Path, console: Console) -> None:
    """One line a method and budget, one column a dataset, as LongBench's users know it."""
    path = folder / "scores.csv"
    wide(rows).to_csv(path, index=False)
    console.print(f"scores  {path}", soft_wrap=True)


def command(arguments: list[str]) -> click.Command:
    return sweep_command("longbench", __doc__ or "", OPTIONS, make, finish, registry_for(arguments))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(command, arguments)


if __name__ == "__main__":
    main()
