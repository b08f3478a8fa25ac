"""Commands beside the benchmarks: `kvfactory methods` lists what is installed, and plugins bring commands of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import click
from kvfactory_runners.compare import compare_command
from kvfactory_runners.report import report_command
from kvfactory_runners.score import score_command
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from kvfactory.cli import plugin_option, registry_for, run_command
from kvfactory.errors import require
from kvfactory.registry import Registry
from kvfactory.report.methods import first_line
from kvfactory.runner import benchmark_command


def methods_command(registry: Registry) -> click.Command:
    def show() -> None:
        console = Console()
        for name, entry in sorted(registry.methods.items()):
            split = "".join(f", {kind} {part}" for kind, part in registry.parts_of(name).items())
            console.print(Text.assemble((name, "bold"), f"  {entry.plugin}{split}"))
            console.print(Padding(Text(first_line(registry, name)[0]), (0, 0, 0, 4)))
            settings = "  ".join(f"{each.name}={each.default}" for each in registry.settings(name).values())
            if settings:
                console.print(Padding(Text(settings), (0, 0, 0, 4)))
        for plugin in registry.plugins:
            if plugin.error:
                console.print(Text(f"{plugin.name} of {plugin} fails to import: {plugin.error}"), style="red")

    return click.Command("methods", params=[plugin_option()], callback=show, help="List the methods that were found.")


class Benchmarks(click.Group):
    """Every registered benchmark as a command, made when it is asked for."""

    def __init__(self, registry: Registry) -> None:
        super().__init__("run", params=[plugin_option()], help="Run a benchmark: `kvfactory run NAME --help`.")
        self.registry = registry

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.registry.benchmarks)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        return benchmark_command(cmd_name, self.registry)


def command(arguments: list[str]) -> click.Command:
    registry = registry_for(arguments)
    commands = (
        methods_command(registry),
        Benchmarks(registry),
        report_command(),
        score_command(registry),
        compare_command(),
    )
    own = {str(each.name): each for each in commands}
    for name in own:
        taken = f"a plugin registers the command '{name}', which kvfactory has itself; remove it"
        require(name not in registry.commands, taken)
    return click.Group("kvfactory", commands=own | registry.commands, params=[plugin_option()], help=__doc__)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(command, arguments)


if __name__ == "__main__":
    main()
