"""How much a sweep costs, in one process: a shared sweep, one stock FullKV run, and the same configurations one by one.

    python benchmarks/sweep.py [--tokens 2048] [--new_tokens 32] [--repeats 5]

Prints medians and ratios. Runs of the three kinds take turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import product
from pydoc_data.topics import topics

import click
import torch
from rich.console import Console
from rich.table import Table

from kvfactory import Engine, Method, load_method, load_model
from kvfactory.models import default_threads
from kvfactory.registry import get_registry


def configurations(names: list[str], budgets: list[int]) -> list[Method]:
    """Every method at every budget; a method that keeps everything counts once."""
    registry = get_registry()
    evicting = [name for name in names if registry.has_budget(name)]
    whole = [load_method(name) for name in names if name not in evicting]
    return whole + [load_method(name, budget=budget) for name, budget in product(evicting, budgets)]


@click.command(help=__doc__)
@click.option("--method", default="fullkv,streamingllm,h2o,snapkv,pyramidkv,adakv", show_default=True)
@click.option("--budgets", default="64,128,256", show_default=True)
@click.option("--tokens", default=2048, show_default=True, help="Prompt tokens.")
@click.option("--new_tokens", default=32, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--model_path", help="Hub id, folder or .gguf file.  [default: the embedded model]")
def main(
    method: str, budgets: str, tokens: int, new_tokens: int, repeats: int, dtype: str, model_path: str | None
) -> None:
    torch.set_num_threads(default_threads())
    model, tokenizer = load_model(model_path, dtype=dtype)
    text = " ".join(topics[name] for name in sorted(topics))
    prompt = tokenizer(text, truncation=True, max_length=tokens, return_tensors="pt")["input_ids"].to(model.device)
    methods = configurations(method.split(","), [int(each) for each in budgets.split(",")])
    engine = Engine(model, tokenizer)
    exact = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def stock() -> None:
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **exact)

    def sweep() -> None:
        engine.decode(engine.prefill(prompt, methods), new_tokens)

    def separate() -> None:
        for each in methods:
            engine.decode(engine.prefill(prompt, [each]), new_tokens)

    kinds: dict[str, Callable[[], None]] = {
        "one stock FullKV run": stock,
        f"sweep of {len(methods)} configurations": sweep,
        f"{len(methods)} separate runs": separate,
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    sweep()  # first calls are slow
    for _ in range(repeats):
        for kind, run in kinds.items():
            if kind.endswith("separate runs") and seconds[kind]:
                continue  # long: once is enough
            started = time.perf_counter()
            run()
            seconds[kind].append(time.perf_counter() - started)
    base = statistics.median(seconds["one stock FullKV run"])
    table = Table(
        "", "median s", "times stock", "runs", title=f"{tokens} tokens in, {new_tokens} out, {dtype}, {model.device}"
    )
    for kind, each in seconds.items():
        table.add_row(kind, f"{statistics.median(each):.2f}", f"{statistics.median(each) / base:.2f}", str(len(each)))
    Console().print(table)


if __name__ == "__main__":
    main()
