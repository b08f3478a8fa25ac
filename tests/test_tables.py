"""Tables: every number stands under the method, budget and group that it came from, and says how sure it is."""

from __future__ import annotations

import io
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rows import make_row

from kvfactory.report.tables import by_fields, overall, percent, summarise, wide
from kvfactory.report.terminal import plain_table, print_table


def shown(rows: list[dict]) -> str:
    page = io.StringIO()
    print_table(rows, Console(file=page, width=120))
    return page.getvalue()


def test_a_summary_is_what_the_hand_computes():
    rows = [
        make_row("hotpotqa", "snapkv", 64, 1.0, rougeL=0.5),
        make_row("hotpotqa", "fullkv", None, 0.5, rougeL=0.0, cache_bytes=2**22, ratio=1.0),
        make_row("hotpotqa", "snapkv", 64, 0.0, rougeL=0.25, cache_bytes=2**19, ratio=0.5, evicted=False),
        make_row("hotpotqa", "snapkv", 64, 1.0, rougeL=0.25, prefill_seconds=4.0, kept_tokens_mean=61.0),
    ]
    frame = summarise(rows)
    frame = frame[[name for name in frame if not name.endswith(("_low", "_high", "_difference"))]]
    assert frame.to_dict("records") == [
        {
            "benchmark": "longbench",
            "group": "hotpotqa",
            "method": "snapkv",
            "budget": 64,
            "examples": 3,
            "score": 66.67,
            "rougeL": 33.33,
            "kept_tokens_mean": 63.0,
            "read_tokens_mean": 72.0,
            "cache_bytes": (2**20 + 2**19 + 2**20) / 3,
            "ratio": pytest.approx(1 / 3),
            "compressed_share": pytest.approx(2 / 3),
            "prefill_seconds": 2.0,
            "compress_seconds": 0.5,
            "decode_seconds": 2.0,
            "memory": "physical",
        },
        {
            "benchmark": "longbench",
            "group": "hotpotqa",
            "method": "fullkv",
            "budget": "full",
            "examples": 1,
            "score": 50.0,
            "rougeL": 0.0,
            "kept_tokens_mean": 1000.0,
            "read_tokens_mean": 1008.0,
            "cache_bytes": 2**22,
            "ratio": 1.0,
            "compressed_share": 0.0,
            "prefill_seconds": 1.0,
            "compress_seconds": 0.5,
            "decode_seconds": 2.0,
            "memory": "physical",
        },
    ]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["hotpotqa", "trec"]),
            st.sampled_from(["cam", "l2norm", "h2o:recent_size=32"]),
            st.sampled_from([None, 64, 128]),
            st.integers(0, 8).map(lambda eighths: eighths / 8),
        ),
        max_size=40,
    )
)
@settings(max_examples=50, deadline=None)
def test_a_line_holds_its_own_rows_and_no_others(cells):
    """Whatever order the rows came in; a slow dictionary of exact fractions is the judge."""
    expected: dict[tuple, list[Fraction]] = {}
    for group, method, budget, score in cells:
        expected.setdefault((group, method, "full" if budget is None else budget), []).append(Fraction(score))
    frame = summarise([make_row(*cell) for cell in cells])
    found = {(line["group"], line["method"], line["budget"]): line for line in frame.to_dict("records")}
    assert len(found) == len(frame) and found.keys() == expected.keys()
    for key, scores in expected.items():
        assert found[key]["examples"] == len(scores)
        assert found[key]["score"] == pytest.approx(float(100 * sum(scores) / len(scores)), abs=0.00501)


def test_groups_methods_and_budgets_stand_in_the_order_they_were_first_seen():
    order = [("b", "snapkv", 256), ("b", "snapkv", 64), ("b", "fullkv", None), ("b", "adakv", 64)]
    order += [("a", "adakv", 256), ("a", "fullkv", None), ("a", "snapkv", 64)]
    rows = [make_row(*key, 0.5) for key in order]
    frame = summarise(rows)
    assert list(zip(frame["group"], frame["method"], frame["budget"], strict=True)) == [
        ("b", "snapkv", 256),
        ("b", "snapkv", 64),
        ("b", "fullkv", "full"),
        ("b", "adakv", 64),
        ("a", "snapkv", 64),
        ("a", "fullkv", "full"),
        ("a", "adakv", 256),
    ]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_percent_rounds_like_the_official_evaluation(scores):
    total = 0.0
    for score in np.array(scores):
        total += float(score)
    assert percent(np.array(scores)) == round(100 * total / len(scores), 2)
    assert isinstance(percent(np.array(scores)), float)


def test_only_floats_within_0_and_1_are_named_scores():
    fields = {"rougeL": 0.5, "depth_percent": 0.0, "tokenize_seconds": 0.1, "loss": 2.5, "sample": 1, "style": "number"}
    rows = [make_row("a", "snapkv", 64, 1.0, **fields), make_row("a", "snapkv", 64, 1.0, **fields | {"loss": 0.5})]
    columns = set(summarise(rows).columns)
    assert columns & fields.keys() == {"rougeL"}


def test_wide_has_a_column_per_group_and_their_plain_mean():
    rows = [make_row("b", "snapkv", 64, score) for score in (1.0, 0.0, 0.0)]
    rows += [make_row("a", "snapkv", 64, 1.0), make_row("b", "fullkv", None, 0.9)]
    table = wide(rows)
    assert list(table.columns) == ["method", "budget", "b", "a", "average"]
    assert table.loc[0].to_list() == ["snapkv", 64, 33.33, 100.0, 66.66]  # 66.665: half to even, as numpy rounds
    assert table.loc[1].to_list()[:3] == ["fullkv", "full", 90.0]
    assert table.loc[1, ["a", "average"]].isna().all(), "an average over fewer groups compares with nothing"


def test_groups_of_two_benchmarks_with_one_name_stay_apart():
    rows = [make_row("qa", "h2o", 64, 1.0), make_row("qa", "h2o", 64, 0.0, benchmark="longbench_e")]
    assert wide(rows)[["longbench/qa", "longbench_e/qa"]].to_numpy().tolist() == [[100.0, 0.0]]
    assert list(summarise(rows)["score"]) == [100.0, 0.0]


def test_overall_weighs_every_group_the_same():
    rows = [make_row("b", "snapkv", 64, 0.0, cache_bytes=100) for _ in range(3)]
    rows += [make_row("a", "snapkv", 64, 1.0, cache_bytes=200), make_row("a", "fullkv", None, 1.0)]
    first, second = overall(rows).to_dict("records")
    assert (first["group"], first["examples"], first["score"], first["cache_bytes"]) == (
        "average of 2 groups",
        4,
        50,
        150,
    )
    assert (second["method"], second["examples"]) == ("fullkv", 1)
    assert np.isnan(second["score"]) and np.isnan(second["cache_bytes"])


def cells_of(page: str, *starts: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.split()[: len(starts)] == list(starts)]
    return line.split()


def test_the_printed_table_says_what_was_saved_and_what_was_not():
    rows = [
        make_row("qa", "fullkv", None, 0.5, cache_bytes=3 * 2**20, ratio=1.0),
        make_row("qa", "snapkv", 64, 0.5, cache_bytes=2**19),
        make_row("qa", "adakv", 64, 0.5),
        make_row("qa", "adakv", 64, 0.5, evicted=False, ratio=1.01),
        make_row("qa", "h2o", 4096, 0.5, evicted=False, ratio=1.01, cache_bytes=3 * 2**30),
        make_row("qa", "kivi", 4096, 0.5, evicted=False, ratio=0.2),
        make_row("qa", "mask", 64, 0.5, memory="nominal", ratio=1.0),
    ]
    page = shown(rows)
    # method, budget, rows, score, its interval, kept tokens, evicted, cache in MiB, share of the full cache
    assert cells_of(page, "fullkv")[1:9] == ["full", "1", "50.00", "-", "1000.0", "-", "3.0", "100.0%"]
    assert cells_of(page, "snapkv")[1:9] == ["64", "1", "50.00", "-", "64.0", "always", "0.5", "25.0%"]
    assert cells_of(page, "adakv")[3:9] == ["50.00", "50.0-50.0", "64.0", "50%", "1.0", "63.0%"]
    assert cells_of(page, "h2o")[6:9] == ["never", "3,072.0", "-"], "never evicted: no compression ratio"
    assert cells_of(page, "kivi")[6:9] == ["never", "1.0", "20.0%"], "its bytes shrank without eviction"
    assert cells_of(page, "mask")[7:9] == ["1.0*", "100.0%"]
    assert "* nominal" in page
    assert "nominal" not in shown(rows[:-1])


def test_the_printed_table_marks_differences_that_may_be_0():
    def row(method: str, budget: int | None, example: int, score: float) -> dict:
        whole = {"ratio": 1.0} if budget is None else {}
        return make_row("qa", method, budget, score, **whole) | {"example_id": str(example)}

    rows = [row("whole", None, each, 1.0) for each in range(8)]
    rows += [row("same", 64, each, 1.0) for each in range(8)]
    rows += [row("worse", 64, each, each % 2) for each in range(8)]
    page = shown(rows)
    assert cells_of(page, "whole")[3:6] == ["100.00", "100.0-100.0", "-"]
    assert cells_of(page, "same")[3:6] == ["100.00", "100.0-100.0", "+0.00~"]
    assert cells_of(page, "worse")[3:6] == ["50.00", "12.5-87.5", "-50.00"]
    assert "diff.: to whole on the same examples; ~ where its 95 % interval contains 0" in " ".join(page.split())
    narrow = io.StringIO()
    print_table(rows, Console(file=narrow, width=80))
    assert "prefill" in page and "prefill" not in narrow.getvalue()
    assert all(len(line.rstrip()) <= 80 for line in narrow.getvalue().splitlines())
    assert cells_of(narrow.getvalue(), "worse")[3:6] == ["50.00", "12.5-87.5", "-50.00"]


def test_reading_less_than_is_kept_has_a_column():
    rows = [make_row("g", "fullkv", None, 1.0), make_row("g", "pages", None, 1.0, read_tokens_mean=264.13)]
    assert " 1000.0  264.1 " in shown(rows)
    assert "read" not in shown(rows[:1])


def test_the_printed_table_fits_its_console_and_shows_a_long_sweep_as_averages():
    methods = ["fullkv", "a_method_of_many_words:recent_size=32,heavy_ratio=0.1,pooling=maxpool", "[red]x[/red]"]
    slow = {"decode_seconds": 1234.5, "cache_bytes": 1023 * 2**20, "kept_tokens_mean": 131072.0, "memory": "nominal"}
    keys = [("passage_retrieval_en", method, budget) for method in methods for budget in (64, 131072)]
    few = shown([make_row(*key, 1.0, rougeL=1.0, **slow) for key in keys])
    assert all(len(line.rstrip()) <= 120 for line in few.splitlines())
    assert "average" not in few and "longbench: passage_retrieval_en" in few
    assert "[red]x" in few and "1234.50" in few and "131072.0" in few
    many = [
        make_row(f"g{group}", method, 64, group / 20) for group, method in product(range(21), ["h2o", "snapkv", "x"])
    ]
    page = shown(many)
    assert "longbench: average of 21 groups" in page and "longbench: g3" not in page
    assert cells_of(page, "h2o")[:4] == ["h2o", "64", "21", "50.00"]
    assert "longbench: g3" in shown(many[:30])


def test_scores_by_two_fields_stand_in_lines_and_columns():
    rows = [
        make_row("a", "fullkv", None, 1.0, task="vt", length=8),
        make_row("b", "snapkv", 64, 0.5, task="vt", length=8),
        make_row("b", "snapkv", 64, 0.0, task="vt", length=8),
        make_row("c", "snapkv", 64, 1.0, task="cwe", length=8),
        make_row("d", "snapkv", 64, 1.0, task="cwe", length=16),
    ]
    frame = by_fields(rows, "length", "task", ["fwe", "cwe", "vt"])
    assert list(frame) == ["method", "budget", "length", "cwe", "vt", "average"]
    lines = frame.astype(object).where(frame.notna(), None).to_numpy().tolist()
    assert lines == [
        ["fullkv", "full", 8, None, 100.0, None],
        ["snapkv", 64, 8, 100.0, 25.0, 62.5],
        ["snapkv", 64, 16, 100.0, None, None],
    ]
    page = io.StringIO()
    Console(file=page, width=80).print(plain_table("by length", frame))
    assert [line.split() for line in page.getvalue().splitlines()[2:]] == [
        ["fullkv", "full", "8", "-", "100.00", "-"],
        ["snapkv", "64", "8", "100.00", "25.00", "62.50"],
        ["snapkv", "64", "16", "100.00", "-", "-"],
    ]


def test_a_folder_without_rows_has_an_empty_table():
    assert list(summarise([]).columns)[:5] == ["benchmark", "group", "method", "budget", "examples"]
    assert summarise([]).empty and wide([]).empty and overall([]).empty
    assert shown([]) == "no rows yet\n"
