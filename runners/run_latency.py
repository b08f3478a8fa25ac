"""Latency and memory under compression: time to the first token, time per token, bytes, and how many sequences fit.

Every configuration runs by itself, so times rank methods here. `--card` sets the costs beside scores at equal budgets.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from kvfactory.benchmarks import Benchmark
from kvfactory.errors import require
from kvfactory.flag_types import CommaList, PositiveInt
from kvfactory.hookspecs import RegisterBenchmark, hookimpl
from kvfactory.installed import get_registry
from kvfactory.runner import Runner, run_benchmark, sweep_jobs

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvfactory.jobs import Job
    from kvfactory.registry import Registry
    from kvfactory.results import Row
    from kvfactory.sweep import Sweep

SHARES = (50, 25, 12.5, 6.25)
"""Budgets of the card where none are given, in percent of the prompt."""
SCORED = "needle"
"""The benchmark whose scores the card has, and the folder of its rows."""

OPTIONS = [
    click.Option(
        ["--lengths"],
        type=CommaList(PositiveInt()),
        default="1024,2048",
        show_default=True,
        help="Prompt tokens, separated by commas.",
    ),
    click.Option(
        ["--batch_sizes"],
        type=CommaList(PositiveInt()),
        default="1",
        show_default=True,
        help="Prompts that are prefilled in one pass and decoded together, separated by commas.",
    ),
    click.Option(
        ["--new_tokens"],
        type=click.IntRange(min=2),
        default=32,
        show_default=True,
        help="Tokens that every prompt is continued by; stop tokens stop nothing.",
    ),
    click.Option(
        ["--warmup"], type=click.IntRange(min=0), default=1, show_default=True, help="Runs that are not counted."
    ),
    click.Option(["--repeats"], type=PositiveInt(), default=5, show_default=True, help="Runs that are."),
    click.Option(
        ["--memory_gib"],
        type=click.FloatRange(min=0, min_open=True),
        help="Say how many sequences fit into so much memory, by the bytes of weights and caches.",
    ),
    click.Option(
        ["--card"],
        is_flag=True,
        help="Find needles of the same lengths too, and write a card of scores and costs. Budgets are 50, 25, 12.5 "
        "and 6.25% of the prompt if --max_capacity_prompts is not given.",
    ),
    click.Option(
        ["--samples"], type=PositiveInt(), default=4, show_default=True, help="Needles in each of the card's 5 depths."
    ),
    click.Option(
        ["--scores"],
        type=click.Path(path_type=Path),
        help="The card's scores are those of this run folder, of any benchmark, and no needles are looked for.",
    ),
]


def make(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any]
) -> tuple[Benchmark, dict[str, Any]]:
    from kvfactory.benchmarks.latency import Latency, plain_ids
    from kvfactory.chat import context_window

    memory = flags["memory_gib"]
    benchmark = Latency(
        vocabulary=plain_ids(tokenizer, model.config.vocab_size),
        lengths=flags["lengths"],
        batch_sizes=flags["batch_sizes"],
        new_tokens=flags["new_tokens"],
        warmup=flags["warmup"],
        repeats=flags["repeats"],
        memory_bytes=None if memory is None else int(memory * 2**30),
        seed=flags["seed"],
        window=context_window(model.config),
        scores=score_source(model, tokenizer, flags) if flags["card"] else None,
    )
    return benchmark, {}


def card_jobs(registry: Registry, flags: dict[str, Any], settings: dict[str, Any]) -> list[Job]:
    """Every method at every budget, those of the card where it is asked for and none are given."""
    from kvfactory.budget import Share
    from kvfactory.results import key_of, load_rows

    source = click.get_current_context().get_parameter_source
    for name in ("samples", "scores"):
        given = source(name) is not ParameterSource.DEFAULT
        require(flags["card"] or not given, f"--{name} {flags[name]}: it is for the card; give --card too")
    budgets = source("max_capacity_prompts") is not ParameterSource.DEFAULT or not flags["card"]
    shares = {"max_capacity_prompts": [Share(percent) for percent in SHARES]}
    jobs = sweep_jobs(registry, flags if budgets else flags | shares, settings)
    if flags["scores"]:
        rows = load_rows(flags["scores"])
        require(any("score" in row for row in rows), f"--scores {flags['scores']}: its rows have no scores")
        there = {key_of(row)[1:] for row in rows}
        listed = ", ".join(f"{method} {budget or 'full'}" for method, budget in dict.fromkeys(there))
        require(
            any(job.key in there for job in jobs),
            f"--scores {flags['scores']}: none of the methods and budgets of this run are in it; it has {listed}",
        )
    return jobs


def score_source(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any]
) -> Callable[[Sweep], list[Row]]:
    """Where the card's scores come from: a run that is there, or needles of the same lengths."""
    from kvfactory.results import load_rows

    if flags["scores"]:
        return lambda sweep: load_rows(flags["scores"])
    runner: Runner = get_registry().benchmarks[SCORED]
    given = [
        "--context_lengths",
        ",".join(map(str, dict.fromkeys(flags["lengths"]))),
        "--samples",
        str(flags["samples"]),
    ]
    others = click.Command(SCORED, params=[*runner.options]).make_context(SCORED, given).params
    benchmark, facts = runner.make(model, tokenizer, others | {"seed": flags["seed"]})
    return partial(run_beside, benchmark, facts)


def run_beside(benchmark: Benchmark, facts: dict[str, Any], sweep: Sweep) -> list[Row]:
    """Run the jobs of a sweep over another benchmark, in a folder of its own inside the sweep's; its rows.

    Where memory does not suffice, the rows that are there.
    """
    from kvfactory.benchmarks.latency import unless_out_of_memory
    from kvfactory.results import META, RunFolder
    from kvfactory.sweep import Sweep

    meta = json.loads((sweep.folder.path / META).read_bytes())
    path, environment = sweep.folder.path / benchmark.name, meta["sessions"][-1]["environment"]
    with RunFolder.open(path, meta["settings"] | facts, environment=environment) as folder:
        beside = Sweep(
            sweep.engine,
            sweep.tokenizer,
            benchmark,
            sweep.jobs,
            folder,
            sweep.stop,
            rows_at_once=sweep.rows_at_once,
            bytes_at_once=sweep.bytes_at_once,
            record_tokens=sweep.recorder.most,
            prefill_chunk=sweep.prefill_chunk,
        )
        print(f"notice: {beside.count_missing()} answers to score for the card, in {path}", file=sys.stderr)
        unless_out_of_memory(beside.run)
        if missing := beside.count_missing():
            print(f"notice: out of memory; {missing} answers are missing from the card's scores", file=sys.stderr)
        return beside.rows()


def finish(rows: list[Row], folder: Path, console: Console) -> None:
    from kvfactory.report.card import card, print_card, save_card
    from kvfactory.report.tables import score_names

    if score_names(rows):
        frame = card(rows)
        print_card(frame, console)
        console.print(f"card    {'  '.join(map(str, save_card(frame, folder)))}", soft_wrap=True)


@hookimpl
def kvfactory_register_benchmarks(register: RegisterBenchmark) -> None:
    from kvfactory.benchmarks.latency import LatencySweep

    runner = Runner(
        help=__doc__ or "",
        options=OPTIONS,
        make=make,
        finish=finish,
        grows=("lengths", "batch_sizes", "card", "samples", "scores"),
        jobs=card_jobs,
        sweep=LatencySweep,
    )
    register("latency", runner)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_benchmark("latency", arguments)


if __name__ == "__main__":
    main()
