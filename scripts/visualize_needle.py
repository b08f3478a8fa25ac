"""Draw the heatmaps of a needle-in-a-haystack run again, from the rows its run folder holds.

python scripts/visualize_needle.py results/needle
python scripts/visualize_needle.py results/needle --score rougeL --output figures
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from kvfactory.cli import run_command
from kvfactory.report.heatmaps import save_heatmaps
from kvfactory.results import load_rows


@click.command(help="Draw one heatmap per method and budget of RUN_FOLDER, and one figure of all, as PNG and SVG.")
@click.argument("run_folder", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Folder to put plots/ in.  [default: RUN_FOLDER]")
@click.option("--score", default="score", show_default=True, help="The field of the rows to draw, 0..1.")
def visualize(run_folder: Path, output: Path | None, score: str) -> None:
    for path in save_heatmaps(load_rows(run_folder), output or run_folder, score):
        click.echo(path)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    run_command(lambda _: visualize, arguments)


if __name__ == "__main__":
    main()
