"""Write the tables of docs/results.md that say what each field of a run folder's files means, from the dataclasses.

python scripts/results_page.py
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import click

from kvfactory.cli import run_command
from kvfactory.folder_format import ROW, Meta, Session
from kvfactory.recording import KeptTokens, PromptText

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
TABLES = {"row": ROW, "meta": (Meta,), "session": (Session,), "prompt": (PromptText,), "kept": (KeptTokens,)}
"""What stands between `<!-- fields of NAME -->` and `<!-- end of NAME -->`."""
TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}


def table(parts: Sequence[type]) -> str:
    """A line for each field: its name, its type as JSON has it, its meaning."""
    lines = ["| field | type | meaning |", "| --- | --- | --- |"]
    for part in parts:
        kinds = get_type_hints(part)
        lines += [
            f"| `{each.name}` | {_type(kinds[each.name])} | {each.metadata['meaning']} |" for each in fields(part)
        ]
    return "\n".join(lines)


def _type(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_type, get_args(kind)))
    if get_origin(kind) is list:
        return (
            "list"
            if get_args(kind)[0] not in TYPES
            else f"list of {_type(get_args(kind)[0])}s".replace("texts", "text")
        )
    return "object" if get_origin(kind) is dict else TYPES[kind]


def page(text: str) -> str:
    """The page with its tables written anew."""
    for name, parts in TABLES.items():
        begin, end = f"<!-- fields of {name} -->\n", f"\n<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        text = head + begin + table(parts) + end + rest.partition(end)[2]
    return text


@click.command(help=__doc__)
def write() -> None:
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
    click.echo(f"wrote {PAGE}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(lambda _: write, arguments)


if __name__ == "__main__":
    main()
