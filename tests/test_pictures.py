"""Pictures of single prompts and what all figures share: what is drawn is what the model and the stores have."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from rich.cells import cell_len

from kvfactory import Engine, LayerContext, UserError, load_method
from kvfactory.jobs import make_jobs
from kvfactory.models import load_tokenizer
from kvfactory.registry import get_registry
from kvfactory.report.figures import (
    COLOUR_MAP,
    PALETTE,
    drawn,
    free_name,
    grid_of,
    ink,
    new_figure,
    printable,
    save_figure,
    show_image,
    wrapped,
)
from kvfactory.testing import TINY_CONFIGS, reference_attention, tiny_model, tiny_prompts
from scripts import load_script

ROOT = Path(__file__).parents[1]
TEXT = "The keeper counted $x_1$ <steps> every evening."


@pytest.fixture(scope="module")
def attention() -> ModuleType:
    return load_script("visualize_attention")


@pytest.fixture(scope="module")
def retention() -> ModuleType:
    return load_script("visualize_retention")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model of a few layers, with a real tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "small"
    tokenizer = load_tokenizer()
    tokenizer.save_pretrained(folder)
    config = type(TINY_CONFIGS["llama"])(**TINY_CONFIGS["llama"].to_dict() | {"vocab_size": len(tokenizer)})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = type(tiny_model())(config)
    model.save_pretrained(folder)
    return folder


def run(script: ModuleType, *arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        script.main([str(argument) for argument in arguments])
    return stop.value.code


def whole(files: list[Path]) -> None:
    """Every PNG has its SVG, and both can be read."""
    pictures, drawings = ([file for file in files if file.suffix == kind] for kind in (".png", ".svg"))
    assert pictures and [file.stem for file in pictures] == [file.stem for file in drawings]
    for picture, drawing in zip(pictures, drawings, strict=True):
        assert imread(picture).ndim == 3
        assert ElementTree.parse(drawing).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def seen(engine: Engine, ids: list[int]) -> list[torch.Tensor]:
    """Attention of each layer, [query_heads, queries, keys], by the slow obvious formula."""
    layers: list[LayerContext] = []
    everything = load_method("fullkv")
    spy = SimpleNamespace(compress=lambda layer: layers.append(layer) or everything.compress(layer))
    spy.finish = lambda stores, prompt: stores
    engine.prefill(ids, [spy])
    return [reference_attention(layer.queries, layer.keys) for layer in layers]


# -- scripts/visualize_attention.py ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_attention_is_that_of_every_layer_and_head(attention: ModuleType, family: str) -> None:
    engine = Engine(tiny_model(family), SimpleNamespace(decode=lambda ids, **_: "x", convert_ids_to_tokens=str))
    ids = tiny_prompts(30)[0][0].tolist()
    found, expected = attention.watch(engine, ids, [0, 2]), seen(engine, ids)
    means = torch.stack([each.mean(0) for each in expected])
    np.testing.assert_allclose(found.means, means, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.mass, means.sum(1), rtol=1e-4, atol=1e-5)
    assert found.heads.keys() == {0, 2} and len(found.tokens) == 30
    np.testing.assert_allclose(found.heads[2], expected[2], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.mass.sum(1), 30, rtol=1e-5)


def uniform(attention: ModuleType, layers: int, tokens: int) -> Any:
    """Every query looks at all keys alike."""
    weights = np.tril(np.ones((tokens, tokens))) / np.arange(1, tokens + 1)[:, None]
    texts = [" a", "\n", "$b$", "<c>"] * (tokens // 4) + ["d"] * (tokens % 4)
    return attention.Attention(texts, np.stack([weights * 1.0] * layers), {1: np.stack([weights] * 4)})


def test_panels_show_the_weights_with_the_future_masked_and_few_tokens_by_name(attention: ModuleType) -> None:
    found = uniform(attention, layers=6, tokens=9)
    found.means[4, 8] = np.eye(9)[3]
    figure = attention.draw_overview(found)
    panels = figure.axes[:6]
    assert [axes.get_title() for axes in panels] == [f"layer {layer}" for layer in range(6)]
    for layer, axes in enumerate(panels):
        (image,) = axes.images
        drawn_weights = image.get_array()
        assert drawn_weights.mask[0].tolist() == [False] + [True] * 8 and not drawn_weights.mask[8].any()
        np.testing.assert_allclose(drawn_weights.filled(0), found.means[layer])
        assert (image.norm.vmin, image.norm.vmax) == (attention.LEAST, 1) and type(image.norm).__name__ == "LogNorm"
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names == ["·a", "↵", "$b$", "<c>", "·a", "↵", "$b$", "<c>", "d"]
    assert not any(label.get_parse_math() for label in panels[3].get_xticklabels())
    drawn(figure, "svg")


def test_heads_stand_under_their_own_numbers(attention: ModuleType) -> None:
    found = uniform(attention, layers=3, tokens=9)
    found.heads[1][3] = np.eye(9)
    figure = attention.draw_layer(found, 1, [3, 0], kv_heads=2)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["head 3 (KV head 1)", "head 0 (KV head 0)"]
    for axes, head in zip(figure.axes, (3, 0), strict=False):
        np.testing.assert_allclose(axes.images[0].get_array().filled(0), found.heads[1][head])
    (alone,) = attention.draw_layer(found, 1, [2], kv_heads=4).axes[:1]
    assert alone.get_title() == "head 2", "without groups there is no more to say"


def test_long_prompts_have_positions_and_their_heaviest_tokens_named(attention: ModuleType) -> None:
    found = uniform(attention, layers=2, tokens=60)
    found.means[:, 20:, 14] += 5.0
    figure = attention.draw_mass(found)
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), found.means.sum(1))
    (top,) = axes.child_axes
    named = [label.get_text() for label in top.get_xticklabels()]
    assert named[0] == "$b$ 14" and "· 4" not in named
    figure.draw_without_rendering()
    below = [label.get_text() for label in axes.get_xticklabels()]
    assert below and all(text.lstrip("−").isdigit() for text in below)


def test_the_heaviest_tokens_stand_apart(attention: ModuleType) -> None:
    mass = np.array([1.0, 9.0, 8.0, 2.0, 7.0, 7.0])
    assert attention.heaviest(mass, most=3, apart=0) == [1, 2, 4]
    assert attention.heaviest(mass, most=9, apart=1) == [1, 4]  # all others stand beside one of them


def test_the_script_draws_the_chosen_layers_and_heads(
    attention: ModuleType, small: Path, tmp_path: Path, capsys
) -> None:
    where = ["--model_path", small, "--dtype", "float32", "--output", tmp_path / "a", "--prompt", TEXT]
    assert run(attention, *where, "--chat_template", "none", "--layers", "0,2", "--heads", "5,1") == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(files) == sorted((tmp_path / "a").iterdir())
    whole(files)
    names = {file.name for file in files}
    assert {"attention_layer_0.svg", "attention_layer_2.png", "attention_mass.png", "attention.json"} <= names
    assert "attention_layer_1.png" not in names
    numbers = json.loads((tmp_path / "a" / "attention.json").read_text())
    assert "".join(numbers["tokens"]) == TEXT
    arrays = np.load(tmp_path / "a" / "attention.npz")
    np.testing.assert_allclose(numbers["mass"], arrays["mass"], atol=1e-5)
    np.testing.assert_allclose(arrays["means"].astype(float).sum(1), numbers["mass"], atol=2e-2)


def test_what_cannot_be_seen_is_refused_in_one_line(
    attention: ModuleType, retention: ModuleType, small: Path, tmp_path: Path, capsys
) -> None:
    where = ["--model_path", small, "--output", tmp_path / "never"]
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for script, arguments, complaint in [
        (attention, ["--layers", "0,3"], "--layers 3: the model has layers 0 to 2"),
        (attention, ["--heads", "8"], "--heads 8: the model has heads 0 to 7"),
        (attention, ["--max_tokens", "10"], "--max_tokens is 10; shorten the prompt, or give a larger number"),
        (attention, ["--prompt", " "], "--prompt: the prompt is empty"),
        (attention, ["--prompt", "a", "--prompt_file", binary], "leave one out"),
        (retention, ["--prompt_file", binary], f"--prompt_file {binary}: no text file in UTF-8"),
        (retention, ["--prompt", "word " * 600], "--prompt: 6"),
        (retention, ["--method", "snapvk"], "did you mean 'snapkv'"),
        (retention, ["--max_capacity_prompts", "0"], "'0' is no budget"),
    ]:
        assert run(script, *where, *arguments) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
        assert complaint in said.err
    assert not (tmp_path / "never").exists()


def test_a_sliding_window_that_a_prompt_outgrows_is_refused(
    attention: ModuleType, small: Path, tmp_path: Path, capsys
) -> None:
    folder = shutil.copytree(small, tmp_path / "mistral")
    config = json.loads((folder / "config.json").read_text())
    changed = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8}
    (folder / "config.json").write_text(json.dumps(config | changed))
    where = ["--model_path", folder, "--output", tmp_path / "never", "--prompt", TEXT]
    assert run(attention, *where) == 2
    assert "the model attends to the last 8 alone" in capsys.readouterr().err


# -- scripts/visualize_retention.py ----------------------------------------------------------------------------------


def test_retention_is_what_the_stores_hold(retention: ModuleType) -> None:
    engine, ids = Engine(tiny_model()), tiny_prompts(40)[0][0].tolist()
    jobs = make_jobs(get_registry(), ["streamingllm", "snapkv:window_size=4", "fullkv"], [12, 20])
    found = retention.read(engine, ids, jobs)
    assert [(each.method, each.budget) for each in found] == [
        *[("streamingllm", 12), ("streamingllm", 20), ("snapkv:window_size=4", 12), ("snapkv:window_size=4", 20)],
        ("fullkv", "full"),
    ]
    sinks = np.zeros((3, 40))
    sinks[:, :4] = sinks[:, -8:] = 1
    np.testing.assert_array_equal(found[0].kept, sinks)
    (sequence,) = engine.prefill(ids, [jobs[2].method])
    held = np.zeros((3, 40))
    for layer, store in enumerate(sequence.cache.stores):
        for head in store.positions():
            held[layer, head.numpy()] += 1 / len(store.positions())
    np.testing.assert_allclose(found[2].kept, held)
    assert (held % 1 > 0).any(), "heads differ"
    assert [each.kept_tokens_mean for each in found] == [12, 20, 12, 20, 40]
    assert found[4].ratio == 1 and found[4].kept.min() == 1
    assert found[2].title == f"snapkv:window_size=4, 12\n12.0 tokens a head, {found[2].ratio:.1%} of the full cache"
    figure = retention.draw_layers(found, ["x"] * 40)
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown[:5]] == [each.title for each in found]
    for axes, each in zip(shown, found, strict=False):
        np.testing.assert_array_equal(axes.images[0].get_array(), each.kept)
        assert axes.images[0].get_clim() == (0, 1)


def kept(retention: ModuleType, method: str, shares: list[float]) -> Any:
    """Of two layers, whose mean these shares are."""
    low = np.minimum(2 * np.array(shares), 1)
    return retention.Retention(method, 64, np.stack([low, 2 * np.array(shares) - low]), 8.0, 0.1)


def test_the_text_stands_on_the_colours_of_its_tokens(retention: ModuleType) -> None:
    tokens = ["The", " $cat", " <sat", ">.", "\n\n", "Why", "?"]
    shares = [[0.0, 0.25, 0.5, 0.75, 1.0, 0.1, 0.9], [1.0] * 7]
    figure = retention.draw_text([kept(retention, "h2o", shares[0]), kept(retention, "all", shares[1])], tokens)
    first, second, bar = figure.axes
    texts = [(text.get_text(), text.get_position()[0]) for text in first.texts]
    assert texts == [("The", 0), (" $cat", 3), (" <sat", 8), (">.", 13), ("↵", 15), ("↵", 0), ("Why", 0), ("?", 3)]
    (boxes,) = first.collections
    np.testing.assert_allclose(boxes.get_array(), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 0.1, 0.9])
    places = [path.vertices.min(0).tolist() for path in boxes.get_paths()]
    assert places[4:7] == [[15, 0], [0, 1], [0, 2]]
    assert second.collections[0].get_array().tolist() == [1.0] * 8
    viridis = colormaps[COLOUR_MAP]
    assert [text.get_color() for text in first.texts[:2]] == [ink(viridis(0.0)), ink(viridis(0.25))] == ["white"] * 2
    assert {text.get_color() for text in second.texts} == {ink(viridis(1.0))} == {"black"}
    assert first.get_title(loc="left").startswith("h2o, 64\n8.0 tokens a head, 10.0%")
    assert bar.get_xlabel() == "Share of all heads that kept the token"
    drawn(figure, "svg")


def test_of_a_long_text_the_end_is_shown_and_that_is_said(retention: ModuleType) -> None:
    tokens = [f" {number}" for number in range(500)]
    figure = retention.draw_text([kept(retention, "h2o", [0.0] * 100 + [0.5] * 400)], tokens)
    block, bar = figure.axes
    assert [text.get_text() for text in block.texts] == tokens[100:]
    assert set(block.collections[0].get_array()) == {0.5}
    assert bar.get_xlabel().endswith("the last 400 of 500 tokens")


@given(st.lists(st.text(" ab\n方é", max_size=7), max_size=30), st.integers(4, 12))
@settings(max_examples=60)
def test_text_is_set_in_lines_that_fit_and_loses_nothing(texts: list[str], letters: int) -> None:
    pieces = load_script("visualize_retention").set_lines(texts, letters)
    assert "".join(piece.text for piece in pieces) == printable("".join(texts))
    for token, text in enumerate(texts):
        assert "".join(piece.text for piece in pieces if piece.token == token) == printable(text)
    free: dict[int, int] = {}
    for piece in pieces:
        assert piece.text and piece.column == free.get(piece.line, 0), "no gaps, and nothing on top of each other"
        free[piece.line] = piece.column + cell_len(piece.text)
        assert free[piece.line] <= letters
    assert [piece.line for piece in pieces] == sorted(piece.line for piece in pieces)


def test_lines_break_between_words(retention: ModuleType) -> None:
    def lines(texts: list[str], letters: int) -> list[str]:
        pieces = retention.set_lines(texts, letters)
        return ["".join(each.text for each in pieces if each.line == line) for line in range(pieces[-1].line + 1)]

    assert lines(["The", " light", "house", " was", " lit"], 12) == ["The", " lighthouse", " was lit"]
    assert lines(["a\n", "\nb", " c"], 12) == ["a↵", "↵", "b c"]
    assert lines(["abc", "def", "ghi", " j"], 7) == ["abcdef", "ghi j"], "a word longer than a line: between its tokens"
    assert lines(["abcdefghij"], 4) == ["abcd", "efgh", "ij"]


def test_the_script_draws_methods_side_by_side(retention: ModuleType, small: Path, tmp_path: Path, capsys) -> None:
    asked = ["--method", "streamingllm,h2o", "--max_capacity_prompts", "16,50%", "--prompt", TEXT, "--dtype", "float32"]
    assert run(retention, "--model_path", small, "--output", tmp_path / "r", *asked) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(files) == sorted((tmp_path / "r").iterdir())
    whole(files)
    numbers = json.loads((tmp_path / "r" / "retention.json").read_text())
    assert TEXT in "".join(numbers["tokens"])
    assert [(each["method"], each["budget"]) for each in numbers["configurations"]] == [
        *[("streamingllm", 16), ("streamingllm", "50%"), ("h2o", 16), ("h2o", "50%")],
    ]
    for each in numbers["configurations"]:
        shares = np.array(each["kept"])
        assert shares.shape == (3, len(numbers["tokens"]))
        assert shares.sum(1).mean() == pytest.approx(each["kept_tokens_mean"])


# -- what all figures share ------------------------------------------------------------------------------------------


def test_a_figure_becomes_two_files_that_are_the_same_every_time(tmp_path: Path) -> None:
    def make() -> Any:
        figure = new_figure(3, 2)
        figure.add_subplot().plot([1, 2], label="a<b>")
        return figure

    paths = save_figure(make(), tmp_path / "new" / "folder", "curve")
    assert paths == [tmp_path / "new" / "folder" / "curve.png", tmp_path / "new" / "folder" / "curve.svg"]
    assert sorted(paths) == sorted((tmp_path / "new" / "folder").iterdir()), "no drafts are left"
    whole(paths)
    again = save_figure(make(), tmp_path, "curve")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"curve\.png: cannot be written"):
        save_figure(make(), tmp_path / "file", "curve")


def test_names_of_files_differ_whatever_labels_differ_by() -> None:
    taken: list[str] = []
    for label in ["a:b", "a/b", "A:b", "../b", "a (b)", "方法", "m" * 300, "m" * 200]:
        taken.append(free_name(label, taken))
    assert taken == ["a_b", "a_b-2", "A_b-3", ".._b", "a_b-4", "figure", "m" * 100, "m" * 100 + "-2"]


@given(st.text("ab:=, _$", max_size=60), st.integers(5, 30))
def test_a_wrapped_name_is_the_name_in_short_lines(name: str, width: int) -> None:
    lines = wrapped(name, width).split("\n")
    assert all(len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")


def test_a_name_is_broken_where_its_settings_are() -> None:
    assert wrapped("snapkv:window_size=32:merge=pivot, 64", 24) == "snapkv:window_size=32:\nmerge=pivot, 64"


def test_ink_can_be_read_on_every_colour() -> None:
    def brightness(colour: Any) -> float:
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
        return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))

    for colour in [*PALETTE, *colormaps[COLOUR_MAP](np.linspace(0, 1, 101))[:, :3]]:
        dark, bright = sorted((brightness(ink(colour)), brightness(colour)))
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, "the contrast that WCAG 2.1 asks for"


def test_panels_fill_their_grid() -> None:
    assert [grid_of(count) for count in (1, 2, 9, 30, 32, 80)] == [(1, 1), (1, 2), (3, 3), (5, 6), (4, 8), (8, 10)]
    for count in range(1, 100):
        lines, columns = grid_of(count)
        assert (lines - 1) * columns < count <= lines * columns
        assert math.sqrt(count) <= columns <= 1.5 * math.ceil(math.sqrt(count))


def test_cells_are_sharp_where_they_have_a_pixel_each() -> None:
    axes = new_figure(2, 2).add_subplot()
    assert show_image(axes, np.zeros((9, 9))).get_interpolation() == "nearest"
    assert show_image(axes, np.zeros((9, 999))).get_interpolation() == "auto"
