"""RULER under compression: `run_ruler.py --method h2o --lengths 4096,8192`, 13 synthetic tasks at any length.

Samples are made when the command runs, with the model's own tokenizer and the official wording, answer lengths and
scores, or are those of --ruler_dir. Essays, SQuAD and HotpotQA are the official material; without them text that comes
with Python and with this package stands in their place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from kvfactory.benchmarks import Benchmark
from kvfactory.errors import require
from kvfactory.flag_types import CommaList, PositiveInt
from kvfactory.folder_format import budget_name
from kvfactory.hookspecs import RegisterBenchmark, hookimpl
from kvfactory.runner import CHAT_TEMPLATE, Runner, chat_template, run_benchmark

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvfactory.results import Row

LENGTH = 1024
"""Tokens; what a model for trying out and a CPU can do."""

OPTIONS = [
    click.Option(
        ["--tasks"], type=CommaList(click.STRING), help="Tasks, separated by commas.  [default: all 13 that are there]"
    ),
    click.Option(
        ["--lengths"],
        type=CommaList(PositiveInt()),
        help="Tokens of prompt and answer, separated by commas.  "
        f"[default: {LENGTH}; with --ruler_dir all that it has]",
    ),
    click.Option(
        ["--samples"],
        type=PositiveInt(),
        default=10,
        show_default=True,
        help="Samples of each task and length; 500 are official.",
    ),
    click.Option(["--essays"], help="A text file, or a folder of .txt files.  [default: Python's own documentation]"),
    click.Option(
        ["--squad"],
        type=click.Path(path_type=Path),
        help="SQuAD's dev-v2.0.json, for qa_1.  [default: the package's own passages]",
    ),
    click.Option(
        ["--hotpotqa"],
        type=click.Path(path_type=Path),
        help="HotpotQA's hotpot_dev_distractor_v1.json, for qa_2.  [default: the package's own passages]",
    ),
    click.Option(
        ["--ruler_dir"],
        type=click.Path(path_type=Path),
        help="Folder with <length>/<task>.jsonl files of the official generator.  [default: samples are made]",
    ),
    CHAT_TEMPLATE,
]


def make(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any]
) -> tuple[Benchmark, dict[str, Any]]:
    from kvfactory.benchmarks.ruler import GeneratedRuler, Sources
    from kvfactory.benchmarks.ruler_files import ReadyMade
    from kvfactory.chat import chat_ids, context_window
    from kvfactory.metrics import RULER_TASKS

    wrap, chat = chat_template(tokenizer, flags)
    common: dict[str, Any] = {
        "samples": flags["samples"],
        "chat": partial(chat_ids, tokenizer) if wrap else None,
        "window": context_window(model.config),
    }
    if flags["ruler_dir"]:
        for unused in ("essays", "squad", "hotpotqa"):
            require(flags[unused] is None, f"--{unused}: the samples of --ruler_dir are there already; leave one out")
        ready = ReadyMade(tokenizer, flags["ruler_dir"], tasks=flags["tasks"], lengths=flags["lengths"], **common)
        return ready, chat
    sources = Sources(flags["essays"], flags["squad"], flags["hotpotqa"])
    generated = GeneratedRuler(
        tokenizer,
        tasks=flags["tasks"] or RULER_TASKS,
        lengths=flags["lengths"] or [LENGTH],
        sources=sources,
        seed=flags["seed"],
        **common,
    )
    return generated, chat | sources.record()


def scores(rows: Sequence[Row]) -> pd.DataFrame:
    """One line per method, budget and length: a column for each task, their plain `average`, and the empty predictions."""
    from kvfactory.metrics import RULER_TASKS, postprocess_pred
    from kvfactory.report.tables import by_fields

    named = [{**row, "length": row["context_length"]} for row in rows]
    frame = by_fields(named, "length", "task", RULER_TASKS)
    empty = Counter(
        (row["method"], budget_name(row), row["length"]) for row in named if not postprocess_pred(row["prediction"])
    )
    lines = zip(frame["method"], frame["budget"], frame["length"], strict=True)
    return frame.assign(nulls=[empty[line] for line in lines])


def finish(rows: list[Row], folder: Path, console: Console) -> None:
    """ruler.csv, and the averages over tasks with a column for each length."""
    from kvfactory.report.terminal import plain_table

    path = folder / "ruler.csv"
    frame = scores(rows)
    frame.to_csv(path, index=False)
    averages = frame.set_index(["method", "budget", "length"])["average"].unstack(sort=False)
    console.print(plain_table("ruler: average of tasks", averages.rename_axis(columns=None).reset_index()), "")
    console.print(f"tasks   {path}", soft_wrap=True)


@hookimpl
def kvfactory_register_benchmarks(register: RegisterBenchmark) -> None:
    from kvfactory.benchmarks.ruler import score

    grows = ("tasks", "lengths", "samples")
    runner = Runner(help=__doc__ or "", options=OPTIONS, make=make, finish=finish, grows=grows, score=score)
    register("ruler", runner)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_benchmark("ruler", arguments)


if __name__ == "__main__":
    main()
