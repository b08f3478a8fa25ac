"""LongBench under compression: `run_longbench.py --method h2o --attn_implementation sdpa`.

Prompts, truncation, stop rules and metrics are the official ones. Rows come from `--data_dir`, or else from the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
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

OPTIONS = [
    click.Option(
        ["--datasets", "--dataset"],
        type=CommaList(click.STRING),
        help="Datasets, separated by commas.  [default: the 16 that are not Chinese]",
    ),
    click.Option(
        ["--longbench_e"],
        is_flag=True,
        help="LongBench-E: the same datasets' rows of even lengths, scored in three bins.  [default datasets: its 13]",
    ),
    click.Option(
        ["--query_agnostic"],
        is_flag=True,
        help="Compress the context before the question is read; questions about one context share its cache.",
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
    CHAT_TEMPLATE,
]


def make(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any]
) -> tuple[Benchmark, dict[str, Any]]:
    from kvfactory.benchmarks.longbench import ENGLISH, LONGBENCH_E, LongBench
    from kvfactory.chat import check_window, max_prompt_tokens

    wrap, chat = chat_template(tokenizer, flags)
    longest = flags["max_prompt_tokens"] or max_prompt_tokens(model.config)
    check_window(model.config, longest, "--max_prompt_tokens")
    datasets = flags["datasets"] or (LONGBENCH_E if flags["longbench_e"] else ENGLISH)
    if flags["longbench_e"]:
        datasets = [f"{each.removesuffix('_e')}_e" for each in datasets]
    benchmark = LongBench(
        tokenizer,
        datasets,
        data_dir=flags["data_dir"],
        max_prompt_tokens=longest,
        chat=wrap,
        query_agnostic=flags["query_agnostic"],
        max_num_examples=flags["max_num_examples"],
        sample_method=flags["sample_method"],
        seed=flags["seed"],
    )
    return benchmark, {"max_prompt_tokens": longest, **chat}


def finish(rows: list[Row], folder: Path, console: Console) -> None:
    """One line a method and budget, one column a dataset, as LongBench's users know it."""
    from kvfactory.report.tables import wide

    path = folder / "scores.csv"
    wide(rows).to_csv(path, index=False)
    console.print(f"scores  {path}", soft_wrap=True)


@hookimpl
def kvfactory_register_benchmarks(register: RegisterBenchmark) -> None:
    from kvfactory.benchmarks.longbench import score

    runner = Runner(help=__doc__ or "", options=OPTIONS, make=make, finish=finish, grows=("datasets",), score=score)
    register("longbench", runner)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_benchmark("longbench", arguments)


if __name__ == "__main__":
    main()
