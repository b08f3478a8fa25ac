"""A command's help as data, and a command that is made when it is more than its help that is asked for.

`help_of(command)` is data, which may be kept in a file. `described(name, known, make)` shows it, and for anything else is
the command that `make` makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import click

ONLY_HELP = ["--help"]
"""The arguments that ask for a help and nothing else."""
WIDTHS = (60, 200)
"""Columns at which a help that is made of data must be the command's own."""


@dataclass(frozen=True)
class CommandHelp:
    """What a command says of itself, before it is cut into lines."""

    help: str | None
    short_help: str | None
    epilog: str | None
    hidden: bool
    deprecated: bool | str
    settings: dict[str, Any]
    """The context settings, which may say how wide it gets."""
    usage: list[str]
    """What stands behind the name in its usage."""
    sections: list[tuple[str, list[tuple[str, str]]]] | None
    """Headings, and below each flags or the like with what they mean; None where a help is more than that."""


def help_of(command: click.Command) -> CommandHelp:
    """The help as data; without sections where that does not make the command's own, which has its own way to show it."""
    context, taken = click.Context(command), _Sections()
    command.format_help(context, taken)
    known = CommandHelp(
        command.help,
        command.short_help,
        command.epilog,
        command.hidden,
        command.deprecated,
        {name: value for name, value in command.context_settings.items() if name == "max_content_width"},
        command.collect_usage_pieces(context),
        taken.found,
    )
    shown = Described(str(command.name), known, lambda: command)
    same = known.settings == command.context_settings and _asked_by(command) == _asked_by(shown)
    return known if same and _texts(command) == _texts(shown) else replace(known, sections=None)


def _asked_by(command: click.Command) -> list[str]:
    option = command.get_help_option(click.Context(command))
    return option.opts if option else []


def _texts(command: click.Command) -> list[str]:
    return [command.get_help(click.Context(command, info_name="name", terminal_width=width)) for width in WIDTHS]


def described(name: str, known: CommandHelp | None, make: Callable[[], click.Command]) -> click.Command:
    """A command that is made when something else is asked for than its help, or now where that is not known."""
    return Described(name, known, make) if known else make()


class Described(click.Command):
    """A command of which the help is known."""

    def __init__(self, name: str, known: CommandHelp, make: Callable[[], click.Command]) -> None:
        super().__init__(
            name,
            context_settings=dict(known.settings),
            help=known.help,
            short_help=known.short_help,
            epilog=known.epilog,
            hidden=known.hidden,
            deprecated=known.deprecated,
        )
        self.known = known
        self.make = make

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args == ONLY_HELP and self.known.sections is not None:
            return super().make_context(info_name, args, parent, **extra)
        return self.make().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return ctx.command.invoke(ctx)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return self.known.usage

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.known.sections is None:
            return self.make().format_help(ctx, formatter)
        return super().format_help(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, lines in self.known.sections or ():
            with formatter.section(heading):
                formatter.write_dl(lines)


class _Sections(click.HelpFormatter):
    """Takes down the sections of a help, and lets the rest go."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[tuple[str, str]]]] = []

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        self.found.append((name, []))
        yield

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        self.found[-1][1].extend(rows)
