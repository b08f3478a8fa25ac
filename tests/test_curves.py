"""Curves: every point, line and band stands where the rows put it, and says whose it is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from rows import make_row

from kvfactory.errors import UserError
from kvfactory.report.curves import budget_curves, latency_curves, trade_off
from kvfactory.report.figures import drawn
from kvfactory.report.tables import overall, summarise
from scripts import load_script


def several(group: str, method: str, budget: int | str | None, scores: Iterable[float], **fields: object) -> list[dict]:
    """A row an example; a share of the prompt comes to 100 entries."""
    share = budget if isinstance(budget, str) else None
    found = [make_row(group, method, 100 if share else budget, score, budget_share=share, **fields) for score in scores]
    for number, row in enumerate(found):
        row["example_id"] = f"{group}/{number}"
        if budget is None and "ratio" not in fields:
            row["ratio"] = 1.0
    return found


def lines_of(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points of every line that has a name, by name."""
    return {
        str(line.get_label()): list(zip(*line.get_data(), strict=True))
        for line in axes.lines
        if not str(line.get_label()).startswith("_child")
    }


def line_of(axes: Axes, name: str) -> Line2D:
    (line,) = [line for line in axes.lines if line.get_label() == name]
    return line


def legend_of(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


SCORES = {
    ("h2o", 256): [0.0, 0.0, 1.0, 1.0],
    ("h2o", 64): [0.0, 0.0, 1.0, 0.0],
    ("snapkv", 64): [0.0, 0.5, 1.0, 0.5],
    ("snapkv", 256): [1.0, 0.5, 1.0, 0.5],
    ("lone:budget=128", 128): [0.5, 0.5, 1.0, 0.0],
    ("fullkv", None): [1.0, 1.0, 1.0, 0.6],
}
ROWS = [row for (method, budget), scores in SCORES.items() for row in several("qa", method, budget, scores)]


# -- score by budget -------------------------------------------------------------------------------------------------


def test_a_line_goes_through_a_methods_mean_scores_by_budget() -> None:
    figure = budget_curves(ROWS, "longbench")
    (axes,) = figure.axes
    lines = lines_of(axes)
    assert lines["snapkv"] == [(64, 50), (256, 75)]
    assert lines["h2o"] == [(64, 25), (256, 50)], "budgets ascending, in whatever order rows are"
    assert lines["lone:budget=128"] == [(128, 50)]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "Budget (entries per head and layer)"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["64", "128", "256"]
    assert axes.get_ylabel() == "Mean score (0 to 100)"
    assert figure.get_suptitle() == "longbench: score by budget\nqa; shaded: 95 % bootstrap interval"


def test_what_keeps_everything_is_a_dashed_black_line_across_with_its_own_band() -> None:
    figure = budget_curves(ROWS, "longbench")
    (axes,) = figure.axes
    line = line_of(axes, "fullkv")
    assert set(line.get_ydata()) == {90} and line.get_linestyle() == "--" and to_hex(line.get_color()) == "#000000"
    frame = summarise(ROWS).set_index("method")
    (band,) = axes.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx(
        (frame.loc["fullkv", "score_low"], frame.loc["fullkv", "score_high"])
    )
    assert legend_of(figure) == ["fullkv (no budget)", "h2o", "snapkv", "lone:budget=128"]


def test_bands_are_the_intervals_of_the_table() -> None:
    (axes,) = budget_curves(ROWS, "longbench").axes
    frame = summarise(ROWS)
    bands = [each for each in axes.collections if isinstance(each, FillBetweenPolyCollection)]
    assert len(bands) == 2, "a lone point has a bar"
    for method, band in zip(["h2o", "snapkv"], bands, strict=True):
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6)}
        part = frame[frame["method"] == method]
        for budget, low, high in zip(part["budget"], part["score_low"], part["score_high"], strict=True):
            assert {(budget, round(low, 6)), (budget, round(high, 6))} <= corners
            assert low < high


def test_rows_without_intervals_have_lines_without_bands() -> None:
    figure = budget_curves([row for row in ROWS if row["example_id"] == "qa/0"], "longbench")
    assert lines_of(figure.axes[0])["snapkv"] == [(64, 0), (256, 100)]
    assert figure.get_suptitle() == "longbench: score by budget\nqa"
    drawn(figure, "png")


def test_shares_of_the_prompt_have_a_panel_of_their_own() -> None:
    shares = several("qa", "snapkv", "5%", [0.5, 0.5]) + several("qa", "snapkv", "20%", [1.0, 0.5])
    entries, percent = budget_curves(ROWS + shares, "longbench").axes
    assert lines_of(entries)["snapkv"] == [(64, 50), (256, 75)]
    assert lines_of(percent)["snapkv"] == [(5, 50), (20, 75)]
    assert percent.get_xlabel() == "Budget (% of the prompt)"
    assert set(line_of(percent, "fullkv").get_ydata()) == {90}
    (alone,) = budget_curves(shares, "longbench").axes
    assert alone.get_xlabel() == "Budget (% of the prompt)"


def test_a_budget_that_nobody_told_has_no_place_on_an_axis() -> None:
    """Predictions of other tools may lack it."""
    unknown = [row | {"budget": None, "budget_share": "unknown"} for row in several("qa", "h2o", 64, [1.0, 0.0])]
    known = several("qa", "snapkv", 64, [1.0, 1.0])
    (axes,) = budget_curves([*unknown, *known], "longbench").axes
    assert lines_of(axes) == {"snapkv": [(64, 100)]}
    with pytest.raises(UserError, match="no configuration has a budget"):
        budget_curves(unknown, "longbench")


def test_groups_are_averaged_and_what_lacks_one_is_left_out() -> None:
    rows = ROWS + [
        row
        for (method, budget), scores in SCORES.items()
        if (method, budget) != ("snapkv", 64)
        for row in several("summaries", method, budget, [score / 2 for score in scores])
    ]
    figure = budget_curves(rows, "longbench")
    lines = lines_of(figure.axes[0])
    assert lines["snapkv"] == [(256, 56.25)] and lines["h2o"] == [(64, 18.75), (256, 37.5)]
    wanted = overall(rows).set_index(["method", "budget"])["score"]
    assert lines["h2o"][1][1] == wanted["h2o", 256]
    assert "\naverage of 2 groups; left out, since they lack some: 1;" in figure.get_suptitle()


def test_perplexity_is_drawn_where_there_are_no_scores_and_says_that_less_is_better() -> None:
    def row(method: str, budget: int | None, nll: float) -> dict:
        (made,) = several("novel", method, budget, [0.0], nll=nll, perplexity=float(np.exp(nll)), scored_tokens=100)
        del made["score"]
        return made | {"scores": [], "benchmark": "perplexity"}

    rows = [row("snapkv", 64, np.log(30)), row("snapkv", 256, np.log(20)), row("fullkv", None, np.log(10))]
    (axes,) = budget_curves(rows, "perplexity").axes
    assert axes.get_ylabel() == "Perplexity (lower is better)" and axes.get_yscale() == "linear"
    np.testing.assert_allclose(lines_of(axes)["snapkv"], [(64, 30), (256, 20)])
    (wide,) = budget_curves([*rows, row("streamingllm", 64, np.log(3000))], "perplexity").axes
    assert wide.get_yscale() == "log", "one that broke down would flatten all others"
    (memory,) = trade_off(rows, "perplexity").axes
    np.testing.assert_allclose(lines_of(memory)["front"][0], (25, 20))
    np.testing.assert_allclose(lines_of(memory)["front"][-1][1], 10)


def test_a_budget_that_was_never_reached_is_crossed_out() -> None:
    rows = ROWS + several("qa", "snapkv", 4096, [1.0, 1.0, 1.0, 0.6], ratio=1.01, evicted=False)
    for draw, place in ((budget_curves, (4096, 90)), (trade_off, (101, 90))):
        figure = draw(rows, "longbench")
        crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
        assert [tuple(*zip(*line.get_data(), strict=True)) for line in crosses] == [pytest.approx(place)]
        assert "crossed: never evicted" in legend_of(figure)


# -- score by memory -------------------------------------------------------------------------------------------------


def at(method: str, budget: int | None, ratio: float, score: float, **fields: object) -> dict:
    return several("qa", method, budget, [score], ratio=ratio, **fields)[0]


def test_the_front_is_what_nothing_else_beats() -> None:
    rows = [
        at("a", 10, 0.1, 0.30),
        at("a", 20, 0.2, 0.50),
        at("b", 20, 0.2, 0.40),  # as large, and worse
        at("b", 30, 0.3, 0.50),  # larger, and as good
        at("c", 40, 0.4, 0.70),
        at("d", 40, 0.4, 0.70),  # the same: both are on it
        at("e", 50, 0.5, 0.60),  # larger, and worse
        at("fullkv", None, 1.0, 0.90),
    ]
    figure = trade_off(rows, "longbench")
    (axes,) = figure.axes
    points = lines_of(axes)
    for row in rows:
        name = row["method"] if row["budget"] is None else f"{row['method']}, {row['budget']}"
        np.testing.assert_allclose(points[name], [(100 * row["ratio"], 100 * row["score"])])
    right = axes.get_xlim()[1]
    steps = [(10, 30), (20, 30), (20, 50), (40, 50), (40, 70), (40, 70), (40, 70), (100, 70), (100, 90), (right, 90)]
    np.testing.assert_allclose(points["front"], steps)
    named = [text.get_text() for text in axes.texts if text.get_text()]
    assert named == ["a, 10", "a, 20", "c, 40", "d, 40", "fullkv"]
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "Mean score (0 to 100)"
    assert all(label.get_text().endswith("%") for label in axes.get_xticklabels())


def test_the_front_takes_what_is_really_held_and_no_budget_that_was_never_reached() -> None:
    rows = [
        at("a", 10, 0.1, 0.30),
        at("masks", 10, 1.0, 0.35, memory="nominal"),
        at("short", 4096, 1.0, 0.95, evicted=False),
        at("fullkv", None, 1.0, 0.90, evicted=False),
    ]
    figure = trade_off(rows, "longbench")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["a, 10", "fullkv"]
    assert line_of(axes, "masks, 10").get_markerfacecolor() == "white"
    assert line_of(axes, "a, 10").get_markerfacecolor() != "white"
    assert legend_of(figure)[-3:] == [
        "front: nothing else is as small and as good",
        "hollow: masked and still held",
        "crossed: never evicted",
    ]
    assert not any(name.startswith(("hollow", "crossed")) for name in legend_of(trade_off(rows[:1], "longbench")))
    everything_kept = [at("short", 4096, 1.0, 0.95, evicted=False)]
    drawn(trade_off(everything_kept, "longbench"), "png")


def test_names_on_the_front_cover_neither_each_other_nor_a_point() -> None:
    budgets = [16, 32, 64, 128, 256, 512]
    rows = [
        at(method, budget, budget / 1024 * wide, 0.2 + 0.1 * number + 0.01 * wide)
        for number, budget in enumerate(budgets)
        for method, wide in (("snapkv:window_size=32", 1.0), ("h2o", 1.3), ("adakv", 0.8))
    ]
    (axes,) = trade_off(rows, "longbench").axes
    axes.figure.draw_without_rendering()
    labels = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(labels) > 6
    places = axes.transData.transform([(100 * row["ratio"], 100 * row["score"]) for row in rows])
    for number, box in enumerate(labels):
        assert not any(box.overlaps(other) for other in labels[:number])
        assert not any(box.contains(*place) for place in places)
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1


# -- latency ---------------------------------------------------------------------------------------------------------


def timed(method: str, budget: int | None, length: int, batch: int, *times: float) -> dict:
    """A row with its two times, or one that ran out of memory."""
    row = make_row(f"{length}x{batch}", method, budget, 0.0, length=length, batch_size=batch, oom=not times)
    del row["score"]
    seconds = dict(zip(("ttft_seconds", "tpot_seconds"), times, strict=False))
    return row | seconds | {"benchmark": "latency", "scores": [], "ratio": 1.0}


def test_latency_has_a_pair_of_panels_for_each_batch_size_and_a_line_for_each_configuration() -> None:
    rows = [
        timed("fullkv", None, 1024, 1, 1.0, 0.02),
        timed("fullkv", None, 2048, 1, 2.0, 0.04),
        timed("h2o", 64, 2048, 1, 2.5, 0.02),
        timed("h2o", 64, 1024, 1, 1.5, 0.02),
        timed("h2o", 64, 1024, 8, 12.0, 0.1),
        timed("fullkv", None, 1024, 8, 8.0, 0.2),
        timed("fullkv", None, 2048, 8),
    ]
    figure = latency_curves(rows)
    first, further, first_8, further_8 = figure.axes
    assert lines_of(first)["fullkv"] == [(1024, 1), (2048, 2)] and lines_of(first)["h2o, 64"] == [
        (1024, 1.5),
        (2048, 2.5),
    ]
    assert lines_of(further)["fullkv"] == [(1024, 0.02), (2048, 0.04)]
    assert lines_of(first_8)["fullkv"] == [(1024, 8)] and lines_of(further_8)["h2o, 64"] == [(1024, 0.1)]
    assert [axes.get_title() for axes in figure.axes] == ["one sequence"] * 2 + ["batch of 8"] * 2
    for axes in figure.axes:
        assert axes.get_xscale() == axes.get_yscale() == "log" and axes.get_xlabel() == "Prompt (tokens)"
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1024", "2048"]
    assert first.get_ylabel() == "Time to the first token (seconds)"
    assert legend_of(figure) == ["fullkv", "h2o, 64", "crossed, on top: out of memory"]
    assert not [line for line in first.lines if line.get_marker() == "x"]


def test_what_ran_out_of_memory_is_crossed_above_all_that_is_drawn() -> None:
    rows = [timed("fullkv", None, 1024, 1, 1.0, 0.02), timed("h2o", 64, 1024, 1, 900.0, 0.5)]
    rows += [timed(method, budget, 4096, 1) for method, budget in (("fullkv", None), ("h2o", 64), ("snapkv", 64))]
    for axes, longest in zip(latency_curves(rows).axes, (900.0, 0.5), strict=True):
        crosses = [line for line in axes.lines if line.get_marker() == "x"]
        assert [line.get_xdata()[0] for line in crosses] == [4096] * 3
        heights = [line.get_ydata()[0] for line in crosses]
        assert len(set(heights)) == 3 and max(heights) < 1
        assert axes.transAxes.transform((0, min(heights)))[1] > axes.transData.transform((1024, longest))[1]
    drawn(latency_curves(rows[2:]), "png")  # nothing that has a time


# -- names, numbers of methods, files --------------------------------------------------------------------------------

ODD = ["$x$_<method>&", "$\\frac{$", "_hidden", "snapkv:window_size=32:merge=pivot", "a\\b^{2}", "--", "方法"]


def test_names_are_data_in_both_files() -> None:
    rows = [row for method in ODD for row in several("$\\frac{$_<1>", method, 64, [0.5, 1.0])]
    for draw in (budget_curves, trade_off):
        figure = draw(rows, "longbench")
        assert legend_of(figure)[: len(ODD)] == ODD
        assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())
        assert not any(text.get_parse_math() for text in figure.axes[0].texts if text.get_text())
        assert "$\\frac{$_<1>" in figure.get_suptitle()
        root = ElementTree.fromstring(drawn(figure, "svg"))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_twenty_methods_look_different_and_the_legend_covers_nothing() -> None:
    methods = [f"method_{number}" for number in range(18)] + ["m:" + "setting=value:" * 6, "x" * 120]
    rows = [
        row
        for number, method in enumerate(methods)
        for budget in (64, 128, 256)
        for row in several("qa", method, budget, [number / 20, 0.5])
    ]
    rows += several("qa", "fullkv", None, [1.0, 1.0])
    figure = budget_curves(rows, "longbench")
    (axes,) = figure.axes
    looks = [
        (to_hex(line.get_color()), line.get_marker(), str(line._dash_pattern))
        for line in (line_of(axes, method) for method in methods)
    ]
    assert len(set(looks)) == 20 and len({look[1:] for look in looks[:9]}) == 9, "nine differ without their colour"
    assert "#000000" not in {colour for colour, *_ in looks}
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert len(legend_of(figure)) == 21 and legend.y1 <= axes.get_window_extent().y0
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.width and legend.y0 >= 0
    assert axes.get_window_extent().height > 0.5 * 5 * figure.dpi, "axes do not shrink for their legend"


def test_budgets_far_apart_and_close_together_have_labels_that_do_not_touch() -> None:
    budgets = [64, 65, 66, 70, 96, 128, 1024, 65536, 131072]
    rows = [row for budget in budgets for row in several("qa", "snapkv", budget, [0.5])]
    (axes,) = budget_curves(rows, "longbench").axes
    axes.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert [label.get_text() for label in axes.get_xticklabels()][-1] == "65536", "whole numbers, however large"


def test_the_same_rows_give_the_same_bytes() -> None:
    for kind in ("png", "svg"):
        assert drawn(trade_off(ROWS, "longbench"), kind) == drawn(trade_off(ROWS, "longbench"), kind)


def test_what_cannot_be_drawn_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="longbench: no row has a score or a perplexity"):
        budget_curves([], "longbench")
    with pytest.raises(UserError, match="needle: no row has a score or a perplexity"):
        trade_off(ROWS, "needle")
    with pytest.raises(UserError, match="longbench: no configuration has a budget"):
        budget_curves([row for row in ROWS if row["budget"] is None], "longbench")
    with pytest.raises(UserError, match="longbench: no row has a ratio"):
        trade_off([{**row, "ratio": None} for row in ROWS if row["budget"]], "longbench")
    with pytest.raises(UserError, match="no row has times by prompt length"):
        latency_curves(ROWS)


# -- scripts/visualize_curves.py -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def visualize():
    module = load_script("visualize_curves")

    def exit_code(*arguments) -> int:
        with pytest.raises(SystemExit) as stop:
            module.main([str(argument) for argument in arguments])
        return stop.value.code

    return exit_code


def written(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_script_draws_each_benchmark_of_each_run_apart(tmp_path, visualize, capsys) -> None:
    one, two = (
        written(tmp_path / "one", ROWS),
        written(tmp_path / "two", [row for row in ROWS if row["budget"] is None]),
    )
    three = written(tmp_path / "three", [timed("fullkv", None, 1024, 1, 1.0, 0.02)])
    assert visualize(one, two, three) == 0
    said = capsys.readouterr()
    files = [Path(line) for line in said.out.splitlines()]
    assert [path.name for path in files[::2]] == [
        "budget_longbench_one.png",
        "memory_longbench_one.png",
        "memory_longbench_two.png",
        "latency_latency.png",
    ]
    assert sorted(files) == sorted((one / "plots").iterdir())
    for picture, drawing in zip(files[::2], files[1::2], strict=True):
        assert picture.with_suffix(".svg") == drawing and imread(picture).ndim == 3
        ElementTree.parse(drawing)
    assert (
        said.err == "notice: longbench (two): no configuration has a budget, so there is nothing to draw against it\n"
    )
    assert visualize(two, "--output", tmp_path / "other") == 0
    assert {path.name for path in (tmp_path / "other" / "plots").iterdir()} == {
        "memory_longbench.png",
        "memory_longbench.svg",
    }


def test_the_script_says_what_is_wrong_in_one_line(tmp_path, visualize, capsys) -> None:
    bare = [{name: value for name, value in row.items() if name != "score"} | {"scores": []} for row in ROWS]
    for arguments, complaint in [
        ([], "Missing argument"),
        ([tmp_path / "nowhere"], "nowhere"),
        ([written(tmp_path / "empty", [])], "no rows yet"),
        ([written(tmp_path / "bare", bare)], "no row has a score"),
    ]:
        assert visualize(*arguments) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1 and complaint in said.err
