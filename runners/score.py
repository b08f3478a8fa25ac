"""`kvfactory score FOLDER`: stored predictions scored anew, without a model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvfactory.cli import plugin_option

if TYPE_CHECKING:
    from kvfactory.registry import Registry

HELP = """Score stored predictions anew, without their model: those of a run, of KVCache-Factory, or of LongBench.

A run's rows are written anew with the scores that its benchmarks give now; nothing is lost if that is interrupted. Of other
tools' folders the scores are shown, and --output makes a run folder of them.
"""


def score_command(registry: Callable[[], Registry]) -> click.Command:
    """`score`, over the benchmarks of a registry that is made when it is needed."""

    def score(folder: Path, output: Path | None, longbench_e: bool, dry_run: bool) -> None:
        from rich.console import Console

        from kvfactory.foreign import read_results
        from kvfactory.report.terminal import plain_table, print_table, wide_console
        from kvfactory.rescoring import changes, check_output, in_table_order, rescored, save
        from kvfactory.results import CSV, ROWS

        console = wide_console()
        is_run = (folder / ROWS).is_file()
        with Console(stderr=True).status(f"scoring {folder}"):
            run = read_results(folder, longbench_e=longbench_e)
            if output:
                check_output(run, output)
            rows = rescored(run.rows, registry()) if is_run else run.rows
        before, now = (in_table_order(each, folder / CSV) for each in (run.rows, rows))
        print_table(now, console)
        if is_run:
            changed = changes(before, now)
            console.print(f"{changed['changed'].sum()} of {len(rows)} rows have other scores now", soft_wrap=True)
            if len(changed):
                console.print(plain_table("where scores changed", changed), "")
        if dry_run:
            console.print("nothing is written (--dry_run)")
        elif is_run or output:
            arguments = {"output": output, "longbench_e": longbench_e, "command": sys.argv}
            save(run, rows, registry=registry(), output=output, arguments=arguments, console=console)

    return click.Command(
        "score",
        params=[
            click.Argument(["folder"], type=click.Path(path_type=Path)),
            click.Option(
                ["--output"],
                type=click.Path(path_type=Path),
                help="Write a new run folder there and leave FOLDER as it is.  [default: FOLDER, if it is a run]",
            ),
            click.Option(
                ["--longbench_e"],
                is_flag=True,
                help="Group other tools' LongBench predictions by length, in the three bins of LongBench-E.",
            ),
            click.Option(["--dry_run"], is_flag=True, help="Show what would change, and write nothing."),
            plugin_option(),
        ],
        callback=score,
        help=HELP,
    )
