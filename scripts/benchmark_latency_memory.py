"""Time and memory of one method on one prompt, as JSON: the command that KVCache-Factory's users know.

python scripts/benchmark_latency_memory.py --method snapkv --max_capacity_prompt 256 --prompt_repeats 100

Its keys are as they were, with what they left out beside them: time to the first token and per token, and the cache's
bytes. Stop tokens stop nothing, so every run generates `--max_new_tokens`. `run_latency.py` compares many methods.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import click

from kvfactory import Engine, UserError, load_model
from kvfactory.benchmarks.latency import Run, measure
from kvfactory.chat import check_window
from kvfactory.cli import GroupedCommand, method_options, part_options, registry_for, run_command
from kvfactory.errors import require
from kvfactory.flag_types import BudgetType, OutputFile, PositiveInt
from kvfactory.inference import for_inference
from kvfactory.jobs import Job, make_jobs
from kvfactory.models import EMBEDDED, prepare_process
from kvfactory.registry import Registry

PROMPT = "The river rises in the hills, passes three mills and a town, and is widest where it meets the sea. "
GIB = 2**30

OPTIONS = [
    click.Option(["--model_path"], help="Hub id, folder or .gguf file.  [default: the embedded model]"),
    click.Option(["--method"], default="fullkv", show_default=True, help="One method; settings behind colons."),
    click.Option(
        ["--max_capacity_prompt"],
        type=BudgetType(),
        default="512",
        show_default=True,
        help="Budget: KV entries kept per head and layer, or a share of the prompt as 10%.",
    ),
    click.Option(
        ["--attn_implementation"], default="sdpa", show_default=True, help="eager, sdpa or flash_attention_2."
    ),
    click.Option(["--dtype"], default="auto", show_default=True, help="auto, float32, float16 or bfloat16."),
    click.Option(["--device"], default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.Option(["--prompt"], help="The prompt's text.  [default: a sentence about a river]"),
    click.Option(["--prompt_file"], type=click.Path(path_type=Path), help="A text file with the prompt instead."),
    click.Option(
        ["--prompt_repeats"], type=PositiveInt(), default=1, show_default=True, help="How often the text is there."
    ),
    click.Option(["--max_new_tokens"], type=click.IntRange(min=2), default=256, show_default=True),
    click.Option(
        ["--warmup"], type=click.IntRange(min=0), default=1, show_default=True, help="Runs that are not counted."
    ),
    click.Option(["--repeat"], type=PositiveInt(), default=3, show_default=True, help="Runs that are."),
    click.Option(["--output_json"], type=OutputFile(".json"), help="Where to write what is printed."),
    click.Option(["--plugin"], multiple=True, help="A Python file with a plugin in it."),
]


def command(registry: Registry) -> click.Command:
    settings = method_options(registry)

    def run(**flags: Any) -> None:
        chosen = {str(each.name): flags.pop(str(each.name)) for each in settings}
        given = {name: value for name, value in chosen.items() if value is not None}
        parts = {kind: flags[kind] for kind in registry.parts}
        (job,) = make_jobs(registry, [flags["method"]], [flags["max_capacity_prompt"]], parts, given)
        text = json.dumps(benchmark(job, flags), indent=2)
        click.echo(text)
        if flags["output_json"]:
            flags["output_json"].write_text(text + "\n", encoding="utf-8")

    groups = {"Run": OPTIONS, "Parts of methods": part_options(registry), "Settings of methods and parts": settings}
    return GroupedCommand("benchmark_latency_memory", groups=groups, callback=run, help=__doc__)


def benchmark(job: Job, flags: dict[str, Any]) -> dict[str, Any]:
    """What is written."""
    text = prompt_text(flags["prompt"], flags["prompt_file"]) * flags["prompt_repeats"]
    prepare_process()
    model, tokenizer = load_model(flags["model_path"], flags["attn_implementation"], flags["dtype"], flags["device"])
    ids, new_tokens = tokenizer.encode(text, verbose=False), flags["max_new_tokens"]
    require(bool(ids), "the prompt is empty; give --prompt or --prompt_file some text")
    check_window(model.config, len(ids) + new_tokens, f"the prompt and --max_new_tokens {new_tokens}")
    engine = Engine(for_inference(model), tokenizer)
    runs = [measure(engine, [ids], job.method, new_tokens) for _ in range(flags["warmup"] + flags["repeat"])]
    size, counted = runs[0].size, [facts(run, len(ids), new_tokens) for run in runs[flags["warmup"] :]]
    if job.budget is not None and not size["evicted"]:
        print(
            f"notice: a prompt of {len(ids)} tokens is within the budget of {job.budget}; nothing was evicted",
            file=sys.stderr,
        )
    peaks = {f"max_{name}": max(run[name] for run in counted) for name in counted[0] if name.startswith("peak_")}
    return {
        "model_path": flags["model_path"] or EMBEDDED,
        "method": job.label,
        "attn_implementation": flags["attn_implementation"],
        "max_capacity_prompt": job.budget,
        "window_size": job.method.settings().get("window_size"),
        "max_new_tokens": new_tokens,
        "settings": job.method.settings(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "runs": counted,
        "mean_tokens_per_sec": fmean(run["tokens_per_sec"] for run in counted),
        "mean_ttft_sec": fmean(run["ttft_sec"] for run in counted),
        "mean_tpot_sec": fmean(run["tpot_sec"] for run in counted),
        **peaks,
        "weight_bytes": model.get_memory_footprint(),
        **{name: value for name, value in size.items() if name != "new_tokens"},
    }


def facts(run: Run, input_tokens: int, new_tokens: int) -> dict[str, Any]:
    """One of the `runs`; tokens per second are those of the whole run, its prompt's time included."""
    memory = run.memory
    names = [name for name in ("peak_bytes", "peak_reserved_bytes") if name in memory]
    peaks = [(memory[name] + memory["allocated_before_bytes"]) / GIB for name in names]  # the weights too, as ever
    return {
        "input_tokens": input_tokens,
        "generated_tokens": run.size["new_tokens"],
        "elapsed_sec": run.seconds["total"],
        "tokens_per_sec": new_tokens / run.seconds["total"],
        "ttft_sec": run.seconds["ttft"],
        "tpot_sec": run.seconds["tpot"],
        "prefill_sec": run.seconds["prefill"],
        "compress_sec": run.seconds["compress"],
        "decode_tokens_per_sec": 1 / run.seconds["tpot"],
        **dict(zip(("peak_allocated_gib", "peak_reserved_gib"), peaks, strict=False)),
    }


def prompt_text(prompt: str | None, file: Path | None) -> str:
    """The text that was given, or the one that is there."""
    require(prompt is None or file is None, "--prompt and --prompt_file are both given; leave one out")
    if file is None:
        return PROMPT if prompt is None else prompt
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file {file}: cannot be read: {error}; give a text file in UTF-8") from None


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(lambda given: command(registry_for(given)), arguments)


if __name__ == "__main__":
    main()
