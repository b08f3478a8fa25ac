"""Two runs are compared row by row: only what both have, and nothing is shown that a terminal would obey."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from entry_points import exit_code

from kvfactory.comparison import differing, environment_changed, figures, pair, settings_changed, shortened, visible
from kvfactory.results import Run, RunFolder

compare = partial(exit_code, "kvfactory")


def make_row(
    example_id: str, score: float, method: str = "snapkv", budget: int | None = 64, **fields: Any
) -> dict[str, Any]:
    row = {"benchmark": "reading", "group": "after", "example_id": example_id, "method": method, "budget": budget}
    row |= {"budget_share": None, "prediction": "Rain.", "answers": ["Rain"], "score": score, "scores": ["score"]}
    return row | {"kept_tokens_mean": 64.0, "cache_bytes": 2**20, "memory": "physical"} | fields


def run_of(rows: list[dict[str, Any]], **settings: Any) -> Run:
    return Run(Path("nowhere"), rows, settings, [])


def pairs_of(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[Any]:
    return pair(run_of(first), run_of(second)).both


def folder_of(
    path: Path, rows: list[dict[str, Any]], settings: dict[str, Any] | None = None, **environment: Any
) -> Path:
    with RunFolder.open(path, settings or {}, environment=environment) as folder:
        for row in rows:
            folder.append(row)
    return path


def said(capsys: Any, *arguments: object) -> str:
    """What the command prints, blanks squeezed."""
    assert compare(["compare", *map(str, arguments)]) == 0
    return "\n".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())


BEFORE, AFTER = [0.0, 1.0, 0.5, 0.25, 1.0, 0.0], [1.0, 1.0, 0.0, 0.75, 1.0, 0.5]


def test_a_configuration_has_both_means_the_paired_difference_and_counts():
    first = [make_row(str(n), value) for n, value in enumerate(BEFORE)] + [make_row("alone", 1.0)]
    second = [make_row(str(n), value, prediction=f"Rain{'.' * (1 + n // 4)}") for n, value in enumerate(AFTER)]
    [line] = figures(pairs_of(first, second)).to_dict("records")
    assert (line["method"], line["budget"], line["group"], line["measure"]) == ("snapkv", 64, "after", "score")
    assert [line[name] for name in ("rows", "better", "worse", "equal", "changed")] == [6, 3, 1, 2, 2]
    assert line["a"] == pytest.approx(100 * 2.75 / 6) and line["b"] == pytest.approx(100 * 4.25 / 6)
    assert line["difference"] == pytest.approx(100 * 1.5 / 6)


def test_the_interval_is_that_of_differences_of_the_same_examples():
    """A slow bootstrap is the judge; without pairing the interval would be several times as wide."""
    chance = np.random.default_rng(0)
    before = chance.random(60)
    after = before + chance.normal(0.05, 0.05, 60)
    first, second = ([make_row(str(n), float(value)) for n, value in enumerate(each)] for each in (before, after))
    [line] = figures(pairs_of(first, second)).to_dict("records")
    slow = sorted(100 * (after - before)[chance.integers(0, 60, 60)].mean() for _ in range(4000))
    assert line["low"] == pytest.approx(slow[100], abs=0.2) and line["high"] == pytest.approx(slow[3900], abs=0.2)
    assert 0 < line["high"] - line["low"] < 4


def test_the_other_way_round_signs_and_sides_change():
    first, second = ([make_row(str(n), value) for n, value in enumerate(values)] for values in (BEFORE, AFTER))
    [there], [back] = (figures(pairs_of(*each)).to_dict("records") for each in ((first, second), (second, first)))
    assert (there["a"], there["better"]) == (pytest.approx(back["b"]), back["worse"])
    assert there["difference"] == pytest.approx(-back["difference"]) and there["low"] == pytest.approx(-back["high"])


def test_groups_count_the_same_in_the_average_whatever_their_size():
    sizes = {"after": 9, "before": 1}
    rows = [[make_row(f"{g}/{n}", v, group=g) for g, size in sizes.items() for n in range(size)] for v in (0.0, 0.0)]
    second = [row | {"score": 1.0} if row["group"] == "before" else row for row in rows[1]]
    frame = figures(pairs_of(rows[0], second)).set_index("group")
    assert frame.loc["average of 2 groups", "difference"] == 50 and frame.loc["average of 2 groups", "rows"] == 10
    assert list(frame.loc[["after", "before"], "difference"]) == [0, 100]
    assert frame["group" if "group" in frame else "rows"].iloc[0] == 10, "the average comes first"
    assert math.isnan(frame.loc["before", "low"]), "of one example nothing is known"


def test_every_configuration_and_measure_has_a_line_of_its_own():
    def rows(shift: float) -> list[dict[str, Any]]:
        return [
            make_row(example, 0.5 + shift * (method == "h2o"), method, budget, f1=0.25, scores=["score", "f1"])
            for method, budget in (("snapkv", 64), ("snapkv", 8), ("h2o", 64), ("fullkv", None))
            for example in "ab"
        ]

    frame = figures(pairs_of(rows(0), rows(0.25)))
    found = {(line["measure"], line["method"], line["budget"]): line["difference"] for line in frame.to_dict("records")}
    methods = [("snapkv", 64), ("snapkv", 8), ("h2o", 64), ("fullkv", "full")]
    assert found == {
        (m, *each): 25.0 * (m == "score" and each[0] == "h2o") for m in ("score", "f1") for each in methods
    }


def test_shares_are_budgets_and_other_benchmarks_are_other_rows():
    first = [make_row("a", 0.0, budget=51, budget_share="10%"), make_row("b", 0.0)]
    second = [make_row("a", 1.0, budget=52, budget_share="10%"), make_row("b", 1.0, benchmark="other")]
    assert [each[0]["example_id"] for each in pairs_of(first, second)] == ["a"]
    assert list(figures(pairs_of(first, second))["budget"]) == ["10%"]


def perplexity(example_id: str, nll: float, tokens: int) -> dict[str, Any]:
    row = make_row(example_id, 0.0, benchmark="perplexity, strided", group="qa")
    gone = ("score", "scores", "prediction", "answers")
    return {name: value for name, value in row.items() if name not in gone} | {
        "nll": nll,
        "scored_tokens": tokens,
        "perplexity": math.exp(nll),
    }


def test_perplexities_are_weighed_by_tokens_and_less_is_better():
    first = [perplexity("x", 2.0, 300), perplexity("y", 3.0, 100)]
    second = [perplexity("x", 2.4, 300), perplexity("y", 2.0, 100)]
    frame = figures(pairs_of(first, second)).set_index("measure")
    assert list(frame.index) == ["nll", "perplexity"]
    assert frame.loc["nll", "a"] == pytest.approx(2.25) and frame.loc["nll", "b"] == pytest.approx(2.3)
    assert frame.loc["perplexity", "difference"] == pytest.approx(math.exp(2.3) - math.exp(2.25))
    assert [frame.loc["nll", name] for name in ("better", "worse")] == [1, 1]
    assert frame["changed"].isna().all(), "nothing was predicted"
    assert list(differing(pairs_of(first, second))["example_id"]) == ["y", "x"]


def test_latencies_are_compared_by_what_was_measured_and_what_has_no_numbers_is_left_out():
    def rows(ttft: float, speed: float, oom: bool) -> list[dict[str, Any]]:
        common = {"benchmark": "latency", "group": "64", "method": "h2o", "budget": 8}
        return [
            {**common, "example_id": "64/batch1", "oom": False, "ttft_seconds": ttft, "tokens_per_second": speed},
            {**common, "example_id": "64/batch9", "oom": oom} | ({} if oom else {"ttft_seconds": 1.0}),
        ]

    frame = figures(pairs_of(rows(1.0, 5.0, True), rows(2.0, 9.0, False))).set_index("measure")
    assert frame[["rows", "better", "worse", "difference"]].T.to_dict("list") == {
        "ttft_seconds": [1, 0, 1, 1.0],
        "tokens_per_second": [1, 1, 0, 4.0],
    }
    rows_found = differing(pairs_of(rows(1.0, 5.0, True), rows(2.0, 9.0, False)))
    assert list(rows_found["example_id"]) == ["64/batch9", "64/batch1"], "what has a number on one side differs most"


def test_rows_that_nobody_scored_are_compared_by_what_was_predicted(tmp_path, capsys):
    def rows(prediction: str) -> list[dict[str, Any]]:
        return [{**make_row("a", 0.0), "prediction": prediction, "scores": [], "score": None}]

    assert figures(pairs_of(rows("x"), rows("y"))).empty
    printed = said(capsys, *(folder_of(tmp_path / each, rows(each)) for each in "xy"))
    assert "a snapkv 64 A x" in printed


def test_rows_that_differ_most_come_first_and_equal_ones_are_left_out():
    changes = {"a": (0.5, 0.75), "b": (0.5, 0.5), "c": (1.0, 0.0), "d": (0.5, 0.5), "e": (0.0, 0.25)}
    first = [make_row(name, before) for name, (before, _) in changes.items()]
    second = [
        make_row(name, after, prediction="Snow" if name == "d" else "Rain.") for name, (_, after) in changes.items()
    ]
    frame = differing(pairs_of(first, second))
    assert list(frame["example_id"]) == ["c", "a", "e", "d"]
    assert frame.loc[0, ["score_a", "score_b"]].tolist() == [1.0, 0.0]
    assert frame.loc[3, ["prediction_a", "prediction_b"]].tolist() == ["Rain.", "Snow"]


def test_texts_are_cut_around_the_place_where_they_part():
    same = "word " * 40
    first, second = shortened([same + "here it ends", same + "there it goes on " + same], width=30, before=10)
    assert first == "…word word here it ends" and second == "…word word there it goes on wor…"
    assert shortened(["yes", "no"]) == ["yes", "no"]
    assert shortened(["a" * 70, "a" * 70]) == ["…" + "a" * 20] * 2
    assert shortened(["", ""]) == ["", ""]


def test_what_a_terminal_would_obey_is_spelled_out():
    assert visible("a\x1b[31mb\r\n\u202e\x9b\ud800 ü 雨") == r"a\x1b[31mb\r\n\u202e\x9b\ud800 ü 雨"


def test_settings_and_environments_are_told_by_name():
    def run(settings: dict[str, Any], *environments: dict[str, Any], scored: str = "") -> Run:
        sessions = [{"arguments": {}, "environment": each} for each in environments]
        if scored:
            sessions.append({"arguments": {"rescored_rows": 3}, "environment": {"kvfactory": scored, "torch": "9"}})
        return Run(Path("nowhere"), [], settings, sessions)

    plugins = [[{"name": "mine", "version": version, "error": None}] for version in ("1", "2")]
    first = run({"seed": 1, "same": 2, "quiet": False}, {"torch": "old"}, {"torch": "2.4", "plugins": plugins[0]})
    second = run({"seed": 7, "same": 2}, {"torch": "2.5", "plugins": plugins[1]}, scored="0.2")
    assert settings_changed(first, second) == [("seed", "1", "7")]
    assert environment_changed(first, second) == [
        ("torch", '"2.4"', '"2.5"'),
        ("plugin mine", '"1"', '"2"'),
        ("scored by kvfactory", "not set", '"0.2"'),
    ]


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    evil = "\x1b]0;owned\x07[bold]Rain[/bold]\u202e"
    first = [make_row(f"id[red]{n}", value) for n, value in enumerate(BEFORE)]
    second = [make_row(f"id[red]{n}", value, prediction=evil) for n, value in enumerate(AFTER)]
    first += [make_row("x", 1.0, "h2o", 8), make_row("y", 1.0, "h2o", 8)]
    second = [row | {"kept_tokens_mean": 32.0, "cache_bytes": 2**19} for row in second] + [make_row("z", 1.0, "adakv")]
    paths = (
        folder_of(tmp_path / "A", first, {"seed": 1}, torch="2.4"),
        folder_of(tmp_path / "B", second, {"seed": 2}, torch="2.4"),
    )
    return paths


def test_the_command_tells_settings_first_then_figures_then_rows(two, capsys):
    printed = said(capsys, *two)
    order = [
        *("differences of settings", "seed 1 2", "environment: the same", "6 of the 6 rows that are in both differ"),
        *("only in A: 2 rows, reading: h2o 8 (2 rows)", "only in B: 1 rows, reading: adakv 64 (1 rows)"),
        *("reading: score", "after snapkv 64 6 45.83 70.83 +25.00", "3 1 2 6"),
        *("what is kept of prompts", "reading snapkv 64 6 of 6 64.0 32.0 1.00 0.50"),
        *("rows that differ most", "id[red]0 snapkv 64 0 100 A Rain."),
    ]
    places = [printed.find(each) for each in order]
    assert -1 not in places and places == sorted(places), list(zip(order, places, strict=True))


def test_what_models_wrote_is_shown_and_not_obeyed(two, capsys):
    assert compare(["compare", *map(str, two)]) == 0
    printed = capsys.readouterr().out
    assert r"\x1b]0;owned\x07[bold]Rain[/bold]\u202e" in printed and "id[red]0" in printed
    assert all(each.isprintable() or each == "\n" for each in printed)


def test_as_many_rows_are_shown_as_asked_for_and_the_file_has_all(two, tmp_path, capsys):
    printed = said(capsys, *two, "--rows", "2", "--output", tmp_path / "rows.csv")
    assert printed.count("B \\x1b") == 2 and "4 more rows differ" in printed
    frame = pd.read_csv(tmp_path / "rows.csv")
    assert len(frame) == 6 and set(frame["prediction_b"]) == {"\x1b]0;owned\x07[bold]Rain[/bold]\u202e"}
    assert list((frame["score_b"] - frame["score_a"]).abs()) == [1.0, 0.5, 0.5, 0.5, 0.0, 0.0]
    assert "rows that differ most" not in said(capsys, *two, "--rows", "0")


def test_runs_that_are_the_same_are_said_to_be(two, capsys):
    printed = said(capsys, two[0], two[0])
    assert "the 8 rows that are in both are the same" in printed and "settings: the same" in printed
    assert "score" not in printed.replace("in scores, predictions", "")


def test_runs_with_nothing_in_common_are_refused_in_one_line(two, tmp_path, capsys):
    others = folder_of(tmp_path / "C", [make_row("other", 1.0)])
    longbench = folder_of(tmp_path / "D", [make_row("a", 1.0, benchmark="longbench")])
    for path, why in (
        (others, "they ran other examples"),
        (longbench, "A has reading: snapkv 64, reading: h2o 8; B has lo"),
    ):
        assert compare(["compare", str(two[0]), str(path)]) == 2
        told = capsys.readouterr().err
        assert "have no row in common" in told and why in told and told.count("\n") == 1


def test_predictions_of_another_tool_are_compared_with_a_run(tmp_path, capsys):
    there = tmp_path / "llama_64" / "hotpotqa" / "SnapKV.json"
    there.parent.mkdir(parents=True)
    rows = [{"pred": pred, "answers": ["Rain"], "_id": name} for name, pred in (("a", "Rain"), ("b", "Snow"))]
    there.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours = [
        make_row(f"hotpotqa/{name}", value, benchmark="longbench", group="hotpotqa", prediction=pred)
        for name, value, pred in (("a", 1.0, "Rain"), ("b", 1.0, "rain"))
    ]
    printed = said(capsys, there.parents[1], folder_of(tmp_path / "run", ours))
    assert "1 of the 2 rows that are in both differ" in printed
    assert "hotpotqa snapkv 64 2 50.00 100.00 +50.00" in printed
    assert "kept tokens" not in printed, "one of the two does not know them"
