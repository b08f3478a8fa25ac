"""The tables of the report page: columns over the lines of `summarise`, in which every cell knows what it sorts by.

    table = leaderboard(sections)
    [cell.text for cell in table.lines[0].cells]

Columns that have nothing to say in any line are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import pandas as pd

from kvfactory.folder_format import FULL, budget_number
from kvfactory.report.intervals import distinguishable
from kvfactory.report.sections import Section
from kvfactory.report.tables import MEASURES, beyond_ability, score_names, wide

SHARES_BEHIND = 1e9
"""What makes shares sort behind any number of entries."""

Record = Mapping[Any, Any]
"""A line of a frame; `baseline` is the method and budget that its differences are to, `averaged` says of what it is."""

MARKS = {
    "baseline": "keeps everything; differences are to this",
    "≈": "no clear difference: the 95 % interval of the difference contains zero",
    "never": "nothing was evicted, since every prompt was shorter than the budget; the line says nothing of compression",
    "nominal": "evicted entries are only masked and still held, so no memory is saved",
    "beyond model": "where even keeping everything scores this little, differences are noise; see the benchmark's notes",
    "incomplete": "some groups have no rows yet, and an average over fewer compares with nothing",
    "oom": "out of memory: it did not suffice for this",
}
"""What may stand beside numbers, and what it means."""

MEASURED = {
    "perplexity": "how many tokens the model wavers between, on average; less is better",
    "nll": "mean negative log-likelihood of a token, in nats; less is better",
    "scored_tokens": "tokens that were scored, all together",
    "ttft_seconds": "time to the first token, in seconds",
    "tpot_seconds": "time of each token after the first, in seconds",
    "tokens_per_second": "tokens a second while decoding, all rows of the batch together",
    "peak_bytes": "most GPU memory allocated beside the weights, in MiB",
    "largest_batch": "sequences that fit into the memory that was asked about",
}
"""What the fields of `MEASURES` mean."""
SPENT = {
    "prefill_seconds": ("prefill s", "seconds of the pass over the prompt, which methods share"),
    "compress_seconds": ("compress s", "seconds of the method's own, as if it had run alone"),
    "decode_seconds": ("decode s", "seconds of decoding, of shared steps the example's share"),
}
"""Headings and meanings of the seconds of a row."""


@dataclass(frozen=True)
class Cell:
    """Text, the number that it sorts by, None for none, and names of its `MARKS`."""

    text: str
    value: float | None = None
    marks: tuple[str, ...] = ()

    @property
    def sorts_by(self) -> str:
        """The number as a script reads it."""
        return "" if self.value is None else repr(self.value).replace("inf", "Infinity")


@dataclass(frozen=True)
class Column:
    """A heading, what it means, and how a line fills it; columns of text sort by their texts."""

    heading: str
    meaning: str
    cell: Callable[[Record], Cell]
    is_text: bool = False


@dataclass(frozen=True)
class Line:
    """The cells of a line, and the benchmark, group, method and budget that it is about."""

    about: Mapping[str, str]
    cells: Sequence[Cell]


@dataclass(frozen=True)
class PageTable:
    """A table as the page has it."""

    title: str
    columns: Sequence[Column]
    lines: Sequence[Line]

    @property
    def marks(self) -> dict[str, str]:
        """Those of `MARKS` that its cells have."""
        used = {mark for line in self.lines for cell in line.cells for mark in cell.marks}
        return {mark: meaning for mark, meaning in MARKS.items() if mark in used}


def leaderboard(sections: Iterable[Section]) -> PageTable:
    """A line for each benchmark with scores, method and budget: the average over its groups, or its only group."""
    columns = [
        Column("benchmark", "what the model was asked", _benchmark, is_text=True),
        _number(
            "groups", "datasets, tasks or lengths that the line averages, each counting the same", "groups", "{:,.0f}"
        ),
        *CONFIGURATION,
        *_score("score"),
        *SIZES,
        Column("seconds", "an example's prefill, compression and share of decoding, added up", _seconds),
    ]
    scored = [section for section in sections if section.has_scores]
    return _table("Averages of each method and budget", columns, (line for each in scored for line in _averages(each)))


def every_number(section: Section) -> PageTable:
    """A line for each group, method and budget of a benchmark, with all that was scored, measured and spent."""
    columns = [
        Column("group", "a dataset, a task, a length or a text", lambda line: Cell(line["group"]), is_text=True),
        *CONFIGURATION,
        *(each for name in score_names(section.rows) for each in _score(name)),
        *(each for name in MEASURES for each in _measure(name) if name in section.frame),
        *SIZES,
        _number("read tokens", "entries that a head read in the last step", "read_tokens_mean", "{:,.1f}"),
        *(_number(heading, meaning, name, "{:.3f}") for name, (heading, meaning) in SPENT.items()),
    ]
    return _table(f"{section.name}: every number", columns, _records(section, section.frame))


def by_group(section: Section) -> PageTable:
    """A line for each method and budget of a benchmark, a column for the score of each group, and their average."""
    frame = wide(section.rows)
    groups = [name for name in frame.columns if name not in ("method", "budget")]
    columns = [
        *CONFIGURATION[:2],
        *(_number(name, f"score of {name}, 0 to 100", name, "{:.2f}") for name in groups if name != "average"),
        _number("average", "plain mean over the groups; none where one is missing", "average", "{:.2f}"),
    ]
    return _table(f"{section.name}: scores by group", columns, _records(section, frame))


def _table(title: str, columns: Sequence[Column], records: Iterable[Record]) -> PageTable:
    lines = [(_about(record), [column.cell(record) for column in columns]) for record in records]
    told = [i for i in range(len(columns)) if any(cells[i].text or cells[i].marks for _, cells in lines)]
    return PageTable(
        title, [columns[i] for i in told], [Line(about, [cells[i] for i in told]) for about, cells in lines]
    )


def _about(record: Record) -> dict[str, str]:
    return {name: str(record.get(name, "")) for name in ("benchmark", "group", "method", "budget")}


def _records(section: Section, frame: pd.DataFrame) -> Iterator[Record]:
    own = {"benchmark": section.name, "baseline": section.baseline, "averaged": False}
    return ({**line, **own} for line in frame.to_dict("records"))


def _averages(section: Section) -> Iterator[Record]:
    own = {"groups": section.groups, "averaged": section.groups > 1, "weak": bool(beyond_ability(section.frame))}
    return ({**line, **own} for line in _records(section, section.averages))


def _number(heading: str, meaning: str, field: str, form: str, unit: float = 1) -> Column:
    return Column(heading, meaning, lambda line: _cell(line.get(field), form, unit))


def _measure(name: str) -> list[Column]:
    heading, form, unit = MEASURES[name]
    if name == "perplexity":  # of the two that have intervals the one that is read
        return _figures(name, MEASURED[name], form, form)

    def cell(line: Record) -> Cell:
        cell = _cell(line.get(name), form, unit)
        return cell if cell.text or not line.get("oom") else Cell("", None, ("oom",))

    return [Column(heading.replace("\n", " "), MEASURED[name], cell)]


def _score(name: str) -> list[Column]:
    return _figures(name, f"mean {name}, 0 to 100; more is better", "{:.2f}", "{:.1f}")


def _figures(name: str, meaning: str, form: str, bounds: str) -> list[Column]:
    """Columns of a figure, its interval, its difference to the baseline, and that one's interval."""
    to = f"{name}_difference"

    def value(line: Record) -> Cell:
        cell = _cell(line.get(name), form)
        return cell if cell.text or not line["averaged"] else Cell("", None, ("incomplete",))

    def difference(line: Record) -> Cell:
        if _is_baseline(line):
            return Cell("", 0.0, ("baseline",)) if value(line).text else Cell("")
        cell = _cell(line.get(to), _signed(form))
        clear = distinguishable(line.get(f"{to}_low", nan), line.get(f"{to}_high", nan))
        return Cell(cell.text, cell.value, ("≈",) if cell.text and not clear else ())

    def interval(of: str, form: str) -> Callable[[Record], Cell]:
        def cell(line: Record) -> Cell:
            if of == to and _is_baseline(line):
                return Cell("")
            low, high = _cell(line.get(f"{of}_low"), form), _cell(line.get(f"{of}_high"), form)
            return Cell(f"[{low.text}, {high.text}]", low.value) if low.text and high.text else Cell("")

        return cell

    return [
        Column(name, meaning, value),
        Column("95 % interval", "where the figure before it may lie, given these examples", interval(name, bounds)),
        Column("difference", "how much more than the baseline on the same examples", difference),
        Column(
            "its 95 % interval",
            "where the difference may lie, given these examples",
            interval(to, _signed(bounds)),
        ),
    ]


def _cell(value: Any, form: str, unit: float = 1) -> Cell:
    if value is None or pd.isna(value):
        return Cell("")
    return Cell(form.format(value / unit).replace("-", "\N{MINUS SIGN}"), float(value))


def _signed(form: str) -> str:
    return form.replace("{:", "{:+")


def _is_baseline(line: Record) -> bool:
    return (line["method"], line["budget"]) == line["baseline"]


def _benchmark(line: Record) -> Cell:
    return Cell(line["benchmark"], None, ("beyond model",) if line["weak"] else ())


def _budget(line: Record) -> Cell:
    is_share, number = budget_number(line["budget"])
    return Cell(str(line["budget"]), number + SHARES_BEHIND * is_share)


def _bytes(line: Record) -> Cell:
    cell = _cell(line.get("cache_bytes"), "{:,.2f}", 2**20)
    return Cell(cell.text, cell.value, ("nominal",) if cell.text and line.get("memory") == "nominal" else ())


def _ratio(line: Record) -> Cell:
    """None where a budget was never reached, unless the bytes shrank in another way."""
    unreached = line["budget"] != FULL and line.get("compressed_share") == 0 and line["ratio"] >= 1
    return Cell("") if unreached else _cell(line.get("ratio"), "{:.1%}")


def _evicted(line: Record) -> Cell:
    share = line.get("compressed_share")
    if share is None or pd.isna(share) or (line["budget"] == FULL and share == 0):
        return Cell("")
    if share == 0:
        return Cell("", 0.0, ("never",))
    return Cell("always" if share == 1 else f"{share:.0%}", float(share))


def _seconds(line: Record) -> Cell:
    return _cell(sum(line[name] for name in SPENT), "{:.2f}")


CONFIGURATION = [
    Column("method", "the method, and settings given with it", lambda line: Cell(line["method"]), is_text=True),
    Column("budget", "KV entries asked for per head and layer, or a share of the prompt; full keeps all", _budget),
    _number("examples", "rows behind the line", "examples", "{:,.0f}"),
]
SIZES = [
    _number("kept tokens", "entries really kept of a prompt, per head and layer", "kept_tokens_mean", "{:,.1f}"),
    Column("cache MiB", "all that the cache holds right after the prompt, bookkeeping included", _bytes),
    Column("of full", "those bytes as a share of the whole prompt's keys and values", _ratio),
    Column("evicted", "in how many of the examples anything was evicted", _evicted),
]
