"""Needle heatmaps: every number stands in the cell, and under the method and budget, that it came from."""

from __future__ import annotations

import json
import random
from itertools import pairwise, product
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from rows import make_row

from kvfactory.errors import UserError
from kvfactory.report.heatmaps import heatmap, overview, save_heatmaps, score_grids
from scripts import load_script

VIRIDIS = colormaps["viridis"]


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
        painted, [[0xFD, 0xE7, 0x25], [0x21, 0x91, 0x8C], [0x44, 0x01, 0x54]] / np.float64(255), atol=0.02
    )
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "50", "100"]
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.50", "0.00"]
    assert [text.get_color() for text in axes.texts] == ["black", "black", "white"], "to be read on their cells"
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
        np.testing.assert_allclose(painted, np.broadcast_to(VIRIDIS(score)[:3], (2, 2, 3)), atol=0.02)
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
    assert len({path.name.lower() for path in paths}) == len(paths) == 30
    assert sorted(paths) == sorted((tmp_path / "run" / "plots").iterdir())
    pictures, drawings = paths[::2], paths[1::2]
    assert all(imread(path).shape[2] == 4 for path in pictures)
    assert all(ElementTree.parse(path).getroot().tag.endswith("}svg") for path in drawings)
    assert [path.stem for path in pictures] == [path.stem for path in drawings]
    assert pictures[1].name == "needle_h2o_recent_size_32_64.png"


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
    module = load_script("visualize_needle")

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
