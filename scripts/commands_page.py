"""Write docs/commands.md: the help of every command, as a terminal shows it.

python scripts/commands_page.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import click
from kvfactory_runners.commands import command

from kvfactory.cli import GroupedCommand, run_command
from kvfactory.registry import get_registry
from kvfactory.runner import benchmark_command

PAGE = Path(__file__).parent.parent / "docs" / "commands.md"
HEAD = """# Commands

Every benchmark is a command, `run_longbench.py` and its like, and `kvfactory run NAME` is the same; benchmarks of other
packages and of `--plugin` files are found under `kvfactory run`. This page is what `--help` says, written by
`python scripts/commands_page.py`; what all benchmarks have in common is shown once, [below](#flags-of-every-benchmark).
"""
SCRIPTS = {"needle": "run_needle_in_haystack.py"}
"""Commands whose script is not named after the benchmark."""
WIDTH = 110


def helps() -> Iterator[tuple[str, str]]:
    """Each command as it is typed, and its help; flags that all benchmarks share come once."""
    registry, shared = get_registry(), ""
    for name in sorted(registry.benchmarks):
        whole = benchmark_command(name, registry)
        (own, options), *others = whole.groups.items()
        script = SCRIPTS.get(name, f"run_{name}.py")
        yield script, help_of(GroupedCommand(name, groups={own: options}, help=whole.help), script)
        shared = help_of(GroupedCommand(name, groups=dict(others)), "any of them")
    yield "Flags of every benchmark", shared
    group = command([])
    assert isinstance(group, click.Group)
    yield "kvfactory", help_of(group, "kvfactory")
    for name, each in sorted(group.commands.items()):
        yield f"kvfactory {name}", help_of(each, f"kvfactory {name}")


def help_of(each: click.Command, name: str) -> str:
    with click.Context(each, info_name=name, terminal_width=WIDTH) as context:
        text = each.get_help(context)
    return "\n".join(line.rstrip() for line in text.splitlines())


def page() -> str:
    """The whole page."""
    return HEAD + "".join(f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in helps())


@click.command(help=__doc__)
def write() -> None:
    PAGE.write_text(page(), "utf-8")
    click.echo(f"wrote {PAGE}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(lambda _: write, arguments)


if __name__ == "__main__":
    main()
