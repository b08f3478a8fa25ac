"""How sure a mean is: intervals are scipy's, differences are of the same examples, and the average draws within groups."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import make_row
from scipy.stats import bootstrap

from kvfactory.report.intervals import (
    RESAMPLES,
    baseline,
    distinguishable,
    interval,
    paired_difference,
    resampled_means,
)
from kvfactory.report.tables import overall, summarise


def row(example: str, method: str, budget: int | None, score: float, group: str = "g", **fields: object) -> dict:
    whole = {"ratio": 1.0} if budget is None else {}
    return make_row(group, method, budget, score, **whole | fields) | {"example_id": example}


@pytest.mark.parametrize("size", [5, 40, 300])
@pytest.mark.parametrize("kind", ["binary", "skewed"])
def test_intervals_are_scipys(size: int, kind: str) -> None:
    """Two bootstraps of the same data differ by chance alone: the ends by a small part of the standard error."""
    generator = np.random.default_rng(size)
    values = generator.integers(0, 2, size).astype(float) if kind == "binary" else generator.exponential(1.0, size) ** 2
    ours = interval(values)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(7))
    error = values.std() / math.sqrt(size)
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.2 * error)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.2 * error)
    assert ours.high - ours.low > 2 * error or size == 5


def test_the_interval_of_a_difference_is_scipys_for_pairs() -> None:
    generator = np.random.default_rng(3)
    first = generator.random(60)
    second = first + generator.normal(0.1, 0.2, 60)
    ours = paired_difference(first, second)
    theirs = bootstrap(
        (second - first,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    )
    assert ours.mean == pytest.approx((second - first).mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.006)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.006)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.randoms())
@settings(max_examples=30)
def test_resampled_means_are_means_of_lines_drawn_with_replacement(values: list[float], chance: random.Random) -> None:
    weights = [float(chance.randint(1, 3)) for _ in values]
    means = resampled_means(np.array(values)[:, None], np.array(weights)[:, None])
    assert means.shape == (RESAMPLES, 1)
    assert (means >= min(values) - 1e-9).all() and (means <= max(values) + 1e-9).all()
    expected = np.average(values, weights=weights)
    assert means.mean() == pytest.approx(expected, abs=0.05 + np.ptp(values) * 0.1)


def test_a_large_group_is_drawn_in_parts_that_make_one_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = np.random.default_rng(0).random((50, 2)), np.ones((50, 2))
    monkeypatch.setattr("kvfactory.report.intervals.DRAWN_AT_ONCE", 50 * 7)
    means = resampled_means(values, weights)
    assert means.shape == (RESAMPLES, 2) and len(np.unique(means[:, 0])) > RESAMPLES / 2


def test_differences_are_taken_on_the_examples_that_both_have() -> None:
    """By hand: a lacks example 4, b has an example that the whole cache lacks."""
    whole = [row(str(each), "whole", None, score) for each, score in enumerate([1.0, 1.0, 0.0, 0.5, 1.0])]
    a = [row(str(each), "a", 64, score) for each, score in enumerate([1.0, 0.0, 0.0, 0.0])]
    b = [row(each, "b", 64, score) for each, score in (("0", 0.0), ("elsewhere", 1.0))]
    lines = summarise([*a, *b, *whole]).set_index("method")
    assert lines.loc["a", "score_difference"] == round(100 * (1 / 4 - 2.5 / 4), 2) == -37.5
    assert lines.loc["b", "score_difference"] == -100
    assert lines.loc["whole", ["score_difference", "score_difference_low", "score_difference_high"]].tolist() == [
        0,
        0,
        0,
    ]
    low, high = lines.loc["a", ["score_difference_low", "score_difference_high"]]
    pairs = paired_difference([1, 1, 0, 0.5], [1, 0, 0, 0])
    assert low == pytest.approx(100 * pairs.low, abs=13) and high == pytest.approx(100 * pairs.high, abs=1)
    assert lines.loc["a", "score_low"] <= lines.loc["a", "score"] <= lines.loc["a", "score_high"]


def test_a_method_that_answers_as_the_whole_cache_does_is_indistinguishable() -> None:
    scores = [random.Random(5).random() for _ in range(30)]
    rows = [row(str(each), "whole", None, score) for each, score in enumerate(scores)]
    rows += [row(str(each), "same", 64, score) for each, score in enumerate(scores)]
    rows += [row(str(each), "worse", 64, score / 2) for each, score in enumerate(scores)]
    lines = summarise(rows).set_index("method")

    def sure(method: str) -> bool:
        return distinguishable(*lines.loc[method, ["score_difference_low", "score_difference_high"]])

    assert not sure("same") and lines.loc["same", "score_difference"] == 0
    assert sure("worse") and lines.loc["worse", "score_difference_high"] < 0
    assert not distinguishable(math.nan, math.nan), "what is not known is not told apart"


def test_pairs_see_what_unpaired_intervals_do_not() -> None:
    """Examples differ far more than methods do: only a difference on the same examples tells methods apart."""
    hard = [each / 40 for each in range(40)]
    rows = [row(str(each), "whole", None, score) for each, score in enumerate(hard)]
    rows += [row(str(each), "a", 64, max(0.0, score - 0.05)) for each, score in enumerate(hard)]
    whole, a = (summarise(rows).set_index("method").loc[each] for each in ("whole", "a"))
    assert a["score_high"] > whole["score_low"] and a["score_difference_high"] < 0


@given(st.permutations(range(24)))
@settings(max_examples=10)
def test_intervals_do_not_depend_on_the_order_of_rows(order: list[int]) -> None:
    rows = [row(str(each // 2), ("whole", "a")[each % 2], (None, 64)[each % 2], each % 5 / 4) for each in range(24)]
    given_rows, shuffled = (summarise(each).set_index("method") for each in (rows, [rows[place] for place in order]))
    for name in ("score_low", "score_high", "score_difference_low", "score_difference_high"):
        assert given_rows[name].to_dict() == shuffled[name].to_dict()


def test_one_example_has_no_interval() -> None:
    line = summarise([row("only", "whole", None, 1.0), row("only", "a", 64, 0.0)]).set_index("method").loc["a"]
    assert line["score_difference"] == -100
    assert line[["score_low", "score_high", "score_difference_low", "score_difference_high"]].isna().all()


def test_an_average_draws_within_its_groups() -> None:
    """Groups count the same, so one that never varies halves the width of another's interval."""
    noisy = [row(f"n{each}", "whole", None, each % 2, group="noisy") for each in range(40)]
    steady = [row(f"s{each}", "whole", None, 1.0, group="steady") for each in range(10)]
    parts = summarise([*noisy, *steady]).set_index("group")
    (average,) = overall([*noisy, *steady]).to_dict("records")
    width = parts.loc["noisy", "score_high"] - parts.loc["noisy", "score_low"]
    assert average["score"] == 75
    assert average["score_high"] - average["score_low"] == pytest.approx(width / 2, abs=0.01)


def test_perplexities_have_intervals_over_windows_by_their_tokens() -> None:
    losses = {"whole": [2.0, 2.2, 2.1, 1.9], "a": [2.3, 2.6, 2.3, 2.2]}
    rows = []
    for method, each in losses.items():
        for place, nll in enumerate(each):
            made = row(str(place), method, None if method == "whole" else 64, 0.0)
            made = {name: value for name, value in made.items() if name not in ("score", "scores")}
            rows.append(made | {"nll": nll, "scored_tokens": 10 * (place + 1), "perplexity": math.exp(nll)})
    lines = summarise(rows).set_index("method")
    tokens = np.array([10, 20, 30, 40])
    means = {name: np.average(each, weights=tokens) for name, each in losses.items()}
    assert lines.loc["a", "nll_difference"] == pytest.approx(means["a"] - means["whole"])
    assert lines.loc["a", "perplexity_difference"] == pytest.approx(math.exp(means["a"]) - math.exp(means["whole"]))
    assert lines.loc["a", "perplexity_low"] < lines.loc["a", "perplexity"] < lines.loc["a", "perplexity_high"]
    assert lines.loc["a", "perplexity_difference_low"] > 0, "every window is worse"


def test_differences_are_to_what_keeps_everything_and_has_the_fewest_settings() -> None:
    settings_of = {"quest": {"page_size": 16, "merge": None}, "whole": {"merge": None}}
    rows = [
        row("1", "sparse", None, 1.0, settings={"patterns": "p", "block": 64}),
        row("1", "pages", None, 1.0, settings=settings_of["quest"], ratio=1.1),
        row("1", "whole", None, 1.0, settings=settings_of["whole"]),
        row("1", "bits", None, 1.0, ratio=0.2),
        row("1", "masked", None, 1.0, memory="nominal"),
        row("1", "evicting", None, 1.0, evicted=True),
        row("1", "share", None, 1.0) | {"budget_share": "50%"},
    ]
    assert baseline(rows) == {"longbench": ("whole", "full")}
    assert baseline([row("1", "a", 64, 1.0)]) == {}
