"""RULER's tasks: what holds for official samples holds for ours, and the wording is the official one to the byte."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruler_samples import BYTES, check, documents_of, embedded_tokenizer, jsonl, text_of

from kvfactory.benchmarks.ruler import TASKS, GeneratedRuler, Sources, largest_fit
from kvfactory.benchmarks.ruler_haystacks import NOISE, Essay, Needle, VariableTracking, niah_wording
from kvfactory.benchmarks.ruler_qa import QuestionAnswering, hotpotqa, squad
from kvfactory.benchmarks.ruler_tasks import TOKENS_TO_GENERATE, words
from kvfactory.benchmarks.ruler_words import CommonWords, FrequentWords
from kvfactory.errors import UserError
from kvfactory.metrics import RULER_TASKS

SOURCES = Sources()
OFFICIAL = [(length, task) for length in (2048, 4096) for task in RULER_TASKS]


def ruler(tokenizer=BYTES, **changes):
    defaults = {"tasks": RULER_TASKS, "lengths": [4096], "samples": 2, "sources": SOURCES}
    return GeneratedRuler(tokenizer, **{**defaults, **changes})


def prompts(benchmark):
    return {example.id: benchmark.prompt_ids(example) for example in benchmark.examples()}


@pytest.fixture(scope="module")
def smollm2():
    return embedded_tokenizer()


@pytest.fixture(scope="module")
def official(shared):
    """Rows of the official generator by length and task."""
    folder = shared / "data" / "ruler" / "official_gen_smollm2"
    return {(length, task): jsonl(folder / str(length) / f"{task}.jsonl") for length, task in OFFICIAL}


# ---- what holds for every sample ----


def test_tasks_are_all_and_in_the_official_order():
    assert tuple(TASKS) == RULER_TASKS == tuple(TOKENS_TO_GENERATE)
    assert [TOKENS_TO_GENERATE[task] for task in RULER_TASKS] == [128] * 8 + [30, 120, 50, 32, 32]


@pytest.mark.parametrize(("length", "task"), OFFICIAL)
def test_official_samples_keep_the_rules(official, length, task):
    for row in official[length, task]:
        check(task, length, row["input"] + row["answer_prefix"], row["outputs"])
        assert row["length"] <= length


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("task", RULER_TASKS)
def test_our_samples_keep_the_rules(smollm2, task, length):
    benchmark = ruler(smollm2, tasks=[task], lengths=[length], samples=4)
    for example in benchmark.examples():
        ids = benchmark.prompt_ids(example)
        check(task, length, text_of(smollm2, ids), example.answers)
        slack = 1000 if task.startswith("qa") else 90  # a paragraph, a line of two uuids
        assert length - slack <= len(ids) + example.max_new_tokens <= length


@given(st.sampled_from(RULER_TASKS), st.integers(0, 999), st.integers(0, 2000))
@settings(max_examples=60, deadline=None)
def test_a_sample_keeps_the_rules_at_any_size(task, seed, more):
    length = 1024 if seed % 2 else 4096
    sample = TASKS[task](SOURCES).draw(f"{seed}/{task}/{seed % 7}", seed % 7, length)
    size = min(sample.least + more, sample.most or 10**9)
    check(task, length, sample.text(size) + sample.prefix, sample.answers)
    assert sample.text(size) == sample.text(size)


def test_frequent_words_stay_apart_from_the_smallest_size_on():
    for size in range(FrequentWords.least, 3000):
        counts = [int(size * rank**-2.0 / FrequentWords.zeta) for rank in range(1, 6)]
        assert counts == sorted(set(counts), reverse=True), size
    assert pytest.approx(sum(rank**-2.0 for rank in range(1, 10**5)), abs=1e-4) == FrequentWords.zeta


def test_words_are_wonderwords():
    assert (len(words("noun")), len(words("adjective")), len(words("verb"))) == (6782, 910, 1041)
    assert len(words("noun", "adjective", "verb")) == 8166
    assert all(word == word.strip() and word for word in words("noun", "adjective", "verb"))


# ---- the official wording ----


@pytest.mark.parametrize(("length", "task"), [pair for pair in OFFICIAL if pair[1].startswith("niah")])
def test_needles_are_worded_officially(official, length, task):
    for row in official[length, task]:
        needles = [Needle(*each) for each in re.findall(r"magic (\w+) for ([^:]+?) is: ([0-9a-f-]+)\.", row["input"])]
        query = re.search(r"for (.+?) mentioned", row["answer_prefix"])[1]
        template, prefix = niah_wording(needles[0].kind, query, len(row["outputs"]))
        head, tail = template.split("{context}")
        assert row["answer_prefix"] == prefix
        assert row["input"].startswith(head) and row["input"].endswith(tail)
        context = row["input"][len(head) : -len(tail)]
        assert all(needle.sentence in context for needle in needles) and needles
        if task in ("niah_single_1", "niah_multikey_2", "niah_multikey_3"):
            assert set(context.split("\n")) == {needle.sentence for needle in needles} | (
                {NOISE} & {*context.split("\n")}
            )


@pytest.mark.parametrize("length", [2048, 4096])
def test_variables_are_worded_officially(official, length):
    for row in official[length, "vt"]:
        example, own = (part.split("\n") for part in row["input"].split("\n\nMemorize"))
        values = [re.search(r"assigned the value (\d+) in", lines[-1])[1] for lines in (example, own)]
        names = example[-1].split("they are:  ")[1]
        contexts = ["\n".join(example[2:-1]), "\n".join(own[2:-1])]
        texts = [VariableTracking.template.format(context=c, query=v) for c, v in zip(contexts, values, strict=True)]
        starts = [VariableTracking.prefix.format(names=5, query=value) for value in values]
        assert row["input"] == f"{texts[0]}{starts[0]} {names}\n\n{texts[1]}"
        assert row["answer_prefix"] == starts[1]
        assert contexts[0].count(NOISE) == VariableTracking.example_lines
        for context in contexts:
            others = [line for line in context.split("\n") if line != NOISE]
            chain = re.findall(r"VAR (\w+) = ", context)
            value = re.search(r"= (\d+)", context)[1]
            chained = [f"VAR {to} = VAR {of} " for of, to in pairwise(chain)]
            assert others == [f"VAR {chain[0]} = {value}", *chained]


@pytest.mark.parametrize("length", [2048, 4096])
def test_word_lists_are_worded_officially(official, length):
    for row in official[length, "cwe"]:
        lists = re.findall(r"appear most often\.\n(.*)\nQuestion", row["input"])
        solved = re.search(r"list are: (.*)\n", row["input"])[1]
        example, own = (CommonWords.template.format(context=each) for each in lists)
        assert row["input"] == f"{example}{CommonWords.prefix} {solved}\n{own}"
        assert row["answer_prefix"] == CommonWords.prefix
    for row in official[length, "fwe"]:
        context = re.search(r"coded words\. (.*)\nQuestion", row["input"])[1]
        assert row["input"] == FrequentWords.template.format(context=context)
        assert row["answer_prefix"] == FrequentWords.prefix


@pytest.mark.parametrize("length", [2048, 4096])
@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_questions_are_worded_officially(official, shared, task, length):
    readings = {
        "qa_1": squad(shared / "data/squad/squad_dev_v2_cs224n.json"),
        "qa_2": hotpotqa(shared / "data/hotpotqa/hotpot_dev_distractor_100.json"),
    }
    reading = readings[task]
    for number, row in enumerate(official[length, task]):
        question = reading.questions[number]
        assert row["outputs"] == question.answers
        documents = documents_of(row["input"])
        assert {reading.documents[index] for index in question.own} <= {*documents} <= {*reading.documents}
        context = "\n\n".join(f"Document {place}:\n{text}" for place, text in enumerate(documents, start=1))
        assert row["input"] == QuestionAnswering.template.format(context=context, query=question.query)
        assert row["answer_prefix"] == QuestionAnswering.prefix


def test_our_texts_are_made_of_that_wording():
    """Each of ours is its template with something in it, so that what holds for the templates holds for the samples."""
    for task, wording in {
        "vt": VariableTracking,
        "cwe": CommonWords,
        "fwe": FrequentWords,
        "qa_1": QuestionAnswering,
    }.items():
        sample = TASKS[task](SOURCES).draw("7", 0, 1024)
        head, _, tail = wording.template.replace("{query}", sample.query).partition("{context}")
        assert sample.text(60).startswith(head) and sample.text(60).endswith(tail)
        assert sample.prefix == wording.prefix.format(names=5, query=sample.query)
    sample = TASKS["cwe"](SOURCES).draw("7", 0, 1024)
    solved = re.search(r"list are: (1\. .* 10\. \S.*)\nBelow", sample.text(60))[1]
    assert f"?{CommonWords.prefix} {solved}\nBelow" in sample.text(60)
    assert re.search(r"they are:  [A-Z]{3}( [A-Z]{3}){4}\n\nMemorize", TASKS["vt"](SOURCES).draw("7", 0, 1024).text(9))


# ---- the same sample everywhere ----


def test_a_sample_does_not_depend_on_what_else_is_run():
    few = prompts(ruler(tasks=["vt", "qa_1"], lengths=[4096], samples=1))
    many = prompts(ruler(tasks=["fwe", "qa_1", "vt"], lengths=[8192, 4096], samples=3))
    assert few.items() <= many.items() and len(many) == 18
    assert prompts(ruler(tasks=["vt"], samples=1, seed=1)).items().isdisjoint(few.items())


def test_questions_are_the_same_at_every_length():
    benchmark = ruler(tasks=set(RULER_TASKS) - {"fwe"}, lengths=[8192, 12000])
    by_length = [[each for each in benchmark.examples() if each.info["context_length"] == n] for n in (8192, 12000)]
    for short, long in zip(*by_length, strict=True):
        assert (short.answers, short.info["query"]) == (long.answers, long.info["query"])
        assert short.id != long.id


def test_samples_differ():
    examples = ruler(samples=24, lengths=[8192]).examples()
    for task in RULER_TASKS:
        assert len({json.dumps(each.answers) for each in examples if each.info["task"] == task}) == 24, task


def test_a_sample_is_the_same_in_every_process():
    sample = TASKS["niah_multiquery"](SOURCES).draw("42/niah_multiquery/0", 0, 4096)
    assert sample.answers == ["6623068", "9731020", "3015719", "5908971"]
    assert sample.query == "worried-semiconductor, resonant-miter, average-app, and dapper-cowboy"


# ---- haystacks of the user ----


@pytest.mark.parametrize(
    "text",
    ["一二三四五六七八九十" * 400, "🙂" * 3000, "no full stop " * 300, "Short. Text.", "句子一。句子二！" * 300],
    ids=["chinese", "emoji", "no sentences", "short", "chinese sentences"],
)
def test_any_text_is_a_haystack(text, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("Text", "\r\nText").encode())
    benchmark = ruler(tasks=["niah_multikey_1"], sources=Sources(essays=tmp_path), samples=3)
    for example in benchmark.examples():
        ids = benchmark.prompt_ids(example)
        prompt = text_of(BYTES, ids)
        check("niah_multikey_1", 4096, prompt, example.answers)
        assert 4096 - 130 <= len(ids) + 128 <= 4096
        assert "\ufeff" not in prompt and "\r" not in prompt
        context = prompt.split("\n")[1]
        assert len(set(text) - set(context)) == 0 or text.startswith("Short")


def test_needles_stand_between_sentences_where_their_depths_say():
    essay = Essay("".join(f"Sentence number {number} is here. " for number in range(200)))
    needles = [Needle("numbers", key, "1234567") for key in "abcd"]
    places = set()
    for seed in range(50):
        text = essay.hide(needles, 400, random.Random(seed))
        plain = re.sub(r"One of .*?: 1234567\. ?", "", text).strip()
        assert plain == " ".join(f"Sentence number {number} is here." for number in range(80))
        before = [text[: text.index(f"for {key} is")].count("Sentence") for key in "abcd"]
        assert before == sorted(before) and set(before) <= {80 * depth // 100 for depth in Essay.depths}
        places |= set(before)
    assert {0, 80} <= places and len(places) == 40


def test_a_haystack_that_is_not_there_is_named_by_its_flag(tmp_path):
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(UserError, match=f"--essays {path}"):
            ruler(tasks=["niah_single_2"], sources=Sources(essays=path))


# ---- sizes ----


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 20), st.integers(0, 300))
def test_the_largest_that_fits_against_a_slow_search(steps, least, room):
    tokens, calls = [sum(steps[: place + 1]) for place in range(len(steps))], []
    if tokens[0] > room:
        return
    most = least + len(steps) - 1

    def count(size):
        calls.append(size)
        return tokens[size - least]

    expected = max(size for size in range(least, most + 1) if tokens[size - least] <= room)
    assert largest_fit(count, least, most, room) == expected


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_search_ends_for_any_function(seed, room):
    calls = []

    def count(size):
        calls.append(size)
        return hash((seed, size)) % 10**6

    found = largest_fit(count, 1, 10**6, room)
    assert 1 <= found <= 10**6 and len(calls) < 300


def test_few_attempts_find_it():
    calls = []
    assert largest_fit(lambda size: calls.append(size) or 100 + 24 * size, 5, 10**6, 131072) == (131072 - 100) // 24
    assert len(calls) <= 5
