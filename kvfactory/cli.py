"""What all commands share: flags, the way errors are told, and a benchmark's run from flags to table.

Flags of methods are made from the dataclass fields of what the registry found, so a plugin's settings are flags too. Their
values stay text until the registry reads them: there is one place that knows what a setting takes.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import models
from .attention import family_of
from .benchmarks import Benchmark
from .budget import Share
from .chat import stop_ids
from .engine import Engine
from .errors import UserError
from .flag_types import BudgetType, CommaList, PositiveInt
from .registry import Registry, get_registry
from .report.tables import TABLE_WIDTH, print_table, summarise
from .results import ROWS, Row, RunFolder, environment
from .settings import settings_of
from .sweep import Sweep, make_jobs

GROWING = ("method", "max_capacity_prompts", "datasets")
"""Lists of a run that may differ when it is resumed: rows are told apart by them, so more of them only add rows."""
HARMLESS = ("save_dir", "eval_batch_size", "eval_cache_gib", "plugin")
"""Flags that change where and how fast results come, not what they are."""


def run_command(make_command: Callable[[list[str]], click.Command], arguments: Sequence[str] | None = None) -> NoReturn:
    """Make a command for its arguments, run it and exit: bad input is one line on stderr and exit code 2, no traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        make_command(arguments).main(arguments, standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.exceptions.NoArgsIsHelpError as help_text:
        click.echo(help_text.format_message())
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; the same command goes on from here", 130)
    except click.ClickException as problem:
        _fail(problem.format_message(), 2)
    except UserError as problem:
        _fail(str(problem), 2)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def registry_for(arguments: Sequence[str]) -> Registry:
    """The registry, with the files that `--plugin` names: they are needed before flags can be known."""
    registry = get_registry()
    values = [value for flag, value in pairwise(arguments) if flag == "--plugin"]
    values += [each.split("=", 1)[1] for each in arguments if each.startswith("--plugin=")]
    for path in dict.fromkeys(values):
        registry.add_file(path)
    return registry


def method_options(registry: Registry) -> list[click.Option]:
    """A flag for every setting that some method or allocator has; the help names the owners and their defaults."""
    owners: dict[str, dict[str, Any]] = {}
    for name in registry.methods:
        for setting in registry.own_settings(name).values():
            owners.setdefault(setting.name, {})[name] = setting.default
    for kind, shelf in registry.parts.items():
        for name, part in shelf.items():
            for setting in settings_of(part).values():
                owners.setdefault(setting.name, {})[f"{kind} {name}"] = setting.default
    evicting = sum(registry.has_budget(name) for name in registry.methods)
    return [
        click.Option([f"--{setting}"], default=None, help=_help(setting, defaults, evicting), metavar="VALUE")
        for setting, defaults in owners.items()
    ]


COMMON_HELP = {
    "kv_cache_granularity": "Store once per KV head, or once per query head: kv_head, query_head.",
    "decode_budget": "Entries a head holds while decoding: a number, same as after the prompt, or none for no limit.",
    "decode_interval": "Entries that an eviction while decoding frees: a number, or a percentage of those held.",
    "gqa_score_agg": "How query heads that share a KV head vote: mean, max, sum.",
}
"""What settings mean that most methods have."""


def _help(setting: str, defaults: dict[str, Any], evicting: int) -> str:
    by_default: dict[str, list[str]] = {}
    for name, default in defaults.items():
        by_default.setdefault(str(default), []).append(name)
    if len(defaults) == evicting:  # every method that evicts: name those alone that differ from most
        most = max(by_default, key=lambda default: len(by_default[default]))
        by_default[most] = ["all others"] if len(by_default) > 1 else ["all that evict"]
    owners = "; ".join(f"{', '.join(names)} [default: {default}]" for default, names in by_default.items())
    return f"{COMMON_HELP[setting]}  {owners}" if setting in COMMON_HELP else owners


PART_HELP = {
    "allocator": "How budgets are split, in place of each method's own way",
    "merge": "What evicted entries leave in those that stay, or none for nothing",
    "quant_method": "How kept entries are stored in few bits, or none for as they are",
    "key_pruning": "Which channels of kept keys are stored, or none for all",
    "retrieval": "Which of the kept entries a step reads, or none for all",
}


def part_options(registry: Registry) -> list[click.Option]:
    """A flag for each kind of part."""
    return [
        click.Option([f"--{kind}"], metavar="NAME", help=f"{PART_HELP[kind]}: {', '.join(shelf)}.")
        for kind, shelf in registry.parts.items()
    ]


def sweep_options() -> list[click.Option]:
    """Flags of every command that runs methods over a benchmark."""
    texts = CommaList(click.STRING)
    return [
        click.Option(
            ["--method"], type=texts, required=True, help="Methods, separated by commas; settings behind colons."
        ),
        click.Option(
            ["--max_capacity_prompts"],
            type=CommaList(BudgetType()),
            default="512",
            show_default=True,
            help="Budgets: KV entries kept per head and layer, or shares of the prompt as 10%, separated by commas.",
        ),
        click.Option(["--model_path"], help="Hub id, folder or .gguf file.  [default: the embedded model]"),
        click.Option(
            ["--attn_implementation"], default="sdpa", show_default=True, help="eager, sdpa or flash_attention_2."
        ),
        click.Option(["--dtype"], default="auto", show_default=True, help="auto, float32, float16 or bfloat16."),
        click.Option(["--device"], default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        click.Option(
            ["--eval_batch_size"], type=PositiveInt(), default=64, show_default=True, help="Sequences decoded together."
        ),
        click.Option(
            ["--eval_cache_gib"],
            type=click.FloatRange(min=0, min_open=True),
            default=4.0,
            show_default=True,
            help="No example joins a decode batch whose caches hold this much.",
        ),
        click.Option(["--seed"], type=int, default=42, show_default=True),
        click.Option(["--save_dir"], type=click.Path(path_type=Path), help="The run folder."),
        click.Option(["--plugin"], multiple=True, help="A Python file with a plugin in it."),
    ]


Make = Callable[[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]], tuple[Benchmark, dict[str, Any]]]
"""(model, tokenizer, flags) -> the benchmark, and facts about its data for run_meta.json."""
Finish = Callable[[list[Row], Path, Console], None]
"""(all rows, the run folder, where to print) -> what a runner adds once all rows are there."""


def sweep_command(
    name: str, help: str, options: list[click.Option], make: Make, finish: Finish, registry: Registry
) -> click.Command:
    """The command of one benchmark: its own options beside those of every sweep and every method."""
    settings = method_options(registry)
    setting_names = [each.name for each in settings]

    def run(**flags: Any) -> None:
        chosen = {each: flags.pop(each) for each in setting_names if each}
        given = {each: value for each, value in chosen.items() if value is not None}
        run_sweep(name, flags, given, make, finish, registry)

    flags: list[click.Parameter] = [*sweep_options(), *part_options(registry), *options, *settings]
    return click.Command(name, params=flags, callback=run, help=help)


def run_sweep(
    name: str, flags: dict[str, Any], settings: dict[str, Any], make: Make, finish: Finish, registry: Registry
) -> None:
    """Load, run what is missing, write the tables and say where everything is."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, TABLE_WIDTH)
    parts = {kind: flags[kind] for kind in registry.parts}
    jobs = make_jobs(registry, flags["method"], flags["max_capacity_prompts"], parts, settings)
    for notice in dict.fromkeys(part.notice for job in jobs for part in job.method.parts() if part.notice):
        print(f"notice: {notice}", file=sys.stderr)
    torch.set_num_threads(models.default_threads())
    _seed(flags["seed"])
    model, tokenizer = models.load_model(
        flags["model_path"], flags["attn_implementation"], flags["dtype"], flags["device"]
    )
    family_of(model, registry.families)
    benchmark, facts = make(model, tokenizer, flags)
    arguments = {each: _plain(value) for each, value in flags.items()} | settings
    kept = {each: value for each, value in arguments.items() if each not in (*GROWING, *HARMLESS)}
    model_facts = {"model": flags["model_path"] or models.EMBEDDED, "dtype": str(model.dtype).removeprefix("torch.")}
    where = {**environment([asdict(plugin) for plugin in registry.plugins]), "device_of_model": str(model.device)}
    save_dir = flags["save_dir"] or Path("results") / name / Path(str(model_facts["model"])).name
    with RunFolder.open(
        save_dir, kept | model_facts | facts, environment=where, arguments=arguments | {"command": sys.argv}
    ) as folder:
        if folder.notice:
            print(f"notice: {folder.notice}", file=sys.stderr)
        stop, limits = stop_ids(model, tokenizer), (flags["eval_batch_size"], flags["eval_cache_gib"] * 2**30)
        sweep = Sweep(Engine(model, tokenizer), tokenizer, benchmark, jobs, folder, stop, *limits)
        _run_with_progress(sweep, name)
        rows = sweep.rows()
        print_table(summarise(rows), console)
        console.print(f"rows    {folder.path / ROWS}\ntable   {folder.write_csv(rows)}", soft_wrap=True)
        finish(rows, folder.path, console)


def _run_with_progress(sweep: Sweep, name: str) -> None:
    missing = sweep.missing()
    total = sum(len(jobs) for _, jobs in missing)
    already = len(sweep.folder.rows)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > models.default_threads():
        print(
            "notice: other programs use the processors, so this takes longer and times are not comparable",
            file=sys.stderr,
        )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        if already:
            progress.console.print(f"{already} rows are in {sweep.folder.path} already, {total} to go", soft_wrap=True)
        if missing:
            sweep.warm_up()
        task = progress.add_task(f"{name}: {len(missing)} prompts, {len(sweep.jobs)} configurations", total=total)
        sweep.run(lambda row: progress.advance(task))


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value) if isinstance(value, Share) else value
