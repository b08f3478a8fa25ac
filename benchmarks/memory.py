"""How much memory a prefill takes at most, each in a process of its own: stock transformers, methods, and prompts in chunks.

    python benchmarks/memory.py [--tokens 8000] [--method fullkv,snapkv,...]
    python benchmarks/memory.py --long [--tokens 4096,16384,65536] [--chunk 1024] [--method snapkv,h2o]

Prints the peak of resident memory over what was resident before the prefill: on Linux, where a process may start counting
anew. `stock generate` makes one token as transformers 4.44.2 does, `stock base model` leaves the logits out. With --long a
tiny random model reads prompts of several lengths at once and in chunks, and stock is its base model.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import torch
from rounds import common_options, load, prompt_of, show, where

from kvfactory import Engine
from kvfactory.jobs import make_jobs
from kvfactory.models import prepare_process
from kvfactory.registry import get_registry

METHODS = "fullkv,snapkv,pyramidkv,adakv,streamingllm,l2norm,h2o,expected_attention,semantic,learned,kivi,minference"
STOCK = ("stock generate", "stock base model")


def status(name: str) -> int:
    """A size of this process in bytes, as Linux counts it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def long_model() -> Any:
    """A random model that is quick with many tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1 << 17}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def peak_of(job: dict[str, Any]) -> dict[str, Any]:
    """Run one prefill in this process."""
    if job["long"]:
        prepare_process(job["threads"] or 2)
        model = long_model()
        ids = torch.randint(0, 512, (job["tokens"],), generator=torch.Generator().manual_seed(1)).tolist()
    else:
        model, tokenizer = load(job["model_path"], job["dtype"], job["threads"])
        ids = prompt_of(tokenizer, job["tokens"])
    engine, prompt = Engine(model), torch.tensor([ids])
    methods = [] if job["kind"] in STOCK else [make_jobs(get_registry(), [job["kind"]], [job["budget"]])[0].method]
    for short in (True, False):  # first calls load and compile
        some = ids[:600] if short else ids
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        with torch.no_grad():
            if job["kind"] == "stock generate":
                model.generate(prompt[:, : len(some)], max_new_tokens=1, pad_token_id=0, do_sample=False)
            elif job["kind"] == "stock base model":
                model.model(prompt[:, : len(some)], use_cache=True)
            else:
                engine.prefill(some, methods, chunk=job["chunk"])
        peak = status("VmHWM") - before
    return {**job, "peak_bytes": peak, "where": where(model)}


def measured(job: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The least of some runs, each in a process of its own."""
    runs = []
    for _ in range(repeats):
        child = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps(job)], stdout=subprocess.PIPE, check=True
        )
        runs.append(json.loads(child.stdout.splitlines()[-1]))
    return min(runs, key=lambda run: run["peak_bytes"])


@click.command(help=__doc__)
@click.option("--method", default=METHODS, show_default=True)
@click.option("--budget", default=128, show_default=True)
@click.option("--tokens", default="8000", show_default=True, help="Prompt tokens, separated by commas.")
@click.option("--chunk", default=1024, show_default=True, help="Tokens of a chunk.")
@click.option("--long", is_flag=True, help="A tiny random model instead, in chunks and at once.")
@click.option("--child", hidden=True)
@common_options
def main(
    method: str,
    budget: int,
    tokens: str,
    chunk: int,
    long: bool,
    child: str | None,
    repeats: int,
    dtype: str,
    threads: int | None,
    model_path: str | None,
    file: Path | None,
) -> None:
    if child:
        print(json.dumps(peak_of(json.loads(child))))
        return
    job = {"budget": budget, "long": long, "dtype": dtype, "threads": threads, "model_path": model_path}
    lines: list[dict[str, Any]] = []
    stock = STOCK[1:] if long else STOCK  # its generate() makes a mask of all pairs of tokens
    for length in map(int, tokens.split(",")):
        for kind in (*stock, *method.split(",")):
            for size in (None,) if kind in STOCK or not long else (None, chunk):
                lines.append(measured({**job, "kind": kind, "tokens": length, "chunk": size}, repeats))
                lines[-1]["peak_MiB"] = lines[-1]["peak_bytes"] / 2**20
                base = next(each for each in lines if each["kind"] == stock[0] and each["tokens"] == length)
                lines[-1]["of_stock"] = lines[-1]["peak_bytes"] / base["peak_bytes"]
    title = f"peak of a prefill over what was resident before, budget {budget}; {lines[0]['where']}"
    show(title, lines, {"kind": "", "tokens": "", "chunk": "", "peak_MiB": ".0f", "of_stock": ".2f"}, file)


if __name__ == "__main__":
    main()
