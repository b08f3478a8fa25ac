"""How long commands take to say something: lists and help, each in a process of its own, commands taking turns.

    python benchmarks/startup.py [--repeats 5] [--json FILE]

Prints for each command the seconds with an empty cache folder, once, and with the catalogue of the call before, the
median and the range of all rounds. Python itself, `import kvfactory` and `import torch` stand beside them for scale.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from rich.console import Console
from rich.table import Table

SCRIPTS = Path(sysconfig.get_path("scripts"))
COMMANDS = [
    "kvfactory methods",
    "kvfactory --help",
    "kvfactory run --help",
    "kvfactory run longbench --help",
    "run_longbench.py --help",
    "run_needle_in_haystack.py --help",
    "run_perplexity.py --help",
    "kvfactory report --help",
    "kvfactory score --help",
    "kvfactory compare --help",
    "kvfactory train-learned --help",
]
IMPORTS = ["pass", "import kvfactory", "import torch"]
"""What has no cache to be cold."""


def line_of(command: str) -> list[str]:
    """The command as a process is started with it."""
    if command in IMPORTS:
        return [sys.executable, "-c", command]
    script, *arguments = command.split()
    return [str(SCRIPTS / script), *arguments]


def seconds(command: str, cache: Path) -> float:
    """Wall seconds of one process, from its start to its end."""
    started = time.perf_counter()
    subprocess.run(line_of(command), env=os.environ | {"KVFACTORY_CACHE": str(cache)}, capture_output=True, check=True)
    return time.perf_counter() - started


def measure(commands: list[str], repeats: int) -> list[dict[str, object]]:
    """One line a command."""
    cold: dict[str, float | None] = dict.fromkeys(IMPORTS)
    warm: dict[str, list[float]] = {command: [] for command in [*IMPORTS, *commands]}
    with TemporaryDirectory() as folder:
        for number, command in enumerate(commands):
            cold[command] = seconds(command, Path(folder, str(number)))
        for repeat in range(repeats + 1):
            for command in warm if repeat % 2 else reversed(warm):
                taken = seconds(command, Path(folder, "shared"))
                if repeat:  # the first round makes the catalogue, and reads files that are in no memory yet
                    warm[command].append(taken)
    return [
        {
            "command": command,
            "cold_seconds": cold[command],
            "median_seconds": statistics.median(each),
            "least_seconds": min(each),
            "most_seconds": max(each),
        }
        for command, each in warm.items()
    ]


@click.command(help=__doc__)
@click.option("--repeats", default=5, show_default=True, help="Rounds that count.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where to write the numbers too.")
def main(repeats: int, file: Path | None) -> None:
    lines = measure(COMMANDS, repeats)
    title = f"seconds, {repeats} rounds, Python {sys.version.split()[0]}, {os.cpu_count()} cores"
    table = Table("command", title=title)
    for heading in ("cold", "warm", "least", "most"):
        table.add_column(heading, justify="right")
    for command, *figures in (line.values() for line in lines):
        table.add_row(str(command), *("-" if each is None else f"{each:.2f}" for each in figures))
    Console(width=100).print(table)
    if file:
        file.write_text(json.dumps({"title": title, "lines": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
