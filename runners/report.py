"""`kvfactory report FOLDER...`: runs as one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from kvfactory.flag_types import OutputFile

HELP = """One HTML page of one or more runs: tables with intervals, figures, and examples with what was kept of them.

The page needs no other file and no network, and prints well. Benchmarks that several folders have are told apart by the
folders' names. Predictions of KVCache-Factory and LongBench are read too, as far as they go.
"""


def report_command() -> click.Command:
    """`report`, over folders of results."""

    def report(folders: tuple[Path, ...], output: Path) -> None:
        from kvfactory.foreign import read_results
        from kvfactory.report.page import render

        page = render([read_results(folder) for folder in folders])
        output.write_text(page, encoding="utf-8", errors="replace", newline="\n")
        click.echo(f"report  {output}")

    return click.Command(
        "report",
        params=[
            click.Argument(["folders"], nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FOLDER..."),
            click.Option(
                ["-o", "--output"],
                type=OutputFile(".html"),
                default="report.html",
                show_default=True,
                help="The page.",
            ),
        ],
        callback=report,
        help=HELP,
    )
