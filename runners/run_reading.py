"""Questions about passages under compression, before or after the passage: `run_reading.py --method snapkv`.

A method that goes by the last queries of a prompt knows the question when it stands after the passage, and not when it
stands before.
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


def options() -> list[click.Option]:
    """Flags of its own."""
    from kvfactory.benchmarks.reading import KINDS, PLACEMENTS

    return [
        click.Option(
            ["--passages"],
            type=click.Path(path_type=Path),
            help="JSON with passages and questions.  [default: the twelve that come along]",
        ),
        click.Option(
            ["--placements"],
            type=CommaList(click.STRING),
            default=",".join(PLACEMENTS),
            show_default=True,
            help="Where the question stands, separated by commas.",
        ),
        click.Option(
            ["--kinds"],
            type=CommaList(click.STRING),
            default=",".join(kind.replace(" ", "_") for kind in KINDS),
            show_default=True,
            help="Kinds of questions, separated by commas.",
        ),
        click.Option(["--max_num_examples"], type=PositiveInt(), help="Passages.  [default: all]"),
        CHAT_TEMPLATE,
    ]


def make(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any]
) -> tuple[Benchmark, dict[str, Any]]:
    from kvfactory.benchmarks.reading import Reading, read_passages
    from kvfactory.chat import check_window

    wrap, chat = chat_template(tokenizer, flags)
    benchmark = Reading(
        tokenizer,
        read_passages(flags["passages"])[: flags["max_num_examples"]],
        placements=flags["placements"],
        kinds=flags["kinds"],
        template=wrap,
    )
    by_size = sorted(benchmark.examples(), key=lambda each: len(each.info["question"]))
    longest = {example.id.split("/")[0]: example for example in by_size}
    for number, example in longest.items():  # the longest question of each passage tells whether all fit
        tokens = len(benchmark.prompt_ids(example)) + len(benchmark.question_ids(example)) + example.max_new_tokens
        check_window(model.config, tokens, f"--passages {flags['passages'] or ''}, passage {number}")
    return benchmark, chat


def finish(rows: list[Row], folder: Path, console: Console) -> None:
    """reading.csv, and the same as a table."""
    from kvfactory.benchmarks.reading import KINDS
    from kvfactory.report.tables import by_fields
    from kvfactory.report.terminal import plain_table

    path = folder / "reading.csv"
    frame = by_fields(rows, "placement", "kind", KINDS)
    frame.to_csv(path, index=False)
    console.print(plain_table("reading: by placement of the question", frame), "")
    console.print(f"kinds   {path}", soft_wrap=True)


@hookimpl
def kvfactory_register_benchmarks(register: RegisterBenchmark) -> None:
    from kvfactory.benchmarks.reading import score

    grows = ("placements", "kinds", "max_num_examples")
    runner = Runner(help=__doc__ or "", options=options(), make=make, finish=finish, grows=grows, score=score)
    register("reading", runner)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_benchmark("reading", arguments)


if __name__ == "__main__":
    main()
