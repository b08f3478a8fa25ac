"""A benchmark as a command: its flags beside those of every sweep, and its run from flags to table.

A `Runner` is what a plugin registers; `run_longbench.py` and its like call `run_benchmark` with the name of one.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import models
from .attention import family_of
from .benchmarks import Benchmark, Example
from .budget import Share
from .chat import has_chat_template, stop_ids
from .cli import GroupedCommand, method_options, part_options, registry_for, run_command, sweep_options
from .engine import Engine
from .environment import environment
from .errors import Interrupted, UserError, unknown
from .jobs import Job, make_jobs
from .progress import RunProgress, shown
from .registry import Registry
from .report.terminal import print_table, wide_console
from .results import ROWS, Row, RunFolder
from .sweep import Sweep

GROWING = ("method", "max_capacity_prompts")
"""Lists of a run that may differ when it is resumed: rows are told apart by them, so more of them only add rows."""
HARMLESS = ("save_dir", "eval_batch_size", "eval_cache_gib", "record_tokens", "quiet", "plugin")
"""Flags that change where and how fast results come, not what they are."""

Make = Callable[[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]], tuple[Benchmark, dict[str, Any]]]
"""(model, tokenizer, flags) -> the benchmark, and facts about its data for run_meta.json."""
Finish = Callable[[list[Row], Path, Console], None]
"""(all rows, the run folder, where to print) -> what a runner adds once all rows are there."""


def sweep_jobs(registry: Registry, flags: dict[str, Any], settings: dict[str, Any]) -> list[Job]:
    """Every method at every budget, as the flags name them; `settings` are those given for all methods."""
    parts = {kind: flags[kind] for kind in registry.parts}
    return make_jobs(registry, flags["method"], flags["max_capacity_prompts"], parts, settings)


@dataclass(frozen=True, kw_only=True)
class Runner:
    """What a benchmark needs to be a command."""

    help: str
    """What it measures; the first lines of `--help`."""
    options: Sequence[click.Option]
    """Flags of its own, whose values `make` is given by name."""
    make: Make
    finish: Finish = lambda rows, folder, console: None
    grows: tuple[str, ...] = ()
    """Those of its flags that may differ on resume, since they only say which examples there are."""
    jobs: Callable[[Registry, dict[str, Any], dict[str, Any]], list[Job]] = sweep_jobs
    """(registry, flags, settings of methods that were given) -> what runs; raises UserError for what cannot."""
    sweep: type[Sweep] = Sweep
    """How examples are run."""
    score: Callable[[Example, str], dict[str, float]] | None = None
    """How a prediction of a stored row is scored: an example with the row's `answers`, and the row itself as `info`."""


CHAT_TEMPLATE = click.Option(
    ["--chat_template"],
    type=click.Choice(["auto", "none"]),
    default="auto",
    show_default=True,
    help="auto: prompts are inside the model's chat template, if it has one.",
)
"""For benchmarks whose prompts may be a user's turn; `chat_template` reads it."""


def chat_template(tokenizer: PreTrainedTokenizerBase, flags: dict[str, Any]) -> tuple[bool, dict[str, str]]:
    """Whether prompts go inside a chat template, and what run_meta.json says of that."""
    wrap = flags["chat_template"] == "auto" and has_chat_template(tokenizer)
    return wrap, {"chat_template": "the tokenizer's" if wrap else "none"}


def runner_of(name: str, registry: Registry) -> Runner:
    """What a benchmark registered; raises `UserError` for an unknown name."""
    if name not in registry.benchmarks:
        for plugin in registry.plugins:
            if plugin.error and plugin.name == name:
                raise UserError(f"benchmark '{name}': the plugin of {plugin} fails to import: {plugin.error}")
        raise unknown("benchmark", name, registry.benchmarks)
    runner: Runner = registry.benchmarks[name]
    return runner


def benchmark_command(name: str, registry: Registry) -> GroupedCommand:
    """The command of a registered benchmark.

    Raises `UserError` for an unknown name.
    """
    runner = runner_of(name, registry)
    settings = method_options(registry)

    def run(**flags: Any) -> None:
        chosen = {each.name: flags.pop(each.name) for each in settings if each.name}
        given = {each: value for each, value in chosen.items() if value is not None}
        run_sweep(name, runner, flags, given, registry)

    return GroupedCommand(
        name,
        groups={
            "Benchmark": list(runner.options),
            "Methods and run": sweep_options(),
            "Parts of methods": part_options(registry),
            "Settings of methods and parts": settings,
        },
        callback=run,
        help=runner.help,
    )


def run_benchmark(name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a registered benchmark from its command line, and exit."""
    run_command(lambda given: benchmark_command(name, registry_for(given)), arguments)


def run_sweep(name: str, runner: Runner, flags: dict[str, Any], settings: dict[str, Any], registry: Registry) -> None:
    """Load, run what is missing, write the tables and say where everything is."""
    console = wide_console()
    jobs = runner.jobs(registry, flags, settings)
    for notice in dict.fromkeys(part.notice for job in jobs for part in job.method.parts() if part.notice):
        print(f"notice: {notice}", file=sys.stderr)
    torch.set_num_threads(models.default_threads())
    _seed(flags["seed"])
    model, tokenizer = models.load_model(
        flags["model_path"], flags["attn_implementation"], flags["dtype"], flags["device"]
    )
    family_of(model, registry.families)
    benchmark, facts = runner.make(model, tokenizer, flags)
    arguments = {each: _plain(value) for each, value in flags.items()} | settings
    free = (*GROWING, *HARMLESS, *runner.grows)
    kept = {each: value for each, value in arguments.items() if each not in free}
    model_facts = {"model": flags["model_path"] or models.EMBEDDED, "dtype": str(model.dtype).removeprefix("torch.")}
    where = {**environment([asdict(plugin) for plugin in registry.plugins]), "device_of_model": str(model.device)}
    save_dir = flags["save_dir"] or Path("results") / name / Path(str(model_facts["model"])).name
    with RunFolder.open(
        save_dir, kept | model_facts | facts, environment=where, arguments=arguments | {"command": sys.argv}, free=free
    ) as folder:
        if folder.notice:
            print(f"notice: {folder.notice}", file=sys.stderr)
        sweep = runner.sweep(
            Engine(model, tokenizer),
            tokenizer,
            benchmark,
            jobs,
            folder,
            stop_ids(model, tokenizer),
            rows_at_once=flags["eval_batch_size"],
            bytes_at_once=flags["eval_cache_gib"] * 2**30,
            record_tokens=flags["record_tokens"],
        )
        _run_with_progress(sweep, name, flags["quiet"])
        rows = sweep.rows()
        print_table(rows, console)
        console.print(f"rows    {folder.path / ROWS}\ntable   {folder.write_csv(rows)}", soft_wrap=True)
        runner.finish(rows, folder.path, console)


def _run_with_progress(sweep: Sweep, name: str, quiet: bool) -> None:
    console, folder = Console(stderr=True), sweep.folder
    missing, total, already = sweep.missing(), sweep.count_missing(), len(folder.rows)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > models.default_threads():
        print(
            "notice: other programs use the processors, so this takes longer and times are not comparable",
            file=sys.stderr,
        )
    if already and not quiet:
        console.print(f"{already} rows are in {folder.path} already, {total} to go", soft_wrap=True)
    title = f"{name}: {len(missing)} prompts, {len(sweep.jobs)} configurations"
    progress = RunProgress(title, total, folder.rows)
    try:
        with shown(progress, console, quiet):
            if missing:
                sweep.warm_up()
            sweep.run(progress)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: {len(folder.rows)} of {already + total} rows are in {folder.path}; "
            "the same command goes on from there"
        ) from None


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value) if isinstance(value, Share) else value
