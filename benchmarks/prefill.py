"""What a prefill costs under each method: the pass itself, and what choosing takes beside it, in one process.

    python benchmarks/prefill.py [--tokens 4096] [--method snapkv,h2o,...] [--dtype bfloat16]

Every round has the stock model's pass, ours that keeps everything, and one for all methods; those that attend to the prompt
in a way of their own have a pass each. `compress` is what a method takes alone: what methods share is counted with
each of them. `over full` is pass and choosing over a pass that keeps everything, less one.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from rounds import common_options, engine_of, load, prompt_of, show, take_turns, where

from kvfactory import Sequence, load_method
from kvfactory.jobs import make_jobs
from kvfactory.kernels import PromptAttention
from kvfactory.registry import get_registry

METHODS = (
    "snapkv,pyramidkv,adakv,streamingllm,l2norm,expected_attention,h2o,semantic,semantic:strategy=attention,"
    "semantic:strategy=representative,semantic:strategy=thesis,learned,minference"
)


@click.command(help=__doc__)
@click.option("--method", default=METHODS, show_default=True)
@click.option("--budget", default=128, show_default=True)
@click.option("--tokens", default=4096, show_default=True, help="Prompt tokens.")
@common_options
def main(
    method: str,
    budget: int,
    tokens: int,
    repeats: int,
    dtype: str,
    threads: int | None,
    model_path: str | None,
    file: Path | None,
) -> None:
    model, tokenizer = load(model_path, dtype, threads)
    engine, ids = engine_of(model, tokenizer), prompt_of(tokenizer, tokens)
    jobs = make_jobs(get_registry(), method.split(","), [budget])
    full, prompt = load_method("fullkv"), torch.tensor([ids], device=model.device)
    runs: list[list[Sequence]] = []

    @torch.no_grad()
    def stock() -> None:
        model.model(prompt, use_cache=True)

    kinds = {
        "stock base model": stock,
        "keeps everything": lambda: engine.prefill(ids, [full]),
        "all methods": lambda: runs.append(engine.prefill(ids, [job.method for job in jobs])),
    }
    seconds = take_turns(kinds, repeats, engine.device)
    plain = median(seconds["keeps everything"])
    names = ("stock base model", "keeps everything")
    lines: list[dict[str, Any]] = [
        {"kind": name, "prefill_seconds": median(seconds[name]), "over_full": median(seconds[name]) / plain - 1}
        for name in names
    ]
    for number, job in enumerate(jobs):
        sequences = [run[number] for run in runs[-repeats:]]
        own = isinstance(job.method, PromptAttention)
        prefill = median(each.prefill_seconds for each in sequences) if own else plain
        compress = median(each.cache.compress_seconds for each in sequences)
        over = (prefill + compress) / plain - 1
        lines.append({"kind": job.label, "prefill_seconds": prefill, "compress_seconds": compress, "over_full": over})
    title = f"prefill of {tokens} tokens, budget {budget}, {repeats} rounds; {where(model)}"
    show(title, lines, {"kind": "", "prefill_seconds": ".2f", "compress_seconds": ".3f", "over_full": ".1%"}, file)


if __name__ == "__main__":
    main()
