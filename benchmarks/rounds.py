"""What the scripts here share: things that take turns, and the table and JSON of what came out."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfactory import Engine, load_model
from kvfactory.clock import now
from kvfactory.inference import for_inference
from kvfactory.models import prepare_process

COMMON = [
    click.option("--repeats", default=5, show_default=True, help="Rounds that count; one more before them does not."),
    click.option("--dtype", default="bfloat16", show_default=True),
    click.option("--threads", type=int, help="Of torch on a CPU.  [default: one a core]"),
    click.option("--model_path", help="Hub id, folder or .gguf file.  [default: the embedded model]"),
    click.option("--json", "file", type=click.Path(path_type=Path), help="Where to write the numbers too."),
]


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Flags of every script."""
    for option in reversed(COMMON):
        command = option(command)
    return command


def load(model_path: str | None, dtype: str, threads: int | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on as many threads."""
    prepare_process(threads)
    return load_model(model_path, dtype=dtype)


def engine_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """The engine as commands have it, with a copy of the model; the model itself stays as stock transformers has it."""
    return Engine(for_inference(deepcopy(model)), tokenizer)


def prompt_of(tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[int]:
    """So many token ids of technical prose that comes with Python."""
    text = " ".join(topics[name] for name in sorted(topics))
    ids = tokenizer.encode(text)
    return (ids * (tokens // len(ids) + 1))[:tokens]


def take_turns(
    kinds: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, uncounted: int = 1
) -> dict[str, list[float]]:
    """Seconds of each kind: rounds in which all run, forwards and backwards, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(repeats + uncounted):
        for name in list(kinds)[:: -1 if turn % 2 else 1]:
            started = now(device)
            kinds[name]()
            if turn >= uncounted:
                seconds[name].append(now(device) - started)
    return seconds


def lines_of(seconds: Mapping[str, Sequence[float]], base: str) -> list[dict[str, Any]]:
    """A line a kind: its median, its quickest, and its median by that of the base."""
    of_base = statistics.median(seconds[base])
    return [
        {
            "kind": name,
            "median_seconds": statistics.median(each),
            "least_seconds": min(each),
            "ratio": statistics.median(each) / of_base,
            "runs": len(each),
        }
        for name, each in seconds.items()
    ]


def where(model: PreTrainedModel) -> str:
    """On what it ran, in a few words."""
    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else _processor()
    threads = "" if model.device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{str(model.dtype).removeprefix('torch.')}, {name}{threads}, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def show(title: str, lines: Sequence[Mapping[str, Any]], formats: Mapping[str, str], file: Path | None) -> None:
    """Print a table, a column a format, and write all of the lines as JSON if there is a file for it."""
    first = next(iter(formats))
    table = Table()
    for name in formats:
        table.add_column(name.replace("_", " "), justify="left" if name == first else "right")
    for line in lines:
        table.add_row(*(f"{line[name]:{how}}" if line.get(name) is not None else "" for name, how in formats.items()))
    console = Console(width=110)
    console.print(title, soft_wrap=True)
    console.print(table)
    if file:
        file.write_text(json.dumps({"title": title, "lines": list(lines)}, indent=1) + "\n", encoding="utf-8")
