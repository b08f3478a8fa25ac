"""A benchmark as a command: its flags beside those of every sweep, and its run from flags to table.

A `Runner` is what a plugin registers; `run_longbench.py` and its like call `run_benchmark` with the name of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from .benchmarks import Benchmark, Example
from .catalogue import catalogue_for
from .cli import GroupedCommand, method_options, part_options, registry_for, run_command, sweep_options
from .described import ONLY_HELP, described
from .errors import UserError, unknown

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .jobs import Job
    from .registry import Registry
    from .results import Row
    from .sweep import Sweep

GROWING = ("method", "max_capacity_prompts")
"""Lists of a run that may differ when it is resumed: rows are told apart by them, so more of them only add rows."""
HARMLESS = ("save_dir", "eval_batch_size", "eval_cache_gib", "record_tokens", "quiet", "plugin")
"""Flags that change where and how fast results come, not what they are."""

Make = Callable[["PreTrainedModel", "PreTrainedTokenizerBase", dict[str, Any]], tuple[Benchmark, dict[str, Any]]]
"""(model, tokenizer, flags) -> the benchmark, and facts about its data for run_meta.json."""
Finish = Callable[["list[Row]", Path, "Console"], None]
"""(all rows, the run folder, where to print) -> what a runner adds once all rows are there."""


def sweep_jobs(registry: Registry, flags: dict[str, Any], settings: dict[str, Any]) -> list[Job]:
    """Every method at every budget, as the flags name them; `settings` are those given for all methods."""
    from .jobs import make_jobs

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
    sweep: type[Sweep] | None = None
    """How examples are run, if not as a `Sweep` itself does it."""
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
    from .chat import has_chat_template

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
        from .running import run_sweep

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

    def make(given: list[str]) -> click.Command:
        registry = cache(partial(registry_for, given))
        known = catalogue_for(given, registry).benchmarks.get(name) if given == ONLY_HELP else None
        return described(name, known, lambda: benchmark_command(name, registry()))

    run_command(make, arguments)
