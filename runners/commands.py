"""`kvfactory methods`: what is installed, from which package, with which settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvfactory.cli import registry_for, run_command
from kvfactory.registry import Registry


def methods_command(registry: Registry) -> click.Command:
    def show() -> None:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("method", "package", "version", "allocator", "settings and their defaults"):
            table.add_column(heading, overflow="fold", no_wrap=heading != "settings and their defaults")
        for name, entry in sorted(registry.methods.items()):
            settings = "  ".join(f"{each.name}={each.default}" for each in registry.settings(name).values())
            allocator = entry.allocator if registry.has_budget(name) else "-"
            table.add_row(name, Text(entry.plugin.distribution), entry.plugin.version, allocator, Text(settings))
        console = Console()
        console.print(table)
        broken = [plugin for plugin in registry.plugins if plugin.error]
        for plugin in broken:
            console.print(Text(f"\n{plugin.name} of {plugin} fails to import: {plugin.error}"), style="red")

    plugin = click.Option(["--plugin"], multiple=True, expose_value=False, help="A Python file with a plugin in it.")
    return click.Command("methods", params=[plugin], callback=show, help="List the methods that were found.")


def command(arguments: list[str]) -> click.Command:
    return click.Group("kvfactory", commands=[methods_command(registry_for(arguments))], help=__doc__)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(command, arguments)


if __name__ == "__main__":
    main()
