"""Stored predictions scored anew, without the model that made them: a mended metric needs no GPU.

    run = load_run("results/longbench")
    rows = rescored(run.rows, get_registry())
    print(changes(run.rows, rows))
    save(run, rows, registry=get_registry(), output=None, arguments={}, console=Console())

A benchmark takes part if its `Runner` has a `score`, which is given nothing but the row.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.text import Text

from kvfactory.benchmarks import Example
from kvfactory.environment import environment
from kvfactory.errors import UserError, require
from kvfactory.folder_format import FORMAT, budget_name
from kvfactory.registry import Registry
from kvfactory.report.intervals import KEYS
from kvfactory.report.tables import percent, score_names
from kvfactory.results import CSV, META, ROWS, Row, Run, RunFolder
from kvfactory.runner import Runner, runner_of

RESCORED = "rescored_rows"
"""The argument by which a session that scored stored predictions is told from one that made them."""

LOCK = ".lock"

Score = Callable[[Example, str], dict[str, float]]


class Fields(dict[str, Any]):
    """A row that says which field it lacks."""

    def __missing__(self, name: str) -> Any:
        raise UserError(
            f"{self['example_id']}: its row has no '{name}', by which answers of {self['benchmark']} are scored; "
            "an earlier version did not store it, so the benchmark must be run again"
        )


def rescored(rows: Sequence[Row], registry: Registry) -> list[Row]:
    """The rows with the scores that their predictions have by the benchmarks as they are now; other fields stay.

    Raises UserError for a benchmark that is not installed or has no predictions, and for a row that does not say enough.
    """
    first = {row.get("benchmark", ""): row for row in reversed(rows)}
    scores = {name: _score_of(name, row, registry) for name, row in first.items()}
    return [_rescored(row, scores[row["benchmark"]]) for row in rows]


def registered_name(benchmark: str) -> str:
    """What a benchmark is registered as, by the name that its rows have: what stands before the comma."""
    return benchmark.partition(",")[0]


def _score_of(benchmark: str, row: Row, registry: Registry) -> Score:
    name = registered_name(benchmark)
    try:
        runner: Runner = runner_of(name, registry)
    except UserError as problem:
        raise UserError(f"{problem}; a benchmark that is no package is named with --plugin FILE") from None
    if runner.score is None:
        why = "its Runner has no 'score'" if "prediction" in row else "its rows have no predictions"
        raise UserError(f"benchmark '{name}' cannot be scored anew: {why}")
    return runner.score


def _rescored(row: Row, score: Score) -> Row:
    fields = Fields(row)
    example = Example(fields["example_id"], fields["group"], fields["answers"], max_new_tokens=0, info=fields)
    scores = score(example, fields["prediction"])
    gone = {*score_names([row])} - {*scores}
    return {name: value for name, value in row.items() if name not in gone} | scores | {"scores": list(scores)}


def changes(before: Sequence[Row], after: Sequence[Row]) -> pd.DataFrame:
    """What became of scores: a line for each benchmark, group, method and budget in which any changed.

    `rows` and `changed` count them; each score has a column with its mean before and one with its mean now, 0 to 100.
    """
    names = score_names([*before, *after])
    pairs: dict[tuple[Any, ...], list[tuple[Row, Row]]] = {}
    for old, new in zip(before, after, strict=True):
        pairs.setdefault(tuple((old | {"budget": budget_name(old)})[key] for key in KEYS), []).append((old, new))
    lines = []
    for key, rows in pairs.items():
        changed = sum(any(old.get(name) != new.get(name) for name in names) for old, new in rows)
        if changed:
            means = {
                heading: percent(values)
                for name in names
                for heading, side in ((f"{name} before", 0), (f"{name} now", 1))
                if (values := [pair[side][name] for pair in rows if name in pair[side]])
            }
            lines.append(dict(zip(KEYS, key, strict=True)) | {"rows": len(rows), "changed": changed} | means)
    return pd.DataFrame(lines, columns=None if lines else [*KEYS, "rows", "changed"])


def save(
    run: Run,
    rows: Sequence[Row],
    *,
    registry: Registry,
    output: Path | None,
    arguments: Mapping[str, Any],
    console: Console,
) -> None:
    """Write rows in place of those of a run folder, or into a new folder, with all tables; say where they are.

    Raises UserError where another process works on the run or has changed it, and as `check_output` does.
    """
    folder = run.path if output is None else _new_folder(run, output)
    told = {**arguments, RESCORED: len(rows)}
    where = environment([asdict(plugin) for plugin in registry.plugins])
    with RunFolder.open(folder, run.settings, environment=where, arguments=told) as opened:
        meanwhile = f"{folder}: it was changed while its rows were scored; score it again"
        require(opened.rows == ([] if output else run.rows), meanwhile)
        opened.rewrite(rows)
        ordered = in_table_order(rows, run.path / CSV)
        console.print(Text(f"rows    {folder / ROWS}\ntable   {opened.write_csv(ordered)}"), soft_wrap=True)
        for name in dict.fromkeys(registered_name(row["benchmark"]) for row in rows):
            own = [row for row in ordered if registered_name(row["benchmark"]) == name]
            runner_of(name, registry).finish(own, folder, console)


def in_table_order(rows: Sequence[Row], table: Path) -> list[Row]:
    """Rows in the order of the lines of a `results.csv`, if it is there; rows are stored in the order they ended."""
    lines: list[dict[str, str]] = []
    if table.is_file():
        with table.open(encoding="utf-8", errors="replace", newline="") as file:
            lines = list(csv.DictReader(file))
    places = {tuple(line.get(key) for key in KEYS): place for place, line in enumerate(lines)}
    configurations = {line[2:]: place for line, place in reversed(places.items())}

    def place(row: Row) -> tuple[int, int]:
        configuration = row["method"], str(budget_name(row))
        line = row["benchmark"], row["group"], *configuration
        return configurations.get(configuration, len(lines)), places.get(line, len(lines))

    return sorted(rows, key=place)


def check_output(run: Run, output: Path) -> None:
    """Raise UserError for a folder that is there already, or inside of the run's."""
    inside = run.path.resolve() in output.resolve().parents
    require(not inside, f"--output {output}: it is inside of {run.path}, which is left as it is; name another folder")
    require(not output.exists(), f"--output {output}: it is there already; name a folder that is not")


def _new_folder(run: Run, output: Path) -> Path:
    """A folder with all of the run but its rows, for which it is ready."""
    check_output(run, output)
    try:
        output.mkdir(parents=True)
        if (run.path / ROWS).is_file():
            own = str(run.path)
            shutil.copytree(own, output, ignore=lambda at, _: [ROWS, LOCK] if at == own else [], dirs_exist_ok=True)
        else:
            meta = {"format": FORMAT, "settings": run.settings, "sessions": run.sessions}
            (output / META).write_text(json.dumps(meta, indent=2) + "\n")
    except OSError as problem:
        raise UserError(f"--output {output}: {problem.strerror}") from None
    return output
