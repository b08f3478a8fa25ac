"""Commands beside the benchmarks: `kvfactory methods` lists what is installed, and plugins bring commands of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, NoReturn

import click
from kvfactory_runners.compare import compare_command
from kvfactory_runners.report import report_command
from kvfactory_runners.score import score_command

from kvfactory.catalogue import Catalogue, catalogue_for
from kvfactory.cli import plugin_option, registry_for, run_command
from kvfactory.described import described
from kvfactory.errors import require
from kvfactory.runner import benchmark_command

if TYPE_CHECKING:
    from kvfactory.registry import Registry


def methods_command(catalogue: Catalogue) -> click.Command:
    def show() -> None:
        from rich.console import Console
        from rich.padding import Padding
        from rich.text import Text

        console = Console()
        for method in catalogue.methods:
            split = "".join(f", {kind} {part}" for kind, part in method.parts.items())
            console.print(Text.assemble((method.name, "bold"), f"  {method.origin}{split}"))
            console.print(Padding(Text(method.does), (0, 0, 0, 4)))
            settings = "  ".join(f"{name}={default}" for name, default in method.settings.items())
            if settings:
                console.print(Padding(Text(settings), (0, 0, 0, 4)))
        for failure in catalogue.failures:
            console.print(Text(failure), style="red")

    return click.Command("methods", params=[plugin_option()], callback=show, help="List the methods that were found.")


class Benchmarks(click.Group):
    """Every registered benchmark as a command, made when it is asked for."""

    def __init__(self, catalogue: Catalogue, registry: Callable[[], Registry]) -> None:
        super().__init__("run", params=[plugin_option()], help="Run a benchmark: `kvfactory run NAME --help`.")
        self.catalogue = catalogue
        self.registry = registry

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.catalogue.benchmarks)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        known = self.catalogue.benchmarks.get(cmd_name)
        return described(cmd_name, known, lambda: benchmark_command(cmd_name, self.registry()))


def command(arguments: list[str]) -> click.Command:
    registry = cache(partial(registry_for, arguments))
    catalogue = catalogue_for(arguments, registry)
    commands = (
        methods_command(catalogue),
        Benchmarks(catalogue, registry),
        report_command(),
        score_command(registry),
        compare_command(),
    )
    own = {str(each.name): each for each in commands}
    for name in own:
        taken = f"a plugin registers the command '{name}', which kvfactory has itself; remove it"
        require(name not in catalogue.commands, taken)

    def brought(name: str) -> click.Command:
        return described(name, catalogue.commands[name], lambda: registry().commands[name])

    commands_of_plugins = {name: brought(name) for name in catalogue.commands}
    return click.Group("kvfactory", commands=own | commands_of_plugins, params=[plugin_option()], help=__doc__)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(command, arguments)


if __name__ == "__main__":
    main()
