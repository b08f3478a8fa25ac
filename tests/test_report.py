"""Tables and figures: every number stands under the method, budget, group and cell that it came from."""

from __future__ import annotations

import importlib.util
import io
import json
import random
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from kvfactory.errors import UserError
from kvfactory.report.heatmaps import COLOURS, heatmap, overview, save_heatmaps, score_grids
from kvfactory.report.tables import by_fields, overall, percent, plain_table, print_table, summarise, wide


def make_row(group: str, method: str, budget: int | None, score: float, **fields: object) -> dict:
    number = len(made)
    made.append(number)
    row = {
        "benchmark": "longbench",
        "group": group,
        "example_id": f"{group}/{number}",
        "method": method,
        "budget": budget,
        "settings": {},
        "score": score,
        "kept_tokens_mean": float(budget or 1000),
        "read_tokens_mean": float(budget or 1000) + 8,
        "cache_bytes": 2**20,
        "full_cache_bytes": 2**22,
        "ratio": 0.25,
        "evicted": budget is not None,
        "memory": "physical",
        "prefill_seconds": 1.0,
        "compress_seconds": 0.5,
        "decode_seconds": 2.0,
    }
    row["scores"] = ["score", *(name for name in fields if name.startswith("rouge"))]
    return row | fields


made: list[int] = []


def shown(frame: pd.DataFrame) -> str:
    page = io.StringIO()
    print_table(frame, Console(file=page, width=100))
    return page.getvalue()


# -- tables ----------------------------------------------------------------------------------------------------------


def test_a_summary_is_what_the_hand_computes():
    rows = [
        make_row("hotpotqa", "snapkv", 64, 1.0, rougeL=0.5),
        make_row("hotpotqa", "fullkv", None, 0.5, rougeL=0.0, cache_bytes=2**22, ratio=1.0),
        make_row("hotpotqa", "snapkv", 64, 0.0, rougeL=0.25, cache_bytes=2**19, ratio=0.5, evicted=False),
        make_row("hotpotqa", "snapkv", 64, 1.0, rougeL=0.25, prefill_seconds=4.0, kept_tokens_mean=61.0),
    ]
    frame = summarise(rows)
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
    first, second = overall(summarise(rows)).to_dict("records")
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
    page = shown(summarise(rows))
    # method, budget, rows, score, kept tokens, evicted, cache in MiB, share of the full cache
    assert cells_of(page, "fullkv")[1:8] == ["full", "1", "50.00", "1000.0", "-", "3.0", "100.0%"]
    assert cells_of(page, "snapkv")[1:8] == ["64", "1", "50.00", "64.0", "always", "0.5", "25.0%"]
    assert cells_of(page, "adakv")[5:8] == ["50%", "1.0", "63.0%"]
    assert cells_of(page, "h2o")[5:8] == ["never", "3,072.0", "-"], "never evicted: no compression ratio"
    assert cells_of(page, "kivi")[5:8] == ["never", "1.0", "20.0%"], "its bytes shrank without eviction"
    assert cells_of(page, "mask")[6:8] == ["1.0*", "100.0%"]
    assert "* nominal" in page
    assert "nominal" not in shown(summarise(rows[:-1]))


def test_reading_less_than_is_kept_has_a_column():
    rows = [make_row("g", "fullkv", None, 1.0), make_row("g", "pages", None, 1.0, read_tokens_mean=264.13)]
    assert " 1000.0  264.1 " in shown(summarise(rows))
    assert "read" not in shown(summarise(rows[:1]))


def test_the_printed_table_fits_100_columns_and_shows_a_long_sweep_as_averages():
    methods = ["fullkv", "a_method_of_many_words:recent_size=32,heavy_ratio=0.1,pooling=maxpool", "[red]x[/red]"]
    slow = {"decode_seconds": 1234.5, "cache_bytes": 1023 * 2**20, "kept_tokens_mean": 131072.0, "memory": "nominal"}
    keys = [("passage_retrieval_en", method, budget) for method in methods for budget in (64, 131072)]
    few = shown(summarise([make_row(*key, 1.0, rougeL=1.0, **slow) for key in keys]))
    assert all(len(line.rstrip()) <= 100 for line in few.splitlines())
    assert "average" not in few and "longbench: passage_retrieval_en" in few
    assert "[red]x" in few and "1234.50" in few and "131072.0" in few
    many = [
        make_row(f"g{group}", method, 64, group / 20) for group, method in product(range(21), ["h2o", "snapkv", "x"])
    ]
    page = shown(summarise(many))
    assert "longbench: average of 21 groups" in page and "longbench: g3" not in page
    assert cells_of(page, "h2o")[:4] == ["h2o", "64", "21", "50.00"]
    assert "longbench: g3" in shown(summarise(many[:30]))


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
    assert summarise([]).empty and wide([]).empty and overall(summarise([])).empty
    assert shown(summarise([])) == "no rows yet\n"


# -- heatmaps --------------------------------------------------------------------------------------------------------


def needle(method: str, budget: int | None, length: int, depth: float, score: float, **fields: object) -> dict:
    return make_row("needle", method, budget, score, context_length=length, depth_percent=depth, **fields)


def test_a_grid_has_depths_down_lengths_across_and_gaps_where_there_are_no_rows():
    rows = [
        needle("snapkv", 64, 2000, 100.0, 0.25),
        needle("snapkv", 64, 2000, 0.0, 1.0),
        needle("snapkv", 64, 2000, 0.0, 0.5),
        needle("snapkv", 64, 10000, 11.0, 0.0),
        needle("fullkv", None, 2000, 11.5, 1.0),
    ]
    random.Random(0).shuffle(rows)
    grids = score_grids(rows)
    assert grids.keys() == {("snapkv", 64), ("fullkv", "full")}
    grid = grids["snapkv", 64]
    assert list(grid.index) == [0.0, 11.0, 11.5, 100.0] and list(grid.columns) == [2000, 10000]
    gap = np.nan
    np.testing.assert_array_equal(grid.to_numpy(), [[0.75, gap], [gap, 0.0], [gap, gap], [0.25, gap]])
    assert grids["fullkv", "full"].shape == grid.shape
    assert grids["fullkv", "full"].loc[11.5, 2000] == 1.0
    assert grids["fullkv", "full"].notna().to_numpy().sum() == 1


def colours_in(figure: Figure, panel: int, shape: tuple[int, int]) -> np.ndarray:
    """The colour near the upper left corner of each cell as painted, 0..1, from the top left; one panel of a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    box = figure.axes[panel].get_window_extent()
    top, left = picture.shape[0] - box.y1, box.x0
    height, width = box.height / shape[0], box.width / shape[1]
    return np.array(
        [
            [
                picture[int(top + (row + 0.15) * height), int(left + (column + 0.15) * width)]
                for column in range(shape[1])
            ]
            for row in range(shape[0])
        ]
    )


def test_depth_0_is_painted_on_top_and_depth_100_below_it():
    scores = {0.0: 1.0, 50.0: 0.5, 100.0: 0.0}
    rows = [needle("snapkv", 64, 4000, depth, score) for depth, score in scores.items()]
    (grid,) = score_grids(rows).values()
    figure = heatmap(grid, "snapkv, budget 64")
    painted = colours_in(figure, 0, (3, 1))[:, 0]
    np.testing.assert_allclose(
        painted, [[0x0C, 0xD7, 0x9F], [0xEB, 0xB8, 0x39], [0xF0, 0x49, 0x6E]] / np.float64(255), atol=0.02
    )
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "50", "100"]
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.50", "0.00"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Token Limit", "Depth Percent")
    assert figure.axes[1].get_ylabel() == "Score"
    assert axes.get_title() == "snapkv, budget 64\nmean 0.50"


def test_each_panel_of_the_overview_is_painted_with_its_own_scores():
    configurations = [
        ("fullkv", None, 0.9),
        ("cam", 128, 0.7),
        ("cam", 64, 0.6),
        ("l2norm", 64, 0.1),
        ("l2norm", 128, 0.2),
    ]
    rows = [
        needle(*key, length, depth, score) for *key, score in configurations for length in (1, 2) for depth in (0, 9)
    ]
    figure = overview(score_grids(rows[:-1]))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [  # a line per method, budgets ascending; the last place is the colour bar's
        "fullkv, budget full\nmean 0.90",
        "",
        "cam, budget 64\nmean 0.60",
        "cam, budget 128\nmean 0.70",
        "l2norm, budget 64\nmean 0.10",
        "l2norm, budget 128\nmean 0.20 (3 of 4 cells)",
        "",
    ]
    for panel, score in {0: 0.9, 2: 0.6, 3: 0.7, 4: 0.1}.items():
        painted = colours_in(figure, panel, (2, 2))
        np.testing.assert_allclose(painted, np.broadcast_to(COLOURS(score)[:3], (2, 2, 3)), atol=0.02)
    missing = colours_in(figure, 5, (2, 2))[1, 1]
    assert missing.min() > 0.8, "a missing cell is white or the grey of its hatching, never the colour of 0"


@pytest.mark.parametrize(("lengths", "depths"), [(2, 5), (10, 10), (71, 10)])
def test_texts_of_a_large_overview_stay_in_their_places(lengths, depths):
    methods = ["fullkv", "snapkv:window_size=32,kernel_size=7,pooling=maxpool", "h2o", "adakv", "cam", "l2norm"]
    places = list(product(range(1000, 1000 + 100 * lengths, 100), np.linspace(0, 100, depths).round()))
    configurations = [
        (method, budget) for method in methods for budget in ([None] if method == "fullkv" else [64, 128, 256])
    ]
    figure = overview(score_grids([needle(*key, *place, 0.5) for key in configurations for place in places]))
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert len(panels) == 16
    whole = {axes: axes.get_tightbbox() for axes in panels}
    for axes in panels:
        box, title = axes.get_window_extent(), axes.title.get_window_extent()
        assert title.x0 >= 0 and title.x1 <= figure.bbox.width and title.y1 <= figure.bbox.height
        assert not any(whole[axes].overlaps(whole[other]) for other in panels if other is not axes)
        labels = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert not any(one.overlaps(other) for one, other in pairwise(labels))
        cell = box.width / lengths, box.height / depths
        apart = np.diff(axes.get_xticks()).min() * cell[0] / np.sqrt(2)  # between neighbours that slant by 45 degrees
        assert apart > axes.get_xticklabels()[0].get_fontsize() * figure.dpi / 72
        for text in axes.texts:
            extent = text.get_window_extent()
            assert extent.width < cell[0] and extent.height < cell[1]
    assert bool(panels[0].texts) == (lengths <= 10), "scores are written where the cells have room"


def test_every_configuration_gets_a_file_of_its_own(tmp_path):
    methods = ["h2o:recent_size=32", "h2o/recent_size=32", "H2O:recent_size=32", "a,b", "../../evil", "$x$", "m" * 300]
    rows = [needle(method, budget, 1000, 0, 0.5) for method in methods for budget in (64, 128)]
    paths = save_heatmaps(rows, tmp_path / "run")
    assert paths[0].name == "needle_all.png"
    assert len({path.name.lower() for path in paths}) == len(paths) == 15
    assert sorted(paths) == sorted((tmp_path / "run" / "plots").iterdir())
    assert all(imread(path).shape[2] == 4 for path in paths)
    assert paths[1].name == "needle_h2o_recent_size_32_64.png"


def test_rows_that_cannot_be_drawn_are_refused_by_name(tmp_path):
    good = needle("h2o", 64, 1000, 0, 0.5, rouge1=0.5, judge=7.0)
    with pytest.raises(UserError, match="no needle rows"):
        save_heatmaps([make_row("qa", "h2o", 64, 1.0)], tmp_path)
    with pytest.raises(UserError, match="unknown score 'rouge'; did you mean 'rouge1'"):
        save_heatmaps([good], tmp_path, "rouge")
    with pytest.raises(UserError, match=r"'judge' runs from 7 to 7; heatmaps show 0\.\.1"):
        save_heatmaps([good], tmp_path, "judge")
    assert not (tmp_path / "plots").exists()


# -- scripts/visualize_needle.py -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def visualize():
    path = Path(__file__).parents[1] / "scripts" / "visualize_needle.py"
    spec = importlib.util.spec_from_file_location("visualize_needle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def exit_code(*arguments) -> int:
        with pytest.raises(SystemExit) as stop:
            module.main([str(argument) for argument in arguments])
        return stop.value.code

    return exit_code


def test_visualize_needle_draws_what_a_run_folder_holds(tmp_path, visualize, capsys):
    rows = [needle("h2o", 64, 1000, depth, 0.5, rouge1=1.0) for depth in (0, 100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert visualize(tmp_path) == 0
    assert capsys.readouterr().out.split() == [str(path) for path in sorted((tmp_path / "plots").iterdir())]
    assert visualize(tmp_path, "--output", tmp_path / "other", "--score", "rouge1") == 0
    first, second = (imread(tmp_path / where / "needle_h2o_64.png") for where in ("plots", "other/plots"))
    assert first.shape == second.shape and not np.array_equal(first, second)


def test_visualize_needle_says_what_is_wrong_in_one_line(tmp_path, visualize, capsys):
    for arguments, complaint in [
        ([tmp_path], "not a run folder"),
        ([], "Missing argument"),
        ([tmp_path, "--nonsense"], "--nonsense"),
    ]:
        assert visualize(*arguments) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1 and complaint in said.err
