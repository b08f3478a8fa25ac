"""How much a sweep costs, in one process: a shared sweep, one stock FullKV run, and the same configurations one by one.

    python benchmarks/sweep.py [--tokens 4096] [--new_tokens 32] [--method fullkv,...] [--budgets 64,128,256]

`stock` is transformers' own generate() of as many tokens. Below the table is what the sweep's time went into, of its last
run: the prompt's pass, each method's choosing, and the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import torch
from rounds import common_options, engine_of, lines_of, load, prompt_of, show, take_turns, where

from kvfactory import Engine, Sequence
from kvfactory.clock import now
from kvfactory.jobs import Job, make_jobs
from kvfactory.registry import get_registry

METHODS = (
    "fullkv,streamingllm,snapkv,snapkv:window_size=16,snapkv:window_size=32,snapkv:pooling=avgpool,pyramidkv,"
    "pyramidkv:beta=10,adakv,adakv:floor=0.5,headkv,l2norm,expected_attention"
)


def profile(engine: Engine, ids: list[int], jobs: list[Job], new_tokens: int) -> list[dict[str, Any]]:
    """Seconds of one sweep, line by line."""
    started = now(engine.device)
    sequences = engine.prefill(ids, [job.method for job in jobs])
    prefilled = now(engine.device)
    engine.decode(sequences, new_tokens)
    ended = now(engine.device)
    spent = [(job.label, each.cache.own_seconds) for job, each in zip(jobs, sequences, strict=True)]
    chosen = [(name, sum(seconds for _, seconds in part)) for name, part in groupby(spent, lambda pair: pair[0])]
    parts = [
        ("the prompt's pass", prefilled - started - sum(seconds for _, seconds in spent)),
        *((f"choosing: {name}", seconds) for name, seconds in chosen),
        (f"{new_tokens} tokens of {len(jobs)} rows", ended - prefilled),
    ]
    return [{"part": name, "seconds": seconds, "share": seconds / (ended - started)} for name, seconds in parts]


@click.command(help=__doc__)
@click.option("--method", default=METHODS, show_default=True)
@click.option("--budgets", default="64,128,256", show_default=True)
@click.option("--tokens", default=4096, show_default=True, help="Prompt tokens.")
@click.option("--new_tokens", default=32, show_default=True)
@click.option("--separate", is_flag=True, help="Run the configurations one by one too; that takes long.")
@common_options
def main(
    method: str,
    budgets: str,
    tokens: int,
    new_tokens: int,
    separate: bool,
    repeats: int,
    dtype: str,
    threads: int | None,
    model_path: str | None,
    file: Path | None,
) -> None:
    model, tokenizer = load(model_path, dtype, threads)
    engine, ids = engine_of(model, tokenizer), prompt_of(tokenizer, tokens)
    prompt = torch.tensor([ids], device=model.device)
    jobs = make_jobs(get_registry(), method.split(","), [int(each) for each in budgets.split(",")])
    exact = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def stock() -> None:
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **exact)

    def run(some: list[Job]) -> list[Sequence]:
        sequences = engine.prefill(ids, [job.method for job in some])
        engine.decode(sequences, new_tokens)
        return sequences

    kinds: dict[str, Callable[[], Any]] = {"stock": stock, f"sweep of {len(jobs)}": lambda: run(jobs)}
    if separate:
        kinds[f"{len(jobs)} separate runs"] = lambda: [run([job]) for job in jobs]
    lines = lines_of(take_turns(kinds, repeats, engine.device), "stock")
    title = f"{tokens} tokens in, {new_tokens} out; {where(model)}"
    show(title, lines, {"kind": "", "median_seconds": ".2f", "least_seconds": ".2f", "ratio": ".2f", "runs": ""}, file)
    parts = profile(engine, ids, jobs, new_tokens)
    beside = file and file.with_name(f"{file.stem}-profile{file.suffix}")
    show("of one sweep", parts, {"part": "", "seconds": ".2f", "share": ".1%"}, beside)


if __name__ == "__main__":
    main()
