"""Questions after compression, contexts that are shared, turns that follow each other, and text that is given."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from kvfactory import Engine
from kvfactory.benchmarks import Benchmark, Example
from kvfactory.cache import SequenceCache
from kvfactory.engine import Sequence as DecodedSequence
from kvfactory.jobs import Job, make_jobs
from kvfactory.registry import get_registry
from kvfactory.report.tables import summarise
from kvfactory.results import RunFolder
from kvfactory.sweep import Sweep
from kvfactory.testing import tiny_model

METHODS = ["fullkv", "snapkv:window_size=4", "h2o:decode_budget=same:recent_size=4"]
STOP = 7


@dataclass
class Given(Benchmark):
    """Examples whose token ids are written down."""

    asked: list[Example]
    prompts: dict[str, list[int]]
    questions: dict[str, list[int]] = field(default_factory=dict)
    targets: dict[str, list[int]] = field(default_factory=dict)
    golden_turns: bool = False
    one_pass: bool = False
    name: str = "given"

    def examples(self) -> list[Example]:
        return self.asked

    def prompt_ids(self, example: Example) -> list[int]:
        return self.prompts[example.context or example.id]

    def question_ids(self, example: Example) -> list[int]:
        return self.questions.get(example.id, [])

    def target_ids(self, example: Example) -> list[int]:
        return self.targets.get(example.id, [])

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        return {"score": 1.0}

    def measure(self, example: Example, losses: Sequence[float]) -> dict[str, float]:
        return {"nll": sum(losses) / len(losses), "scored_tokens": len(losses), "losses": list(losses)}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def jobs() -> list[Job]:
    return make_jobs(get_registry(), METHODS, [16])


def example(name: str, **fields: Any) -> Example:
    return Example(name, "all", ["yes"], **{"max_new_tokens": 5, **fields})


def ids(seed: int, count: int) -> list[int]:
    return torch.randint(8, 190, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(
    model: Any, benchmark: Benchmark, jobs: list[Job], path: Path, stop: Sequence[int] = ()
) -> list[dict[str, Any]]:
    tokenizer: Any = SimpleNamespace(decode=lambda tokens, skip_special_tokens: " ".join(map(str, tokens)))
    with RunFolder.open(path, {}, environment={}) as folder:
        sweep = Sweep(Engine(model), tokenizer, benchmark, jobs, folder, stop)
        left, before = sweep.count_missing(), len(folder.rows)
        sweep.run()
        assert len(folder.rows) == before + left and sweep.count_missing() == 0
        return sweep.rows()


def said(row: dict[str, Any]) -> list[int]:
    return [int(token) for token in row["prediction"].split()]


def test_questions_about_one_context_are_put_to_copies_of_one_compressed_cache(
    model: Any, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [example("a", context="x"), example("b", context="x"), example("c", context="y")]
    prompts, questions = {"x": ids(1, 60), "y": ids(2, 50)}, {"a": ids(3, 9), "b": ids(4, 6), "c": ids(5, 1)}
    prefills: list[int] = []
    plain = Engine.prefill

    def counted(engine: Engine, prompt: list[int], methods: Any, chunk: int | None) -> Any:
        prefills.append(len(prompt))
        return plain(engine, prompt, methods, chunk=chunk)

    monkeypatch.setattr(Engine, "prefill", counted)
    forks = Mock(side_effect=DecodedSequence.fork)
    monkeypatch.setattr(DecodedSequence, "fork", lambda sequence: forks(sequence))
    rows = run(model, Given(asked, prompts, questions), jobs, tmp_path)
    assert prefills == [60, 50]
    assert forks.call_count == len(jobs), "the last question about a context goes on with the cache itself"
    assert run(model, Given(asked, prompts, questions), jobs, tmp_path) == rows and prefills == [60, 50]
    engine = Engine(model)
    for job in jobs:
        for each in asked:
            alone = engine.extend(plain(engine, prompts[each.context], [job.method])[0], questions[each.id])
            [expected] = engine.decode([alone], 5)
            [row] = [row for row in rows if (row["method"], row["example_id"]) == (job.label, each.id)]
            assert said(row) == expected
            assert row["prompt_tokens"] == len(prompts[each.context])
            assert row["question_tokens"] == len(questions[each.id])


@pytest.mark.parametrize("golden", [False, True])
def test_a_turn_goes_on_from_the_turn_before(model: Any, jobs: list[Job], tmp_path: Path, golden: bool) -> None:
    """Behind the model's own answer, its stop token left out; or, golden, as if it had said nothing."""
    asked = [example("one"), example("two", after="one"), example("three", after="two")]
    questions = {"one": ids(3, 4), "two": ids(4, 6), "three": ids(5, 5)}
    stop = range(8, 60)  # many, so that some answers stop and some are cut off
    benchmark = Given(asked, {"one": ids(1, 60)}, questions, golden_turns=golden)
    rows = run(model, benchmark, jobs, tmp_path, stop)
    engine, reasons = Engine(model), set()
    for job in jobs:
        sequence = engine.prefill(ids(1, 60), [job.method])[0]
        for each in asked:
            engine.extend(sequence, questions[each.id])
            answering = sequence.fork() if golden else sequence
            [expected] = engine.decode([answering], 5, stop)
            [row] = [row for row in rows if (row["method"], row["example_id"]) == (job.label, each.id)]
            assert said(row) == expected
            assert row["new_tokens"] == len(expected)
            reasons.add(row["stop_reason"])
            if not golden and answering.stop_reason == "stop":
                sequence.unfed.pop()
    assert reasons == {"stop", "length"}


def test_a_conversation_that_lost_a_row_is_held_again_and_writes_that_row_alone(
    model: Any, jobs: list[Job], tmp_path: Path
) -> None:
    asked = [example("one"), example("two", after="one"), example("three", after="two")]
    questions = {"two": ids(4, 6), "three": ids(5, 5)}
    benchmark = Given(asked, {"one": ids(1, 60)}, questions)
    rows = run(model, benchmark, jobs, tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    gone = [index for index, line in enumerate(lines) if '"example_id": "three"' in line and "snapkv" in line]
    (tmp_path / "rows.jsonl").write_text("".join(f"{line}\n" for i, line in enumerate(lines) if i not in gone))
    assert len(gone) == 1
    again = run(model, benchmark, jobs, tmp_path)
    fields = "method", "example_id", "prediction", "new_tokens"
    assert [[row[name] for name in fields] for row in again] == [[row[name] for name in fields] for row in rows]


def test_given_text_costs_what_it_costs_token_by_token(model: Any, jobs: list[Job], tmp_path: Path) -> None:
    asked = [example("a"), example("b")]
    prompts, targets = {"a": ids(1, 40), "b": ids(2, 30)}, {"a": ids(3, 20), "b": ids(4, 12)}
    rows = run(model, Given(asked, prompts, targets=targets), jobs, tmp_path)
    engine = Engine(model)
    for job in jobs:
        for each in asked:
            [expected] = engine.score(engine.prefill(prompts[each.id], [job.method]), targets[each.id])
            [row] = [row for row in rows if (row["method"], row["example_id"]) == (job.label, each.id)]
            torch.testing.assert_close(torch.tensor(row["losses"]), expected)
            assert "prediction" not in row and row["new_tokens"] == 0
    whole = next(row for row in rows if row["method"] == "fullkv" and row["example_id"] == "a")
    torch.testing.assert_close(torch.tensor(whole["losses"]), stock_losses(model, prompts["a"] + targets["a"])[39:])
    total = sum(row["nll"] * row["scored_tokens"] for row in rows if row["method"] == "fullkv")
    line = summarise(rows).set_index("method").loc["fullkv"]
    assert line["scored_tokens"] == 32 and line["perplexity"] == pytest.approx(math.exp(total / 32))


def stock_losses(model: Any, text: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([text])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="none")


def test_text_in_one_pass_costs_what_the_stock_model_says(model: Any, tmp_path: Path) -> None:
    jobs = make_jobs(get_registry(), ["fullkv", "snapkv:window_size=4", "minference"], [16])
    text = ids(6, 300)
    benchmark = Given([example("a"), example("b")], {"a": text, "b": [9]}, targets={"b": [10]}, one_pass=True)
    rows = {(row["method"], row["example_id"]): row for row in run(model, benchmark, jobs, tmp_path)}
    assert len(rows) == 6
    for (_, name), row in rows.items():  # a text this short fits into every pattern, so it is attended to whole
        expected = stock_losses(model, text if name == "a" else [9, 10])
        torch.testing.assert_close(torch.tensor(row["losses"]), expected)
        assert row["prompt_tokens"] == len(expected) + 1 and row["new_tokens"] == 0


def made_since(before: set[int]) -> list[Any]:
    """Caches and tensors that are there and were not before, by id."""
    kinds = (torch.Tensor, SequenceCache)
    return [each for each in gc.get_objects() if issubclass(type(each), kinds) and id(each) not in before]


@pytest.mark.parametrize("golden", [False, True])
def test_what_a_row_held_is_let_go_with_it(model: Any, jobs: list[Job], tmp_path: Path, golden: bool) -> None:
    """By counting references: a cache in a cycle would stay until the garbage collector comes by."""
    asked = [example(f"{one}", context=f"{one // 2}", max_new_tokens=2 + 3 * (one % 3)) for one in range(12)]
    asked += [example(f"{one} more", after=f"{one}") for one in range(12)]
    questions = {each.id: ids(1, 3) for each in asked}
    prompts = {f"{context}": ids(context, 40) for context in range(6)}  # of one length: rows attend together
    benchmark = Given(asked, prompts, questions, golden_turns=golden)
    run(model, benchmark, jobs, tmp_path / "first")  # what torch keeps of first calls is there then
    tokenizer: Any = SimpleNamespace(decode=lambda tokens, skip_special_tokens: "")
    gc.collect()
    gc.disable()
    try:
        before = {id(each) for each in made_since(set())}
        noted: list[Any] = []
        alive: list[int] = []

        def on_row(row: dict[str, Any]) -> None:
            there = made_since(before)
            alive.append(sum(type(each) is SequenceCache for each in there))
            noted.extend(map(weakref.ref, there))

        with RunFolder.open(tmp_path / "second", {}, environment={}) as folder:
            sweep = Sweep(Engine(model), tokenizer, benchmark, jobs, folder, (), rows_at_once=2 * len(jobs))
            sweep.run(on_row)
        assert len(alive) == len(asked) * len(jobs) and min(alive) > 0
        held_at_once = 2 * len(jobs) * (1 + golden) + len(jobs)  # golden rows have a fork, a context has its trunk
        assert max(alive) <= held_at_once
        assert [each for each in noted if each() is not None] == []
    finally:
        gc.enable()
