"""What all commands share: flags, and the way errors are told.

Flags of methods are made from the dataclass fields of what the registry found, so a plugin's settings are flags too. Their
values stay text until the registry reads them: there is one place that knows what a setting takes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from .errors import Interrupted, UserError
from .flag_types import BudgetType, CommaList, PositiveInt
from .installed import get_registry

if TYPE_CHECKING:
    from .registry import Registry


SPINS = "10000"
"""How often a thread of torch looks whether the others are done before it sleeps (GNU OpenMP, read when torch is imported).

Its own default keeps a core busy for milliseconds: where another program wants that core a decode step takes ten times as
long and more. With this one it takes four times as long, and on an idle machine as long as ever.
"""


def run_command(make_command: Callable[[list[str]], click.Command], arguments: Sequence[str] | None = None) -> NoReturn:
    """Make a command for its arguments, run it and exit: bad input is one line on stderr and exit code 2, no traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        make_command(arguments).main(arguments, standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.exceptions.NoArgsIsHelpError as help_text:
        click.echo(help_text.format_message())
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; the same command can be given again", 130)
    except Interrupted as stop:
        _fail(str(stop), 130)
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
    for path in plugin_files(arguments):
        registry.add_file(path)
    return registry


def plugin_files(arguments: Sequence[str]) -> list[str]:
    """The files that `--plugin` names."""
    values = [value for flag, value in pairwise(arguments) if flag == "--plugin"]
    values += [each.split("=", 1)[1] for each in arguments if each.startswith("--plugin=")]
    return list(dict.fromkeys(values))


def method_options(registry: Registry) -> list[click.Option]:
    """A flag for every setting that some method or allocator has; the help names the owners and their defaults."""
    from .settings import settings_of

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


def plugin_option() -> click.Option:
    """Taken by commands that are no benchmark; `registry_for` has read it before they are made."""
    return click.Option(["--plugin"], multiple=True, expose_value=False, help="A Python file with a plugin in it.")


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
        click.Option(
            ["--prefill_chunk"],
            type=PositiveInt(),
            help="Read longer prompts in chunks of so many tokens and evict after each: memory does not grow with prompts, "
            "and results differ from those of prompts that are read at once.",
        ),
        click.Option(
            ["--record_tokens"],
            type=click.IntRange(min=0),
            default=1024,
            show_default=True,
            help="Tokens of each prompt that are recorded for reports, with what was kept of them; 0 for none.",
        ),
        click.Option(["--seed"], type=int, default=42, show_default=True),
        click.Option(["--save_dir"], type=click.Path(path_type=Path), help="The run folder."),
        click.Option(["--quiet"], is_flag=True, help="No progress on a terminal; elsewhere there is none anyway."),
        click.Option(["--plugin"], multiple=True, help="A Python file with a plugin in it."),
    ]


class GroupedCommand(click.Command):
    """A command whose help lists its options under headings."""

    def __init__(self, name: str, *, groups: dict[str, list[click.Option]], **arguments: Any) -> None:
        self.groups = groups
        options: list[click.Parameter] = [each for group in groups.values() for each in group]
        super().__init__(name, params=options, context_settings={"max_content_width": 110}, **arguments)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        listed = {id(each) for group in self.groups.values() for each in group}
        others = [each for each in self.get_params(ctx) if id(each) not in listed]
        sections: list[tuple[str, Sequence[click.Parameter]]] = [*self.groups.items(), ("Help", others)]
        for heading, group in sections:
            lines = [line for each in group if (line := each.get_help_record(ctx))]
            if lines:
                with formatter.section(heading):
                    formatter.write_dl(lines)
