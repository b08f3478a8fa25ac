"""RULER as a benchmark: lengths that are kept, official files, scores, and what is refused."""

from __future__ import annotations

import csv
import io
from functools import partial
from typing import Any

import click
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvfactory_runners.run_ruler import OPTIONS, finish, make, scores
from rich.console import Console
from ruler_samples import BYTES, embedded_tokenizer, row, text_of, wrapped, write
from transformers import LlamaConfig, LlamaForCausalLM

from kvfactory import Engine
from kvfactory.benchmarks.ruler import ABILITY, GeneratedRuler, Sources
from kvfactory.chat import chat_ids
from kvfactory.errors import UserError
from kvfactory.jobs import make_jobs
from kvfactory.metrics import RULER_TASKS, ruler_score
from kvfactory.registry import get_registry
from kvfactory.results import RunFolder
from kvfactory.sweep import Sweep
from kvfactory.testing import TINY_CONFIGS

SOURCES = Sources()


def ruler(tokenizer=BYTES, **changes):
    defaults = {"tasks": ["niah_single_1"], "lengths": [1024], "samples": 1, "sources": SOURCES}
    return GeneratedRuler(tokenizer, **{**defaults, **changes})


# ---- generated samples ----


@given(st.sampled_from(RULER_TASKS), st.integers(0, 3000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_prompt_and_its_answer_never_exceed_the_length(task, more, chat):
    how = {"tasks": [task], "samples": 2, "chat": wrapped if chat else None}
    with pytest.raises(UserError) as error:
        ruler(lengths=[60], **how)
    length = int(str(error.value).rsplit(" ", 1)[1]) + more
    if length >= 4096 and task == "cwe":
        return  # whose samples are larger from there on
    for example in (benchmark := ruler(lengths=[length], **how)).examples():
        assert len(benchmark.prompt_ids(example)) + example.max_new_tokens <= length


@pytest.mark.parametrize("task", RULER_TASKS)
def test_the_shortest_length_that_an_error_names_is_possible(task):
    how = {"tasks": [task], "samples": 3, "chat": wrapped}
    with pytest.raises(
        UserError, match=f"^--lengths 60: too short for {task}; leave it out of --tasks, or give "
    ) as error:
        ruler(lengths=[60], **how)
    shortest = int(str(error.value).rsplit(" ", 1)[1])
    benchmark = ruler(lengths=[shortest], **how)
    lengths = [len(benchmark.prompt_ids(each)) + each.max_new_tokens for each in benchmark.examples()]
    assert max(lengths) == shortest
    with pytest.raises(UserError, match=f"shortest possible, {shortest}$"):
        ruler(lengths=[shortest - 1], **how)


def test_of_several_tasks_the_one_that_needs_most_is_named():
    needs = {}
    for task in ("niah_single_1", "cwe", "vt"):
        with pytest.raises(UserError) as error:
            ruler(tasks=[task], lengths=[60])
        needs[task] = int(str(error.value).rsplit(" ", 1)[1])
    with pytest.raises(UserError, match=f"too short for vt; .* possible, {max(needs.values())}$"):
        ruler(tasks=[*needs], lengths=[min(needs.values())])


def test_the_chat_wrapper_counts_and_the_answer_begins_behind_it():
    heard = {}

    def chat(text, answer_prefix):
        ids = wrapped(text, answer_prefix)
        heard[tuple(ids)] = text, answer_prefix
        return ids

    benchmark = ruler(tasks=RULER_TASKS, lengths=[9000], chat=chat)
    for example in benchmark.examples():
        ids = benchmark.prompt_ids(example)
        text, prefix = heard[tuple(ids)]
        assert prefix == benchmark._samples[example.id].prefix
        assert all(answer in text for answer in example.answers)
        assert 8000 < len(ids) + example.max_new_tokens <= 9000


def test_without_a_chat_template_the_tokenizers_own_tokens_are_there():
    (example,) = (benchmark := ruler()).examples()
    ids = benchmark.prompt_ids(example)
    sample = benchmark._samples[example.id]
    assert ids[0] == 256 and 256 not in ids[1:]
    assert text_of(BYTES, ids).endswith(f"provided text?{sample.prefix}")


def test_examples_are_lazy(monkeypatch):
    benchmark = ruler(tasks=RULER_TASKS, lengths=[9000], samples=3)
    monkeypatch.setattr(benchmark, "render", lambda *text: pytest.fail("examples() writes prompts"))
    assert len(benchmark.examples()) == 39


def test_a_tokenizer_that_makes_nothing_of_the_text_ends_the_search_too():
    class Silent:
        def encode(self, text, **how):
            return [1, 2, 3]

    for task in RULER_TASKS:
        (example,) = (benchmark := ruler(Silent(), tasks=[task], lengths=[200])).examples()
        assert benchmark.prompt_ids(example) == [1, 2, 3]


def test_examples_in_order_and_what_their_rows_say():
    examples = ruler(tasks=["vt", "niah_single_1"], lengths=[4096, 3000, 4096], samples=2).examples()
    assert [each.id for each in examples] == [
        f"{task}/{length}/{number}" for length in (4096, 3000) for task in ("vt", "niah_single_1") for number in (0, 1)
    ]
    assert [each.group for each in examples[::2]] == ["vt 4096", "niah_single_1 4096", "vt 3000", "niah_single_1 3000"]
    for example in examples:
        task, length, number = example.id.split("/")
        where = {"task": task, "context_length": int(length), "sample": int(number)}
        assert example.info == where | {"query": example.info["query"]} and example.info["query"]
        assert example.max_new_tokens == (30 if task == "vt" else 128)
        assert example.ability == ABILITY == 0.5 and example.stop_ids == frozenset() and example.min_new_tokens == 0
    assert examples == ruler(tasks=["vt", "niah_single_1"], lengths=[4096, 3000], samples=2).examples()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["niah_single_4"]}, "unknown RULER task 'niah_single_4'; did you mean 'niah_single_"),
        ({"tasks": ["vt", "variable"]}, "unknown RULER task 'variable'"),
        ({"samples": 0}, "--samples 0: "),
        ({"lengths": [2048, 600], "window": 1024}, "--lengths 2048: longer than the model's window of 1024 tokens"),
    ],
)
def test_what_cannot_be_is_refused_when_the_benchmark_is_made(changes, message):
    with pytest.raises(UserError) as error:
        ruler(**changes)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_window_itself_is_a_length():
    assert len(ruler(lengths=[1024], window=1024).examples()) == 1


# ---- scores ----


def test_scores_of_a_task_are_the_official_ones():
    (example,) = ruler(tasks=["fwe"]).examples()
    a, b, c = example.answers
    predictions = [f"{a} {b}", a, "", f"{c}, {b}, {a}"]
    ours = [ruler().score(example, each)["score"] for each in predictions]
    assert ours == [2 / 3, 1 / 3, 0, 1]
    assert round(100 * sum(ours) / 4, 2) == ruler_score("fwe", predictions, [example.answers] * 4)


# ---- the command ----


def flags(**changes) -> dict[str, Any]:
    defaults = click.Command("ruler", params=OPTIONS).make_context("ruler", []).params
    return {**defaults, "seed": 42, **changes}


@pytest.fixture(scope="module")
def tiny():
    """A random model that reads bytes."""
    torch.manual_seed(0)
    config = TINY_CONFIGS["llama"].to_dict() | {"vocab_size": 257, "max_position_embeddings": 4096}
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def test_a_run_makes_rows_and_ruler_csv(tiny, tmp_path):
    benchmark, facts = make(tiny, BYTES, flags(tasks=["qa_1", "fwe"], lengths=[1300, 1500], samples=1))
    assert facts["chat_template"] == "none" and facts["wonderwords"] == "3.0.1"
    assert facts["essays"]["name"] == "pydoc_data.topics" and facts["qa_1"]["questions"] == 24
    jobs = make_jobs(get_registry(), ["fullkv", "streamingllm"], [64])
    out = io.StringIO()
    with RunFolder.open(tmp_path, {}, environment={}) as folder:
        Sweep(Engine(tiny), BYTES, benchmark, jobs, folder, stop=()).run()
        rows = folder.rows
        finish(rows, tmp_path, Console(file=out, width=100))
    assert len(rows) == 8
    for each in rows:
        assert each["prompt_tokens"] + each["new_tokens"] <= each["context_length"] and each["ability"] == 0.5
    with (tmp_path / "ruler.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [*lines[0]] == ["method", "budget", "length", "fwe", "qa_1", "average", "nulls"]
    keys = [(method, length) for method in ("fullkv", "streamingllm") for length in ("1300", "1500")]
    assert sorted((line["method"], line["length"]) for line in lines) == keys
    assert str(tmp_path / "ruler.csv") in out.getvalue().replace("\n", "")
    assert "1300" in out.getvalue() and "streamingllm" in out.getvalue()


def result(method, budget, length, task, score, prediction="x"):
    where = {"method": method, "budget": budget, "context_length": length, "task": task}
    return where | {"score": score, "prediction": prediction}


def test_the_table_of_tasks():
    found = scores(
        [
            result("a", None, 512, "vt", 1.0),
            result("a", None, 512, "vt", 0.5, "\n\t"),
            result("a", None, 512, "niah_single_1", 1 / 3),
            result("a", None, 1024, "vt", 0.25, ""),
            result("b", 64, 512, "niah_single_1", 0.0, " \x01 "),
            result("b", 64, 512, "vt", 0.0),
        ]
    )
    assert [*found] == ["method", "budget", "length", "niah_single_1", "vt", "average", "nulls"]
    lines = found.astype(object).where(found.notna(), None).to_numpy().tolist()
    assert lines == [
        ["a", "full", 512, 33.33, 75.0, 54.16, 1],
        ["a", "full", 1024, None, 25.0, None, 1],
        ["b", 64, 512, 0.0, 0.0, 0.0, 1],
    ]


def test_flags_that_would_be_ignored_are_refused(tiny, tmp_path):
    write(tmp_path / "512", [row()])
    benchmark, facts = make(tiny, BYTES, flags(ruler_dir=tmp_path))
    assert len(benchmark.examples()) == 1 and facts == {"chat_template": "none"}
    for flag in ("essays", "squad", "hotpotqa"):
        with pytest.raises(UserError, match=f"^--{flag}: "):
            make(tiny, BYTES, flags(ruler_dir=tmp_path, **{flag: tmp_path}))


def test_the_embedded_models_chat_is_used_unless_it_is_not_wanted(tiny):
    tokenizer = embedded_tokenizer()
    chats = {}
    for template in ("auto", "none"):
        benchmark, facts = make(tiny, tokenizer, flags(tasks=["vt"], samples=1, chat_template=template))
        (example,) = benchmark.examples()
        chats[facts["chat_template"]] = ids = benchmark.prompt_ids(example)
        assert len(ids) + 30 <= 1024
    marks = ["<|im_start|>" in tokenizer.convert_ids_to_tokens(ids) for ids in chats.values()]
    assert [*chats] == ["the tokenizer's", "none"] and marks == [True, False]
    sample = ruler(tokenizer, tasks=["vt"], chat=partial(chat_ids, tokenizer))._samples["vt/1024/0"]
    assert tokenizer.decode(chats["the tokenizer's"]).endswith(f"<|im_start|>assistant\n{sample.prefix}")
