"""How sure a mean is: bootstrap intervals over examples, and paired differences to what keeps everything.

    interval(scores)                       # of one configuration's examples
    paired_difference(first, second)       # of two lists of values of the same examples
    draws(rows, statistic, reference, group)   # of all configurations of a group, for `summarise`

Examples are drawn with replacement (Efron, 1979), as often as there are, and the interval holds the middle 95 % of the means
so found (the percentile method, as in `scipy.stats.bootstrap`). All configurations of a group see the same draws, so that
a difference is one on the same examples, and the average over groups draws within each group. The draws depend on the
group's name and size alone: the same rows give the same interval, in any order.

An interval of no width says that all examples scored alike, not that the next one will.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from kvfactory.folder_format import FULL, budget_name

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0
DRAWN_AT_ONCE = 2**22
"""Numbers drawn at a time; what is in memory of a large group's draws."""
BOUNDS = ("low", "high", "difference", "difference_low", "difference_high")
"""What a score's columns are called behind its name."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval; NaN where one example is all there is."""

    mean: float
    low: float
    high: float


def resampled_means(values: Floats, weights: Floats, stratum: str = "") -> Floats:
    """Weighted means of each column in every resample of the lines, [RESAMPLES, columns]; NaN if there is one line alone.

    `values` and `weights` are [examples, columns], of examples that are all there. The draws go by `stratum` and by how
    many lines there are.
    """
    examples = len(values)
    if examples < 2:
        return np.full((RESAMPLES, values.shape[1]), np.nan)
    generator = np.random.default_rng([SEED, zlib.crc32(stratum.encode()), examples])
    parts = [drawn @ (values * weights) / (drawn @ weights) for drawn in _draws(generator, examples)]
    return np.concatenate(parts)


def _draws(generator: np.random.Generator, examples: int) -> Iterator[Floats]:
    """How often each example is in each resample, [some, examples], until there are RESAMPLES."""
    at_once = max(1, min(RESAMPLES, DRAWN_AT_ONCE // examples))
    for start in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - start)
        drawn = generator.integers(0, examples, (count, examples)) + examples * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * examples).reshape(count, examples).astype(float)


def ends(means: Floats) -> tuple[Floats, Floats]:
    """The interval of each column of `resampled_means`; NaN where some resample has no mean or none can differ."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail], axis=0)
    return low, high


def interval(values: ArrayLike, weights: ArrayLike | None = None) -> Interval:
    """The mean of the values of examples, and its interval."""
    column = np.asarray(values, float)[:, None]
    weighing = np.ones_like(column) if weights is None else np.asarray(weights, float)[:, None]
    mean = float((column * weighing).sum() / weighing.sum())
    low, high = ends(resampled_means(column, weighing))
    return Interval(mean, float(low[0]), float(high[0]))


def paired_difference(first: ArrayLike, second: ArrayLike) -> Interval:
    """The mean of what the second value of each example is more than the first, and its interval."""
    return interval(np.asarray(second, float) - np.asarray(first, float))


def distinguishable(low: float, high: float) -> bool:
    """Whether a difference's interval leaves 0 out; one that is not known does not."""
    return low > 0 or high < 0


Configuration = tuple[str, int | str]  # method, budget as tables show it


@dataclass(frozen=True)
class Statistic:
    """A figure of a group that is made of a mean over examples."""

    name: str
    field: str
    """The field of rows whose mean it is."""
    weight: str | None = None
    """The field that says how much a row counts; all the same where there is none."""
    shape: Callable[[Floats], Floats] = lambda mean: mean
    """From the mean to the figure."""
    decimals: int | None = None
    """Those that tables have of it; all where None."""


def statistics(rows: Iterable[Mapping[str, Any]], scores: Iterable[str]) -> list[Statistic]:
    """Those of rows that have these scores: 0..100 in tables. Perplexities have intervals too."""
    found = [Statistic(name, name, shape=lambda mean: 100 * mean, decimals=2) for name in scores]
    if any("nll" in row for row in rows):
        tokens = "scored_tokens"
        found += [Statistic("nll", "nll", tokens), Statistic("perplexity", "nll", tokens, np.exp)]
    return found


def baseline(rows: Iterable[Mapping[str, Any]]) -> dict[str, Configuration]:
    """By benchmark the configuration that differences are to: of those that keep everything as it is the plainest.

    That is the one with the fewest settings that are set; a benchmark where nothing keeps everything has none.
    """
    plainest: dict[str, dict[Configuration, int]] = {}
    spoilt: set[tuple[str, Configuration]] = set()
    for row in rows:
        configuration = (row["method"], budget_name(row))
        if (
            configuration[1] != FULL
            or row.get("evicted")
            or row.get("ratio", 1.0) < 1
            or row.get("memory") == "nominal"
        ):
            spoilt.add((row["benchmark"], configuration))
        set_ones = sum(value is not None for value in row.get("settings", {}).values())
        plainest.setdefault(row["benchmark"], {}).setdefault(configuration, set_ones)
    whole = {
        benchmark: [each for each in found if (benchmark, each) not in spoilt] for benchmark, found in plainest.items()
    }
    return {name: min(found, key=plainest[name].__getitem__) for name, found in whole.items() if found}


@dataclass(frozen=True)
class Draws:
    """What the resamples of a group's examples say of one configuration."""

    figures: Floats
    """[RESAMPLES]."""
    difference: float
    """To the baseline, on the examples that both have; NaN without one."""
    differences: Floats
    """[RESAMPLES]."""

    def bounds(self) -> dict[str, float]:
        """The columns that a table has of it, called as in `BOUNDS`."""
        low, high = ends(np.stack([self.figures, self.differences], 1))
        return dict(zip(BOUNDS, (low[0], high[0], self.difference, low[1], high[1]), strict=True))


UNKNOWN = np.full(RESAMPLES, np.nan)


def draws(
    rows: Sequence[Mapping[str, Any]], statistic: Statistic, reference: Configuration | None, group: str
) -> dict[Configuration, Draws]:
    """`Draws` of each configuration of a group's rows."""
    cells = pd.DataFrame(
        {
            "example": [row["example_id"] for row in rows],
            "configuration": [(row["method"], budget_name(row)) for row in rows],
            "value": [row.get(statistic.field) for row in rows],
            "weight": [row.get(statistic.weight, 0) if statistic.weight else 1.0 for row in rows],
        }
    ).dropna(subset="value")
    if cells.empty:
        return {}
    table = cells.pivot(index="example", columns="configuration")  # sorted by example: the draws go by place
    values, weights = (table[name].to_numpy(float) for name in ("value", "weight"))
    there, names = ~np.isnan(values), list(table["value"].columns)
    complete = there.all(0)
    means = np.empty((RESAMPLES, len(names)))
    means[:, complete] = resampled_means(values[:, complete], weights[:, complete], group)
    for place in np.flatnonzero(~complete):
        lines = there[:, place]
        means[:, [place]] = resampled_means(values[lines][:, [place]], weights[lines][:, [place]], group)

    def to_reference(place: int) -> tuple[float, Floats]:
        if reference not in names:
            return np.nan, UNKNOWN
        pair = [place, names.index(reference)]
        both = there[:, pair].all(1)
        if not both.any():
            return np.nan, UNKNOWN
        shared_values, shares = values[both][:, pair], weights[both][:, pair]
        mine, other = statistic.shape((shared_values * shares).sum(0) / shares.sum(0))
        pairs = means[:, pair] if complete[pair].all() else resampled_means(shared_values, shares, group)
        figures = statistic.shape(pairs)
        return float(mine - other), figures[:, 0] - figures[:, 1]

    return {name: Draws(statistic.shape(means[:, place]), *to_reference(place)) for place, name in enumerate(names)}


Line = tuple[str, str, str, int | str]  # benchmark, group, method, budget
KEYS = ["benchmark", "group", "method", "budget"]


def bounds_of(rows: Sequence[Mapping[str, Any]], scores: Iterable[str]) -> pd.DataFrame:
    """The columns of `BOUNDS` for each figure that has an interval, by line of a table."""
    return _columns({statistic: _lines(rows, statistic) for statistic in statistics(rows, scores)})


def average_bounds(rows: Sequence[Mapping[str, Any]], scores: Iterable[str]) -> pd.DataFrame:
    """The same for averages over the groups of a benchmark, every group counting the same."""
    return _columns({each: dict(_averages(_lines(rows, each))) for each in statistics(rows, scores)})


def _lines(rows: Sequence[Mapping[str, Any]], statistic: Statistic) -> dict[Line, Draws]:
    references = baseline(rows)
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["benchmark"], row["group"]), []).append(row)
    return {
        (*group, *configuration): each
        for group, part in groups.items()
        for configuration, each in draws(part, statistic, references.get(group[0]), group[1]).items()
    }


def _averages(lines: Mapping[Line, Draws]) -> Iterator[tuple[Line, Draws]]:
    """Those configurations that have all groups of their benchmark."""
    groups: dict[str, dict[str, None]] = {}
    for benchmark, group, _, _ in lines:
        groups.setdefault(benchmark, {})[group] = None
    for benchmark, method, budget in dict.fromkeys((line[0], *line[2:]) for line in lines):
        names = groups[benchmark]
        parts = [lines[line] for group in names if (line := (benchmark, group, method, budget)) in lines]
        if len(parts) == len(names):
            yield (benchmark, average_name(len(names)), method, budget), averaged(parts)


def averaged(parts: Sequence[Draws]) -> Draws:
    """Of groups that count the same."""
    return Draws(
        np.mean([part.figures for part in parts], 0),
        float(np.mean([part.difference for part in parts])),
        np.mean([part.differences for part in parts], 0),
    )


def average_name(groups: int) -> str:
    """What the group of an average is called."""
    return f"average of {groups} groups"


def _columns(found: Mapping[Statistic, Mapping[Line, Draws]]) -> pd.DataFrame:
    cells: dict[Line, dict[str, float]] = {}
    for statistic, lines in found.items():
        for line, each in lines.items():
            bounds = {f"{statistic.name}_{bound}": value for bound, value in each.bounds().items()}
            digits = statistic.decimals
            rounded = bounds if digits is None else {name: round(value, digits) for name, value in bounds.items()}
            cells.setdefault(line, {}).update(rounded)
    names = [f"{statistic.name}_{bound}" for statistic in found for bound in BOUNDS]
    index = (
        pd.MultiIndex.from_tuples(list(cells), names=KEYS) if cells else pd.MultiIndex.from_arrays([[]] * 4, names=KEYS)
    )
    return pd.DataFrame(list(cells.values()), index=index, columns=names, dtype=float)
