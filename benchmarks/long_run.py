"""Whether a long sweep grows in memory or slows down: a tiny random model and many short prompts.

    python benchmarks/long_run.py [--examples 2000] [--record_tokens 1024,0] [--json FILE]

Each setting of `--record_tokens` has a process of its own. Prints, every so many examples, the resident memory and the
rows a second of that stretch. Of the whole run, its first tenth left out, it prints the least-squares slope of the memory
in bytes a row, and the processor time that a row takes in the last quarter over that in the first.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from kvfactory import Engine
from kvfactory.benchmarks import Benchmark, Example
from kvfactory.jobs import make_jobs
from kvfactory.models import prepare_process
from kvfactory.progress import RunProgress
from kvfactory.registry import get_registry
from kvfactory.results import Row, RunFolder
from kvfactory.sweep import Sweep
from kvfactory.testing import TINY, tiny_model

METHODS = "fullkv,snapkv,h2o,streamingllm,adakv,tova,kivi"
SHORTEST, LONGEST = 40, 200
"""Prompts, in tokens."""


@dataclass
class Numbers(Benchmark):
    """Random prompts of random lengths, made when they are asked for and the same every time."""

    count: int
    new_tokens: int
    name: str = "numbers"

    def examples(self) -> list[Example]:
        return [Example(f"number/{each}", "all", ["1"], self.new_tokens) for each in range(self.count)]

    def prompt_ids(self, example: Example) -> list[int]:
        chance = random.Random(example.id)
        return [chance.randrange(3, TINY["vocab_size"]) for _ in range(chance.randint(SHORTEST, LONGEST))]

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        return {"score": float(example.answers[0] in prediction.split())}


class Words:
    """A tokenizer whose token 5 is the text "5 "."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(f"{each} " for each in ids)

    def convert_ids_to_tokens(self, id: int) -> str:
        return f"{id}"


@dataclass(frozen=True)
class Mark:
    """How far a run was at one moment."""

    rows: int
    rss_bytes: int
    seconds: float
    processor_seconds: float


def mark(rows: int) -> Mark:
    return Mark(rows, rss_bytes(), time.perf_counter(), time.process_time())


def rss_bytes() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(
    record_tokens: int, specs: Sequence[str], budget: int, examples: int, new_tokens: int, every: int
) -> list[Mark]:
    """Marks of one run, one each `every` examples; the first is where it starts."""
    prepare_process(threads=1)
    jobs = make_jobs(get_registry(), specs, [budget])
    benchmark = Numbers(examples, new_tokens)
    tokenizer: Any = Words()
    with tempfile.TemporaryDirectory() as path, RunFolder.open(path, {}, environment={}) as folder:
        engine = Engine(tiny_model())
        sweep = Sweep(engine, tokenizer, benchmark, jobs, folder, (), record_tokens=record_tokens)
        progress = RunProgress("", sweep.count_missing(), ())
        sweep.warm_up()
        marks = [mark(0)]
        written = 0

        def on_row(row: Row) -> None:
            nonlocal written
            written += 1
            progress(row)
            if written % (every * len(jobs)) == 0:
                marks.append(mark(written))

        sweep.run(on_row)
    return marks


def summary(marks: Sequence[Mark]) -> dict[str, float]:
    """Slope of the memory in bytes a row, and a row's processor time in the last quarter over the first, by medians."""
    settled = marks[max(1, len(marks) // 10) :]
    slope = statistics.linear_regression([each.rows for each in settled], [each.rss_bytes for each in settled]).slope
    paces = [(b.processor_seconds - a.processor_seconds) / (b.rows - a.rows) for a, b in pairwise(settled)]
    quarter = max(1, len(paces) // 4)
    return {
        "rss_slope_bytes_per_row": slope,
        "last_over_first_quarter": statistics.median(paces[-quarter:]) / statistics.median(paces[:quarter]),
    }


def shown(marks: Sequence[Mark], rows_per_example: int) -> Table:
    table = Table("examples", "RSS MiB", "rows/s", "processor ms a row")
    for before, each in pairwise(marks):
        rows = each.rows - before.rows
        pace = rows / (each.seconds - before.seconds)
        spent = 1000 * (each.processor_seconds - before.processor_seconds) / rows
        table.add_row(
            str(each.rows // rows_per_example), f"{each.rss_bytes / 2**20:.1f}", f"{pace:.1f}", f"{spent:.2f}"
        )
    return table


@click.command(help=__doc__)
@click.option("--method", default=METHODS, show_default=True)
@click.option("--budget", default=32, show_default=True, help="Of methods that evict.")
@click.option("--examples", default=2000, show_default=True)
@click.option("--new_tokens", default=4, show_default=True)
@click.option("--every", default=100, show_default=True, help="Examples between two looks; 5 looks or more.")
@click.option("--record_tokens", default="1024,0", show_default=True, help="As of a benchmark's command; one run each.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where to write the numbers too.")
def main(
    method: str, budget: int, examples: int, new_tokens: int, every: int, record_tokens: str, file: Path | None
) -> None:
    if not Path("/proc/self/statm").exists():
        sys.exit("there is no /proc/self/statm here, which says how much memory a process has")
    if examples < 5 * every:
        raise click.UsageError(f"--every {every}: {examples} examples are fewer than five times as many")
    os.environ["OMP_NUM_THREADS"] = "1"
    specs, console, runs = method.split(","), Console(width=100), []
    for most in [int(each) for each in record_tokens.split(",")]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            marks = pool.apply(measure, (most, specs, budget, examples, new_tokens, every))
        run: dict[str, Any] = {"record_tokens": most, **summary(marks)}
        console.print(f"{examples} examples, {len(specs)} methods, --record_tokens {most}", shown(marks, len(specs)))
        console.print(f"memory grows by {run['rss_slope_bytes_per_row']:.0f} bytes a row")
        console.print(f"last quarter over first, processor time a row: {run['last_over_first_quarter']:.3f}\n")
        runs.append(run | {"marks": [vars(mark) for mark in marks]})
    if file:
        file.write_text(
            json.dumps({"methods": specs, "examples": examples, "runs": runs}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
