"""Draw the curves of one or more runs: score by budget, score by memory, latency by prompt length.

python scripts/visualize_curves.py results/needle
python scripts/visualize_curves.py results/llama/needle results/qwen/needle results/latency --output figures

Each benchmark of each run has `budget_NAME` and `memory_NAME`, or `latency_NAME` where times were measured, as PNG and SVG
in plots/. Predictions of KVCache-Factory and LongBench are read too. A figure that a run has too little for is left out, and
a notice says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import click
from matplotlib.figure import Figure

from kvfactory.cli import run_command
from kvfactory.errors import UserError, require
from kvfactory.foreign import read_results
from kvfactory.report.curves import budget_curves, latency_curves, trade_off
from kvfactory.report.figures import free_name, save_figure
from kvfactory.report.sections import Section, labelled, sections_of


def sketches(section: Section) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """What there is to draw of a benchmark: names of files, and how."""
    if any("ttft_seconds" in row or row.get("oom") for row in section.rows):
        yield f"latency_{section.name}", partial(latency_curves, section.rows)
        return
    yield f"budget_{section.name}", partial(budget_curves, section.rows, section.name)
    yield f"memory_{section.name}", partial(trade_off, section.rows, section.name)


@click.command(help=__doc__)
@click.argument("run_folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_FOLDER...")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder to put plots/ in.  [default: the first RUN_FOLDER]"
)
def visualize(run_folders: tuple[Path, ...], output: Path | None) -> None:
    sections = sections_of(labelled(map(read_results, run_folders)))
    figures: dict[str, Figure] = {}
    missing: list[str] = []
    for label, draw in (sketch for section in sections for sketch in sketches(section)):
        try:
            figures[free_name(label, figures)] = draw()
        except UserError as problem:
            missing.append(str(problem))
    require(bool(figures), "; ".join(missing) or f"{run_folders[0]}: no rows yet")
    for notice in dict.fromkeys(missing):
        click.echo(f"notice: {notice}", err=True)
    for name, figure in figures.items():
        for path in save_figure(figure, (output or run_folders[0]) / "plots", name):
            click.echo(path)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(lambda _: visualize, arguments)


if __name__ == "__main__":
    main()
