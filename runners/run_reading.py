"""Questions about passages under compression, before or after the passage: `run_reading.py --method snapkv`.

A method that goes by the last queries of a prompt knows the question when it stands after the passage, and not when it
stands before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfactory.benchmarks import Benchmark
from kvfactory.benchmarks.reading import KINDS, PLACEMENTS, Reading, read_passages
from kvfactory.chat import check_window, has_chat_template
from kvfactory.flag_types import CommaList, PositiveInt
from kvfactory.hookspecs import RegisterBenchmark, hookimpl
from kvfactory.report.tables import budget_name, percent
from kvfactory.results import Row
from kvfactory.runner import Runner, run_benchmark

OPTIONS = [
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
    click.Option(["--chat_template"], type=click.Choice(["auto", "none"]), default="auto", show_default=True),
]


def make(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any]
) -> tuple[Benchmark, dict[str, Any]]:
    wrap = flags["chat_template"] == "auto" and has_chat_template(tokenizer)
    benchmark = Reading(
        tokenizer,
        read_passages(flags["passages"])[: flags["max_num_examples"]],
        placements=flags["placements"],
        kinds=[kind.replace("_", " ") for kind in flags["kinds"]],
        template=wrap,
    )
    longest = {example.info["passage"]: example for example in benchmark.examples()}
    for passage, example in longest.items():  # questions are short: one of each passage tells whether it fits
        tokens = len(benchmark.prompt_ids(example)) + len(benchmark.question_ids(example)) + example.max_new_tokens
        check_window(model.config, tokens, f"--passages {flags['passages'] or ''}: '{passage}'")
    return benchmark, {"chat_template": "the tokenizer's" if wrap else "none"}


def scores(rows: Sequence[Row]) -> pd.DataFrame:
    """One line per method, budget and placement: a column for each kind, and their plain `average`."""
    keys = ["method", "budget", "question"]
    lines = [
        {
            "method": row["method"],
            "budget": budget_name(row["budget"]),
            "question": row["placement"],
            "kind": row["kind"],
            "score": row["score"],
        }
        for row in rows
    ]
    frame = pd.DataFrame(lines, columns=[*keys, "kind", "score"]).astype({"budget": object})
    table = frame.groupby([*keys, "kind"], sort=False)["score"].agg(percent).unstack(sort=False)
    table = table[[kind for kind in KINDS if kind in table]]
    return table.assign(average=table.mean(axis=1, skipna=False).round(2)).rename_axis(columns=None).reset_index()


def finish(rows: list[Row], folder: Path, console: Console) -> None:
    """reading.csv, and the same as a table."""
    path = folder / "reading.csv"
    frame = scores(rows)
    frame.to_csv(path, index=False)
    table = Table(title="reading: by place of the question", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in frame:
        table.add_column(str(column), justify="left" if column in ("method", "question") else "right", overflow="fold")
    for line in frame.to_dict("records"):
        table.add_row(*(Text(f"{value:.2f}" if isinstance(value, float) else str(value)) for value in line.values()))
    console.print(table, "")
    console.print(f"kinds   {path}", soft_wrap=True)


@hookimpl
def kvfactory_register_benchmarks(register: RegisterBenchmark) -> None:
    grows = ("placements", "kinds", "max_num_examples")
    register("reading", Runner(help=__doc__ or "", options=OPTIONS, make=make, finish=finish, grows=grows))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_benchmark("reading", arguments)


if __name__ == "__main__":
    main()
