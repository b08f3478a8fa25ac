"""The script that measures which heads retrieve."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvfactory import Engine, LayerContext, load_method
from kvfactory.benchmarks.haystack import load_haystack
from kvfactory.benchmarks.needle import Needle
from kvfactory.budget_tables import read_head_table
from kvfactory.chat import chat_ids
from kvfactory.models import load_tokenizer
from kvfactory.testing import reference_attention, tiny_model, tiny_prompts
from scripts import load_script

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("score_heads")


def needles(tokenizer: Any, *depths: float) -> Needle:
    place = {"lengths": [160], "depths": depths, "samples": 1, "haystack": load_haystack()}
    return Needle(tokenizer, style="number", **place, chat=partial(chat_ids, tokenizer))


def test_a_head_earns_its_attention_to_the_needle(script: ModuleType) -> None:
    attention = torch.tensor([[0.1, 0.3, 0.2, 0.15, 0.25], [0.5, 0.0, 0.4, 0.1, 0.0]])
    needle = torch.tensor([False, True, True, False, False, False])
    torch.testing.assert_close(script.earned(attention, needle, 2), torch.tensor([0.3, 0.4]) / 2)


def test_an_answer_is_watched_from_its_first_token_on(script: ModuleType) -> None:
    engine, ids = Engine(tiny_model()), tiny_prompts(30)[0][0].tolist()
    tokens, steps = script.answer(engine, ids, 3, frozenset())
    assert tokens == engine.decode(engine.prefill(ids, [load_method("fullkv")]), 3)[0]
    layers: list[LayerContext] = []
    spy = SimpleNamespace(compress=lambda layer: layers.append(layer) or script.Watch().compress(layer))
    spy.finish = lambda stores, prompt: stores
    engine.prefill(ids + tokens[:2], [spy])
    for step, attention in enumerate(steps):
        rows = [reference_attention(layer.queries, layer.keys)[:, 29 + step, : 30 + step] for layer in layers]
        torch.testing.assert_close(attention.double(), torch.stack(rows), rtol=1e-4, atol=1e-6)


def test_the_needle_is_found_in_a_prompt(script: ModuleType) -> None:
    tokenizer = load_tokenizer()
    benchmark = needles(tokenizer, 0, 33, 50, 100)
    for example in benchmark.examples():
        text = f"One of the special magic numbers for {example.info['key']} is: {example.info['expected']}."
        ids = benchmark.prompt_ids(example)
        place = script.find(text, ids, tokenizer)
        assert text in tokenizer.decode(ids[place.start : place.stop])
        assert text not in tokenizer.decode(ids[place.start + 1 : place.stop])
        assert text not in tokenizer.decode(ids[place.start : place.stop - 1])


def test_retrieval_heads_of_the_embedded_model(script: ModuleType, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "new" / "heads.json"
    arguments = ["--examples", "2", "--context_length", "160", "--output", str(output)]
    with pytest.raises(SystemExit, match="0"):
        script.main(arguments)
    assert "2 of 2 answers were right" in capsys.readouterr().out
    table, (line,) = read_head_table(str(output)), output.read_text().splitlines()
    assert table.shape == (30, 9) and len(json.loads(line)["29-8"]) == 2
    published = read_head_table(str(ROOT / "docs" / "heads" / "SmolLM2-135M-Instruct.json"))
    best, ours = ({*each.flatten().argsort(descending=True)[:20].tolist()} for each in (published, table))
    assert len(best & ours) >= 10, "the same heads retrieve in other texts"


def test_copying_is_part_of_retrieving(script: ModuleType, embedded: Any) -> None:
    benchmark, engine = needles(load_tokenizer(), 50), Engine(embedded, load_tokenizer())
    (copied,), (retrieved,) = (
        list(script.score_heads(engine, benchmark, rule)) for rule in ("copy", "retrieval-reasoning")
    )
    assert (copied <= retrieved).all() and 0 < copied.sum() < retrieved.sum()


def test_wrong_answers_measure_nothing(script: ModuleType, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(Needle, "score", lambda *_: {"score": 0.0})
    monkeypatch.setattr(script, "answer", lambda *_: ([5], []))
    with pytest.raises(SystemExit, match="2"):
        script.main(["--examples", "3", "--output", str(tmp_path / "heads.json")])
    assert "error: none of 3 answers was right" in capsys.readouterr().err and not (tmp_path / "heads.json").exists()
