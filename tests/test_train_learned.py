"""`kvfactory train-learned`: AUC, labels, the split, and the command from a text to a file that the method reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from entry_points import exit_code
from hypothesis import given
from hypothesis import strategies as st
from kvfactory_plugins._training import PROTECTED, Task, Training, auc, cut, future_attention, train
from kvfactory_plugins.learned import Layout, Learned, Scorer, read_weights
from kvfactory_plugins.train_learned import documents_of, split, spread_over, write
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kvfactory import Engine, LayerContext, load_method, load_model
from kvfactory.testing import TINY, reference_attention, tiny_model


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auc_is_the_share_of_pairs_in_order(pairs: list[tuple[int, bool]]) -> None:
    scores = torch.tensor([float(score) for score, _ in pairs])
    labels = torch.tensor([label for _, label in pairs])
    above, below = scores[labels], scores[~labels]
    if not len(above) or not len(below):
        return
    apart = above[:, None] - below
    expected = ((apart > 0).double() + (apart == 0).double() / 2).mean()
    both = auc(torch.stack([scores, -scores]), torch.stack([labels, labels]))
    torch.testing.assert_close(both, torch.stack([expected, 1 - expected]))


def a_layer(tokens: int) -> LayerContext:
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(heads, tokens, 8, generator=generator) for heads in (4, 2, 2))
    return LayerContext(0, 1, queries, keys, values, inverse_frequencies=torch.ones(4))


def test_labels_are_what_later_queries_attend_to_most() -> None:
    layer = a_layer(200)
    mass = reference_attention(layer.queries, layer.keys)[:, 120:, :120].sum(1).unflatten(0, (2, 2)).mean(1)
    torch.testing.assert_close(future_attention(layer, 120), mass.float(), rtol=1e-4, atol=1e-5)
    task = Task(120, 80, 0.1, ("key",), 8)
    first, last = PROTECTED
    best = mass[:, first : 120 - last].topk(11).indices.sort().values  # a tenth of the 108 tokens that compete
    labels = task.labels(layer)
    assert labels.shape == (2, 108)
    assert [row.nonzero()[:, 0].tolist() for row in labels] == best.tolist()


def test_features_know_nothing_of_what_comes_later() -> None:
    layer, other = a_layer(100), a_layer(100)
    for each in (other.queries, other.keys, other.values):
        each[:, 60:] = 9.0
    task = Task(60, 40, 0.1, ("key",), 8)
    for ours, theirs in zip(vars(task.context(layer)).items(), vars(task.context(other)).items(), strict=True):
        assert not isinstance(ours[1], Tensor) or torch.equal(ours[1], theirs[1]), ours[0]
    assert cut(layer, 60).num_tokens == 60 and cut(layer, 60).queries.shape[1] == 60


def test_the_split_is_by_document() -> None:
    documents = [[number] for number in range(12)]
    training, validation = split(documents)
    assert validation == [[4], [9]] and training == [each for each in documents if each not in validation]
    assert split(documents[:2]) == ([[0]], [[1]])
    assert spread_over(documents, 4) == [[0], [3], [6], [9]] and spread_over(documents, 20) == documents


@pytest.mark.parametrize("shared_by", ["head", "layer", "model"])
def test_a_planted_rule_is_learned_and_survives_the_file(shared_by: str, tmp_path: Path) -> None:
    """Tokens count whose first channel is far from 5, which is no linear function of it."""
    generator = torch.Generator().manual_seed(1)

    def samples(count: int) -> tuple[Tensor, Tensor]:
        keys = 3 * torch.randn(2, 2, count, 8, generator=generator) + 5
        return keys.half(), (keys[..., 0] - 5).abs() > 4

    how = Training(hidden=(16,), shared_by=shared_by, epochs=15, batch_size=50, learning_rate=2e-2, seed=0)
    data = samples(400), samples(100)
    tensors = train(*data, how)
    layout = Layout(2, 4, 2, 8, ("key",), 8)
    layer = a_layer(300)
    layer.num_layers, layer.keys = 2, 3 * layer.keys + 5
    before = Scorer(layout, tensors).logits(layer)
    assert auc(before, (layer.keys[..., 0] - 5).abs() > 4).min() > 0.95
    shape = {"num_layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 8, "window_size": 8}
    write(tmp_path / "x.safetensors", tensors, {"format": 1, "features": ["key"]} | shape)
    method = Learned(budget=20, weights=str(tmp_path / "x.safetensors"))
    assert torch.equal(method.score(layer), before.sigmoid())
    again = train(*data, how)
    assert all(torch.equal(again[name], each) for name, each in tensors.items())


# ---- the command ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a folder, with a tokenizer of numbers and texts of them."""
    path = tmp_path_factory.mktemp("tiny")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{each}": each for each in range(3, TINY["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(path)
    tiny_model().save_pretrained(path)
    generator = torch.Generator().manual_seed(5)
    for name, count in (("novel", 1500), ("manual", 300), ("short", 100)):
        numbers = torch.randint(3, TINY["vocab_size"], (count,), generator=generator).tolist()
        (path / f"{name}.txt").write_text(" ".join(f"w{each}" for each in numbers))
    return path


def train_learned(folder: Path, output: Path, *flags: str, text: str = "novel.txt") -> int:
    given = ["--model_path", str(folder), "--text", str(folder / text), "--output", str(output), "--device", "cpu"]
    sizes = ["--context_length", "100", "--horizon", "40", "--batch_size", "64", "--dtype", "float32"]
    return exit_code("kvfactory", ["train-learned", *given, *sizes, *flags])


def test_from_a_text_to_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "mine.safetensors"
    flags = ["--held_out", str(folder / "manual.txt"), "--epochs", "6", "--hidden", "16,8", "--learning_rate", "0.01"]
    assert train_learned(folder, output, *flags) == 0
    said = capsys.readouterr().out
    assert all(each in said for each in ("learned", "snapkv", "recency", "validation", "held out", "mine.safetensors"))
    facts = json.loads(output.with_suffix(".json").read_text())
    assert facts["auc"]["validation"]["learned"] > 0.6 and facts["auc"]["held out"]["learned"] > 0.6
    assert facts["texts"][0]["name"] == "novel" and str(tmp_path) not in json.dumps(facts)
    assert (facts["training"]["documents"], facts["auc"]["validation"]["documents"]) == (8, 2)
    assert sorted(file.name for file in output.parent.iterdir()) == ["mine.json", "mine.safetensors"]
    layout = read_weights(str(output)).layout
    assert (layout.num_layers, layout.query_heads, layout.kv_heads, layout.head_dim) == (3, 8, 2, 8)
    model, tokenizer = load_model(folder, dtype="float32", device="cpu")
    ids = documents_of((folder / "manual.txt").read_text(), tokenizer, 100)[0]
    for settings in ({}, {"decode_budget": "same"}, {"allocator": "head-adaptive"}):
        method = load_method("learned", budget=32, weights=str(output), **settings)
        engine = Engine(model, tokenizer)
        assert len(engine.decode(engine.prefill(ids, [method]), 4)[0]) == 4


def test_the_same_seed_makes_the_same_files(folder: Path, tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--features", "unrotated_key,log_distance", "--documents", "3"]
    for name in ("a", "b"):
        assert train_learned(folder, tmp_path / f"{name}.safetensors", *flags) == 0
    assert train_learned(folder, tmp_path / "c.safetensors", *flags, "--seed", "1") == 0
    tables = [load_file(tmp_path / f"{name}.safetensors") for name in "abc"]
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert not torch.equal(tables[0]["0.weight"], tables[2]["0.weight"])


@pytest.mark.parametrize(
    ("flags", "text", "told"),
    [
        ([], "nowhere.txt", "nowhere.txt: no text can be read"),
        ([], "short.txt", "the texts make 0 documents of 140 tokens"),
        (["--features", "kye"], "novel.txt", "unknown feature 'kye'; did you mean 'key'?"),
        (["--held_out", "short.txt"], "novel.txt", "shorter than one document of 140 tokens"),
        (["--top_share", "0.9"], "novel.txt", "--top_share"),
    ],
)
def test_bad_input_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], text: str, told: str
) -> None:
    flags = [str(folder / each) if each.endswith(".txt") else each for each in flags]
    assert train_learned(folder, tmp_path / "x.safetensors", *flags, text=text) == 2
    said = capsys.readouterr().err.strip()
    assert told in said and "\n" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("output", "told"), [("x.bin", "ends in .safetensors"), ("taken/x.safetensors", "written")])
def test_the_output_is_looked_at_before_the_work_begins(
    folder: Path, tmp_path: Path, output: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    assert train_learned(folder, tmp_path / output, text="no such file") == 2
    said = capsys.readouterr().err.strip()
    assert output in said and told in said and "\n" not in said
