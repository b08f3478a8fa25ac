"""Follow-up questions in turn on one compressed cache: `run_multiturn.py --method snapkv --history golden`.

The first question is at the end of the prompt and known when the cache is compressed; the others come later, each behind the
answers before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from kvfactory.benchmarks import Benchmark
from kvfactory.flag_types import PositiveInt
from kvfactory.hookspecs import RegisterBenchmark, hookimpl
from kvfactory.runner import CHAT_TEMPLATE, Runner, chat_template, run_benchmark

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvfactory.results import Row


def options() -> list[click.Option]:
    """Flags of its own."""
    from kvfactory.benchmarks.multiturn import HISTORIES

    return [
        click.Option(
            ["--conversations"],
            type=click.Path(path_type=Path),
            help="JSON lines of a context and turns, as SCBench has them.  [default: passages that come along]",
        ),
        click.Option(
            ["--history"],
            type=click.Choice(HISTORIES),
            default="golden",
            show_default=True,
            help="Earlier answers that a turn sees: the model's own, or the right ones.",
        ),
        click.Option(
            ["--query_agnostic"], is_flag=True, help="Compress the context before the first question is read, too."
        ),
        click.Option(["--turns"], type=PositiveInt(), help="Turns of each conversation.  [default: all]"),
        click.Option(["--max_num_examples"], type=PositiveInt(), help="Conversations.  [default: all]"),
        click.Option(
            ["--max_new_tokens"],
            type=PositiveInt(),
            default=24,
            show_default=True,
            help="Tokens of an answer, at most.",
        ),
        CHAT_TEMPLATE,
    ]


def make(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any]
) -> tuple[Benchmark, dict[str, Any]]:
    from kvfactory.benchmarks.multiturn import MultiTurn, conversations_of, read_conversations
    from kvfactory.benchmarks.reading import read_passages
    from kvfactory.chat import check_window

    wrap, chat = chat_template(tokenizer, flags)
    path = flags["conversations"]
    conversations = read_conversations(path) if path else conversations_of(read_passages())
    conversations = conversations[: flags["max_num_examples"]]
    benchmark = MultiTurn(
        tokenizer,
        conversations,
        history=flags["history"],
        query_agnostic=flags["query_agnostic"],
        turns=flags["turns"],
        max_new_tokens=flags["max_new_tokens"],
        template=wrap,
    )
    for number, tokens in enumerate(benchmark.tokens(), start=1):
        check_window(model.config, tokens, f"--conversations {path}, conversation {number}, all its turns")
    return benchmark, chat


def finish(rows: list[Row], folder: Path, console: Console) -> None:
    """One line a method and budget, one column a turn."""
    from kvfactory.report.tables import wide

    path = folder / "turns.csv"
    wide(rows).to_csv(path, index=False)
    console.print(f"turns   {path}", soft_wrap=True)


@hookimpl
def kvfactory_register_benchmarks(register: RegisterBenchmark) -> None:
    from kvfactory.benchmarks.multiturn import score

    grows = ("turns", "max_num_examples")
    runner = Runner(help=__doc__ or "", options=options(), make=make, finish=finish, grows=grows, score=score)
    register("multiturn", runner)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_benchmark("multiturn", arguments)


if __name__ == "__main__":
    main()
