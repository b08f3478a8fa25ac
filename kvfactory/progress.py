"""What a long run shows of itself on a terminal: how far it is, how fast, how long it will take, and scores so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .folder_format import budget_name
from .results import Row

MEASURES = {"score": 100.0, "nll": 1.0, "tpot_seconds": 1.0}
"""What is averaged as a run goes on: the first of these that its rows have, and times what."""
PER_MINUTE = 1.0
"""Rows a second below which a rate is told by the minute."""


class RateColumn(ProgressColumn):
    """Rows a second, or a minute where they are few."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f} rows/s" if speed >= PER_MINUTE else f"{60 * speed:.1f} rows/min")


class RunningScores:
    """The mean of each method at each budget so far."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.measure: str | None = None
        self._sums: dict[str, dict[str, tuple[float, int]]] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Count a row in; one without numbers counts nothing."""
        if self.measure is None:
            self.measure = next((name for name in MEASURES if row.get(name) is not None), None)
        value = row.get(self.measure) if self.measure else None
        if self.measure and value is not None:
            cells = self._sums.setdefault(row["method"], {})
            total, count = cells.get(budget := str(budget_name(row)), (0.0, 0))
            cells[budget] = total + MEASURES[self.measure] * value, count + 1

    def means(self) -> dict[str, dict[str, float]]:
        """By method and budget."""
        return {
            method: {budget: total / count for budget, (total, count) in cells.items()}
            for method, cells in self._sums.items()
        }

    def table(self) -> Table:
        """A line a method, a column a budget."""
        means = self.means()
        budgets = list(dict.fromkeys(budget for cells in means.values() for budget in cells))
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column(f"{(self.measure or '').replace('_', ' ')} so far", overflow="ellipsis", no_wrap=True)
        for budget in budgets:
            table.add_column(budget, justify="right")
        form = "{:.1f}" if self.measure == "score" else "{:.3f}"
        for method, cells in means.items():
            table.add_row(Text(method), *(form.format(cells[each]) if each in cells else "" for each in budgets))
        return table


class RunProgress:
    """A bar with the scores so far below it; call it with each row that is written."""

    def __init__(self, title: str, total: int, before: Iterable[Row]) -> None:
        self.scores = RunningScores(before)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, speed_estimate_period=300)  # rows come in bursts
        self._task = self.bar.add_task(title, total=total)

    def __call__(self, row: Row) -> None:
        self.scores.add(row)
        self.bar.advance(self._task)

    def __rich__(self) -> RenderableType:
        return Group(self.bar, self.scores.table())


@contextmanager
def shown(progress: RunProgress, console: Console, quiet: bool) -> Iterator[Any]:
    """The progress on a terminal, redrawn until the `with` ends; nothing where it is quiet or the console is a log."""
    if quiet or not console.is_terminal:
        yield
        return
    with Live(progress, console=console, refresh_per_second=4):
        yield
