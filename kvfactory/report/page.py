"""The report: run folders as one page that needs nothing else, with tables, figures, and examples to look into.

    page = render([load_run("results/needle"), load_run("results/ruler")])
    Path("report.html").write_text(page, encoding="utf-8")

What a model or a data file wrote is text on the page and never markup; the page may load nothing and run nothing but its
own script, which its Content-Security-Policy says by their hashes. Benchmarks are told apart by run, so that nothing of
two folders is averaged or subtracted.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from pandas import DataFrame

from kvfactory.errors import UserError, require
from kvfactory.folder_format import budget_name
from kvfactory.report.curves import budget_curves, latency_curves, trade_off
from kvfactory.report.examples import packed
from kvfactory.report.figures import drawn
from kvfactory.report.heatmaps import heatmap, score_grids
from kvfactory.report.intervals import Configuration
from kvfactory.report.page_tables import PageTable, by_group, every_number, leaderboard
from kvfactory.report.sections import Section, labelled, sections_of
from kvfactory.report.tables import beyond_ability
from kvfactory.results import Run

WIDE_INCHES = 8
"""A figure that is wider has a line of the page to itself."""


@dataclass(frozen=True)
class Picture:
    """A figure as an image, and what it shows in words; a heatmap has the method and budget that it is of."""

    source: str
    alt: str
    is_wide: bool
    method: str = ""
    budget: str = ""


@dataclass(frozen=True)
class Part:
    """What the page shows of a section."""

    section: Section
    notes: Sequence[str]
    pictures: Sequence[Picture]
    heatmaps: Sequence[Picture]
    groups: PageTable | None
    numbers: PageTable


def render(runs: Sequence[Run]) -> str:
    """The page of these runs, a folder that is given twice shown once.

    Raises UserError for a run without rows.
    """
    labels = labelled(runs)
    for run in labels.values():
        require(bool(run.rows), f"{run.path}: no rows yet, so there is nothing to report")
    sections = sections_of(labels)
    parts = [_part(section) for section in sections]
    board = leaderboard(sections)
    style, script = _file("report.css"), _file("examples.js") + _file("report.js")
    templates = Environment(
        loader=PackageLoader("kvfactory.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["breakable"] = breakable
    tables = [board, *(part.numbers for part in parts)]
    return templates.get_template("report.html.j2").render(
        title=f"kvfactory: {', '.join(dict.fromkeys(section.name for section in sections))}",
        style=style,
        script=script,
        policy=_policy(style, script),
        runs=[_about(label, run) for label, run in labels.items()],
        leaderboard=board,
        parts=parts,
        columns={column.heading: column.meaning for table in tables for column in table.columns},
        examples=Markup(packed(sections)),
    )


def breakable(name: str) -> Markup:
    """A name that may be broken into lines between its words."""
    return Markup("<wbr>").join(re.split(r"(?<=[_:,/])", name))


def _part(section: Section) -> Part:
    beyond = beyond_ability(section.frame)
    notes = [f"{group} is beyond this model, its differences are noise: {why}" for group, why in beyond.items()]
    if section.baseline is None:
        notes.append("nothing here keeps everything, so there are no differences to it")
    pictures = _drawn(_figures(section), notes)
    heatmaps = _drawn(_heatmaps(section), notes)
    groups = by_group(section) if section.has_scores and section.groups > 1 else None
    return Part(section, list(dict.fromkeys(notes)), pictures, heatmaps, groups, every_number(section))


Sketch = tuple[Callable[[], Figure], str, str, str]
"""How a figure is drawn, what it shows in words, and the method and budget that it is of, if it is of one."""


def _figures(section: Section) -> Iterator[Sketch]:
    name, rows = section.name, section.rows
    if any("oom" in row for row in rows):  # which latency alone has to say
        words = f"{name}: seconds to the first token and for each after it, by prompt length in tokens"
        yield lambda: latency_curves(rows), f"{words}, a line a configuration", "", ""
        return
    value = "mean score, 0 to 100," if section.has_scores else "perplexity, where less is better,"
    words = f"{name}: {value} by the share of the full cache's bytes that is really held"
    yield lambda: trade_off(rows, name), f"{words}, a point a method and budget, the best joined", "", ""
    words = f"{name}: {value} by budget, a line a method"
    yield lambda: budget_curves(rows, name), f"{words}, with 95 % intervals", "", ""


def _heatmaps(section: Section) -> Iterator[Sketch]:
    rows = [row for row in section.rows if {"context_length", "depth_percent", "score"} <= row.keys()]
    grids = cache(lambda: score_grids(rows))
    for method, budget in dict.fromkeys((row["method"], budget_name(row)) for row in rows):
        title = f"{method}, budget {budget}"
        words = f"{section.name}, {title}: mean score, 0 to 1, by depth in percent and context length in tokens"
        yield partial(_heatmap, grids, (method, budget), title), words, method, str(budget)


def _heatmap(grids: Callable[[], Mapping[Configuration, DataFrame]], of: Configuration, title: str) -> Figure:
    return heatmap(grids()[of], title)


def _drawn(sketches: Iterable[Sketch], notes: list[str]) -> list[Picture]:
    """The figures as pictures; why one cannot be drawn is a note in its place."""
    pictures = []
    for draw, alt, method, budget in sketches:
        try:
            figure = draw()
        except UserError as problem:
            notes.append(str(problem))
            continue
        source = f"data:image/svg+xml;base64,{base64.b64encode(drawn(figure, 'svg')).decode()}"
        pictures.append(Picture(source, alt, figure.get_figwidth() > WIDE_INCHES, method, budget))
    return pictures


def _about(label: str, run: Run) -> dict[str, Any]:
    """What the page says of a run."""
    session = run.sessions[-1] if run.sessions else {}
    environment = session.get("environment", {})
    devices = [str(environment[name]) for name in ("device_of_model", "device") if environment.get(name)]
    begun = str(run.sessions[0].get("started") or "") if run.sessions else ""
    facts = {
        "benchmark": ", ".join(dict.fromkeys(row["benchmark"] for row in run.rows)),
        "rows": f"{len(run.rows):,}",
        "model": run.settings.get("model"),
        "data type": run.settings.get("dtype"),
        "device": ", ".join(devices),
        "kvfactory": environment.get("kvfactory"),
        "begun": begun.replace("T", " ").replace("+00:00", " UTC"),
    }
    settings = {name: json.dumps(value, ensure_ascii=False) for name, value in run.settings.items()}
    told = {name: str(fact or "not recorded") for name, fact in facts.items()}
    return {"label": label, "folder": str(run.path), "facts": told, "settings": settings}


def _file(name: str) -> Markup:
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


def _policy(style: str, script: str) -> str:
    """Nothing is loaded, and this style and this script alone are used."""
    style_hash, script_hash = (
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (style, script)
    )
    return (
        f"default-src 'none'; img-src data:; style-src {style_hash}; script-src {script_hash}; "
        "base-uri 'none'; form-action 'none'"
    )
