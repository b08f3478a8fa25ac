"""What a page over several runs is made of: each benchmark of each run, under a name of its own.

    sections = sections_of(labelled([load_run("llama/needle"), load_run("qwen/needle")]))
    [section.name for section in sections]      # needle (llama/needle), needle (qwen/needle)

Nothing of two folders is ever averaged or subtracted: they may differ in their model, their settings and their examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from kvfactory.report.intervals import Configuration, baseline
from kvfactory.report.tables import overall, summarise
from kvfactory.rescoring import in_table_order
from kvfactory.results import CSV, Run


@dataclass(frozen=True)
class Section:
    """A benchmark of one run, under the name that tells it from every other on the page."""

    name: str
    folder: Path
    rows: Sequence[Mapping[str, Any]]
    """Their `benchmark` is the name."""

    @cached_property
    def frame(self) -> pd.DataFrame:
        """`summarise` of the rows."""
        return summarise(self.rows)

    @cached_property
    def averages(self) -> pd.DataFrame:
        """`overall` of the rows, or the frame itself where there is one group."""
        return overall(self.rows) if self.groups > 1 else self.frame

    @cached_property
    def groups(self) -> int:
        """How many groups there are."""
        return int(self.frame["group"].nunique())

    @cached_property
    def baseline(self) -> Configuration | None:
        """What differences are to, if there is something."""
        return baseline(self.rows).get(self.name)

    @property
    def has_scores(self) -> bool:
        """Whether any row has the main score."""
        return "score" in self.frame


def labelled(runs: Iterable[Run]) -> dict[str, Run]:
    """Runs by the ends of their paths, each as long as it must be to be no other's; a folder that is given twice is one."""
    paths = {run.path.resolve(): run for run in runs}

    def label(path: Path) -> str:
        ends = (path.parts[-length:] for length in count(1))
        own = next(end for end in ends if sum(other.parts[-len(end) :] == end for other in paths) == 1)
        return "/".join(own)

    return {label(path): run for path, run in paths.items()}


def sections_of(runs: dict[str, Run]) -> list[Section]:
    """Each benchmark of each run; where several runs have one of a name, the names say of which run they are.

    Rows stand in the order of the run's table, if it has one.
    """
    found = {(label, row["benchmark"]): run for label, run in runs.items() for row in run.rows}
    shared = Counter(benchmark for _, benchmark in found)
    sections = []
    for (label, benchmark), run in found.items():
        name = f"{benchmark} ({label})" if shared[benchmark] > 1 else benchmark
        own = [row for row in run.rows if row["benchmark"] == benchmark]
        rows = [{**row, "benchmark": name} for row in in_table_order(own, run.path / CSV)]
        sections.append(Section(name, run.path, rows))
    return sections
