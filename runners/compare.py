"""`kvfactory compare A B`: two runs row by row."""

from __future__ import annotations

from pathlib import Path

import click

from kvfactory.cli import plugin_option
from kvfactory.flag_types import OutputFile

HELP = """Compare two runs row by row: what differs in their settings, what became of scores, and which rows changed most.

A and B are run folders, or predictions of KVCache-Factory or LongBench. Rows belong together if benchmark, example, method
and budget are the same. Differences are B less A.
"""


def compare_command() -> click.Command:
    """`compare`."""

    def compare(a: Path, b: Path, rows: int, output: Path | None) -> None:
        from kvfactory_runners import _comparison

        _comparison.compare(a, b, rows, output)

    folder = click.Path(path_type=Path)
    return click.Command(
        "compare",
        params=[
            click.Argument(["a"], type=folder),
            click.Argument(["b"], type=folder),
            click.Option(
                ["--rows"],
                type=click.IntRange(min=0),
                default=20,
                show_default=True,
                help="Rows to show, of those that differ; those that differ most come first.",
            ),
            click.Option(
                ["--output"],
                type=OutputFile(".csv"),
                help="A CSV file for all rows that differ, with whole predictions.",
            ),
            plugin_option(),
        ],
        callback=compare,
        help=HELP,
    )
