"""What a decode step costs: the stock model, a step without any cache, and each method by itself, in one process.

    python benchmarks/decode.py [--tokens 8000] [--method fullkv,snapkv,...] [--rows 64] [--dtype bfloat16]

Every kind takes a few steps in turn with all others, as a decode takes many. `ratio` is to fullkv, or to the first
method that is named. `mixed` rows are those of --mixed, as many as --rows says at 1,024 tokens of prompt, in one step.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
import torch
from rounds import common_options, engine_of, lines_of, load, prompt_of, show, take_turns, where
from transformers import DynamicCache, PreTrainedModel

from kvfactory import Engine, Sequence
from kvfactory.jobs import make_jobs
from kvfactory.registry import get_registry

METHODS = "fullkv,snapkv,adakv,h2o,quest,kivi:nbits=2,kivi:nbits=4,kivi:nbits=8,gear,kvquant,minicache"
MIXED = (
    "streamingllm,h2o,snapkv,pyramidkv,adakv,headkv,l2norm,expected_attention,nacl,random,semantic,learned,scissorhands"
)
MIXED_TOKENS = 1024
STEPS = 4
"""Of one kind in a turn."""


def prefilled(engine: Engine, ids: list[int], specs: str, budgets: list[int]) -> dict[str, Sequence]:
    """A sequence for each method and budget, which has taken its first steps."""
    jobs = make_jobs(get_registry(), specs.split(","), budgets)
    sequences = engine.prefill(ids, [job.method for job in jobs])
    return {f"{job.label} {job.budget or ''}".strip(): each for job, each in zip(jobs, sequences, strict=True)}


def stock_step(model: PreTrainedModel, ids: list[int]) -> Callable[[], Any]:
    """A step of the model behind a prompt, as transformers takes it."""
    cache = DynamicCache()
    with torch.no_grad():
        model.model(torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def step() -> None:
        model(torch.tensor([[5]], device=model.device), past_key_values=cache, use_cache=True).logits.argmax(
            -1
        ).tolist()

    return step


def step_without_cache(model: PreTrainedModel, rows: int) -> Callable[[], Any]:
    """A step that reads the weights and attends to nothing."""

    @torch.no_grad()
    def step() -> None:
        model(torch.full((rows, 1), 5, device=model.device), use_cache=False).logits.argmax(-1).tolist()

    return step


@click.command(help=__doc__)
@click.option("--method", default=METHODS, show_default=True)
@click.option("--mixed", default=MIXED, show_default=True, help="Methods of the rows that step together.")
@click.option("--budget", default=128, show_default=True)
@click.option("--tokens", default=8000, show_default=True, help="Prompt tokens.")
@click.option("--rows", default=64, show_default=True, help="Rows that step together; 0 for none.")
@common_options
def main(
    method: str,
    mixed: str,
    budget: int,
    tokens: int,
    rows: int,
    repeats: int,
    dtype: str,
    threads: int | None,
    model_path: str | None,
    file: Path | None,
) -> None:
    model, tokenizer = load(model_path, dtype, threads)
    engine = engine_of(model, tokenizer)
    ids = prompt_of(tokenizer, tokens)
    alone = prefilled(engine, ids, method, [budget])
    kinds: dict[str, Callable[[], Any]] = {
        name: lambda each=each: engine.decode([each], 1)
        for name, each in alone.items()  # type: ignore[misc]
    }
    kinds["stock transformers"] = stock_step(model, ids)
    kinds["stock transformers without a cache"] = step_without_cache(model, 1)
    kinds["no cache, 1 row"] = step_without_cache(engine.model, 1)
    if rows:
        made = prefilled(engine, prompt_of(tokenizer, MIXED_TOKENS), mixed, [64, 128, 256])
        many = [each.fork() for each in islice(cycle(made.values()), rows)]
        full = engine.prefill(prompt_of(tokenizer, MIXED_TOKENS), [alone_method(alone)])
        kinds[f"no cache, {rows} rows"] = step_without_cache(engine.model, rows)
        kinds[f"{rows} mixed rows at {MIXED_TOKENS}"] = lambda: engine.decode(many, 1)
        kinds[f"1 row at {MIXED_TOKENS}"] = lambda: engine.decode(full, 1)
        kinds[f"stock transformers at {MIXED_TOKENS}"] = stock_step(model, prompt_of(tokenizer, MIXED_TOKENS))
    turns = {name: lambda step=step: [step() for _ in range(STEPS)] for name, step in kinds.items()}  # type: ignore[misc]
    lines = lines_of(take_turns(turns, 2 * repeats, engine.device), next(iter(kinds)))
    for line in lines:
        line["median_ms"] = 1000 / STEPS * line["median_seconds"]
        line["least_ms"] = 1000 / STEPS * line["least_seconds"]
    title = f"a decode step behind {tokens} tokens, budget {budget}; {where(model)}"
    show(title, lines, {"kind": "", "median_ms": ".1f", "least_ms": ".1f", "ratio": ".2f"}, file)


def alone_method(alone: dict[str, Sequence]) -> Any:
    """The first method."""
    return next(iter(alone.values())).cache.method


if __name__ == "__main__":
    main()
