"""Passages and their questions: what comes along is sound, what is asked where, what counts as right, what a file may be."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from entry_points import exit_code

from kvfactory.benchmarks.multiturn import conversations_of
from kvfactory.benchmarks.reading import KINDS, PLACEMENTS, Passage, Question, Reading, read_passages
from kvfactory.errors import UserError
from kvfactory.models import EMBEDDED_PACKAGE, load_tokenizer
from kvfactory.results import load_rows

OURS = read_passages()
BOAT = Passage(
    "The boat",
    "Ada built a boat. It was red {as a rose}.",
    (
        Question("true or false", "True or false: the boat was blue.", "false", evidence="It was red"),
        Question("fill the blank", "Fill the blank: the boat was ____.", "red", prefix="The boat was"),
        Question("multiple choice", "What did she build?", "boat", ("barn", "boat", "boathouse")),
        Question("matching", "Who built it?", "Ada", ("Ben", "Ada")),
    ),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    if not any(metadata.distributions(name=EMBEDDED_PACKAGE[0])):
        pytest.skip("the embedded model is not installed")
    return load_tokenizer()


# ---- the passages that come along ----


def test_there_are_twelve_passages_of_a_few_minutes_reading() -> None:
    assert len({passage.title for passage in OURS}) == len(OURS) >= 12
    assert all(600 <= len(passage.text.split()) <= 1500 for passage in OURS)
    assert all(Counter(each.kind for each in passage.questions) == dict.fromkeys(KINDS, 2) for passage in OURS)


@pytest.mark.parametrize("passage", OURS, ids=lambda passage: passage.title)
def test_every_answer_is_stated_in_one_place(passage: Passage) -> None:
    for each in passage.questions:
        stated = each.evidence or each.answer
        assert len(re.findall(rf"\b{re.escape(stated)}\b", passage.text)) == 1, each
        assert bool(each.evidence) == (each.kind == "true or false") and each.prefix
        assert passage.depth(each) is not None
        if each.kind == "fill the blank":
            filled = each.question.removeprefix("Fill the blank: ").rstrip(".").replace("____", each.answer)
            assert filled.lower() in passage.text.lower(), each


def test_guessing_wins_nothing() -> None:
    asked = [each for passage in OURS for each in passage.questions]
    assert Counter(each.answer for each in asked if each.kind == "true or false") == {"true": 12, "false": 12}
    for kind in ("multiple choice", "matching"):
        places = Counter(each.options.index(each.answer) for each in asked if each.kind == kind)
        assert places == dict.fromkeys(range(4), 6), kind
        assert all(len(set(each.options)) == 4 for each in asked if each.kind == kind)


def test_answers_are_spread_over_the_passages() -> None:
    depths = [passage.depth(each) or 0 for passage in OURS for each in passage.questions]
    quarters = Counter(int(depth // 25) for depth in depths)
    assert min(quarters[quarter] for quarter in range(4)) >= 0.15 * len(depths)


# ---- what is asked ----


def test_the_question_stands_before_or_after_and_the_answers_beginning_is_read_later(tokenizer: Any) -> None:
    reading = Reading(tokenizer, [BOAT], kinds=["fill the blank", "multiple choice"])
    texts = {each.id: tokenizer.decode(reading.prompt_ids(each)) for each in reading.examples()}
    begun = {each.id: tokenizer.decode(reading.question_ids(each)) for each in reading.examples()}
    blank, choice = (
        "Question: Fill the blank: the boat was ____.",
        "Question: What did she build?\nChoose from: barn; boat; boathouse.",
    )
    assert list(texts) == ["1/2/before", "1/2/after", "1/3/before", "1/3/after"]
    for number, question in (("1/2", blank), ("1/3", choice)):
        before, after = (texts[f"{number}/{placement}"] for placement in PLACEMENTS)
        assert before.index(question) < before.index(BOAT.text) and after.index(BOAT.text) < after.index(question)
        assert before.endswith("<|im_start|>assistant\n") and after.endswith("<|im_start|>assistant\n")
    assert begun == {"1/2/before": "The boat was", "1/2/after": "The boat was", "1/3/before": "", "1/3/after": ""}


def test_without_a_template_the_answer_follows_a_colon(tokenizer: Any) -> None:
    reading = Reading(tokenizer, [BOAT], placements=["after"], kinds=["fill the blank"], template=False)
    [example] = reading.examples()
    read = tokenizer.decode(reading.prompt_ids(example) + reading.question_ids(example))
    assert read == f"{BOAT.text}\n\nQuestion: Fill the blank: the boat was ____.\n\nAnswer: The boat was"


def test_rows_know_kind_placement_and_depth(tokenizer: Any) -> None:
    examples = Reading(tokenizer, [BOAT]).examples()
    assert [(each.info["kind"], each.info["placement"]) for each in examples] == list(product(KINDS, PLACEMENTS))
    assert {each.group for each in examples} == {
        f"{kind}, question {place}" for kind, place in product(KINDS, PLACEMENTS)
    }
    assert [each.ability for each in examples[::2]] == pytest.approx([0.65, 0.3, 1 / 3 + 0.15, 0.65])
    assert [each.info["depth_percent"] for each in examples[::2]] == [43.9, 61.0, 29.3, 0.0]


RIGHT = {
    "true or false": (
        ["false.", "No, it was red", "That is false, not true", "That is not true.", "incorrect"],
        ["true", "Not so", "", "Yes. No.", "There is no doubt: true"],
    ),
    "fill the blank": (["red", " a Red one."], ["redder", "blue", ""]),
    "multiple choice": (["boat", "The boat, not the barn"], ["a boathouse", "barn or boat", "", "ship"]),
    "matching": (["Ada", "ADA built it, and Ben watched"], ["Ben and Ada", "Adam", ""]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_counts_as_right(tokenizer: Any, kind: str) -> None:
    reading = Reading(tokenizer, [BOAT], kinds=[kind], placements=["after"])
    [example] = reading.examples()
    right, wrong = RIGHT[kind]
    assert [reading.score(example, said)["score"] for said in (*right, *wrong)] == [1.0] * len(right) + [0.0] * len(
        wrong
    )


def test_chinese_words_are_found_without_blanks_around_them(tokenizer: Any) -> None:
    blank = Question("fill the blank", "灯是____。", "红色的")
    choice = Question("multiple choice", "海边有什么？", "灯塔", ("桥", "灯塔"))
    reading = Reading(
        tokenizer, [Passage("灯塔", "海边有一座灯塔，灯是红色的。", (blank, choice))], placements=["after"]
    )
    asked = reading.examples()
    assert [reading.score(each, "答案是灯塔，灯是红色的。")["score"] for each in asked] == [1, 1]
    assert [reading.score(each, "答案是桥，不是灯塔。")["score"] for each in asked] == [0, 0]
    assert [each.info["depth_percent"] for each in asked] == [71.4, 35.7]


def test_the_place_of_an_answer_is_a_word_of_its_own() -> None:
    hen = Question("fill the blank", "He sold a ____.", "hen")
    assert Passage("t", "Then, when he came, he sold a hen.", (hen,)).depth(hen) == pytest.approx(88.2)


def test_kinds_may_be_spelt_with_hyphens_and_underscores(tokenizer: Any) -> None:
    reading = Reading(tokenizer, [BOAT], kinds=["True-or-false", "multiple_choice"], placements=["after"])
    assert [each.info["kind"] for each in reading.examples()] == ["true or false", "multiple choice"]


def test_names_that_are_not_there_get_the_closest(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="'befor'; did you mean 'before'"):
        Reading(tokenizer, [BOAT], placements=["befor"])
    with pytest.raises(UserError, match="'matchin'; did you mean 'matching'"):
        Reading(tokenizer, [BOAT], kinds=["matchin"])


def test_questions_become_turns() -> None:
    first, second = conversations_of([BOAT, BOAT])
    assert first.context == BOAT.text and [turn.answers for turn in first.turns] == [["red"], ["boat"], ["Ada"]]
    assert [turn.answers for turn in second.turns] == [["boat"], ["Ada"], ["red"]]
    assert first.turns[1].question.endswith("Choose from: barn; boat; boathouse.")


# ---- files ----


def passage(**changes: Any) -> dict[str, Any]:
    question = {"kind": "matching", "question": "Who?", "options": ["Ann", "Bob"], "answer": "Ann"} | changes
    given = {name: each for name, each in question.items() if each is not None}
    return {"title": "t", "text": "猫 🦜", "questions": [given]}


def test_a_list_and_lines_are_read_alike(tmp_path: Path) -> None:
    whole, lines = tmp_path / "whole.json", tmp_path / "lines.jsonl"
    whole.write_text(json.dumps([passage(), passage(answer="Bob")], ensure_ascii=False), "utf-8")
    lines.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, [passage(), passage(answer="Bob")])).encode())
    assert read_passages(whole) == read_passages(lines)
    assert [each.questions[0].answer for each in read_passages(whole)] == ["Ann", "Bob"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["no passage in it"]),
        ("[]", ["no passage in it"]),
        ("{", [":1", "not JSON"]),
        ("[3]", ["passage 1", "expected an object"]),
        ('[{"title": "t", "text": 3, "questions": [{}]}]', ["passage 1", "'text' is missing or not a text"]),
        ('[{"title": "t", "text": "x", "questions": [{}]}]', ["passage 1, question 1", "'kind'"]),
        ('[{"title": "t", "text": "x", "questions": []}]', ["passage 1", "no questions"]),
        (json.dumps(passage(kind="match")), ["question 1", "unknown kind of question 'match'", "matching"]),
        (json.dumps(passage(question=None)), ["question 1", "'question' is missing"]),
        (json.dumps(passage(answer="C")), ["the answer 'C' is not among the options"]),
        (json.dumps(passage(options=None)), ["the answer 'Ann' is not among the options"]),
        (json.dumps(passage(options=[1])), ["'options' is not a list of texts"]),
        (json.dumps(passage(kind="true or false", options=[])), ["the answer is 'Ann'; expected true or false"]),
        (json.dumps(passage(kind="fill the blank", answer="...")), ["has no word in it"]),
        (json.dumps(passage(question=" ")), ["question 1", "the question is empty"]),
        (json.dumps(passage() | {"text": ""}), ["its text is empty"]),
        (json.dumps(passage(options=["Ann"])), ["two or more options that differ"]),
        (json.dumps(passage(options=["Ann", "Bob", "the Bob"])), ["two or more options that differ"]),
        (json.dumps(passage(kind="true or false", answer="true")), ["'options' are for multiple choice and matching"]),
        (json.dumps(passage(kind="fill the blank", options=[])), ["one ____ in the question"]),
        (json.dumps(passage(prefx="x")), ["unknown field 'prefx'; did you mean 'prefix'"]),
        (json.dumps(passage(evidence="Bob sat")), ["question 1", "the passage does not say 'Bob sat'"]),
        (json.dumps(passage(prefix=4)), ["'prefix' is missing or not a text"]),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_passages(path)
    assert all(word in str(caught.value) for word in ["--passages", "mine.json", *words]), caught.value


# ---- the commands ----


def test_the_commands_run_and_write_their_tables(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = {"kind": "fill the blank", "question": "The lake was ____.", "answer": "deep", "prefix": "The lake was"}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"title": "Lake", "text": "The lake was deep.", "questions": [lake, lake]}]))
    sweep = ["--method", "fullkv,streamingllm", "--max_capacity_prompts", "16", "--device", "cpu"]
    reading = ["--passages", str(path), "--kinds", "fill_the_blank", *sweep, "--save_dir", str(tmp_path / "reading")]
    assert exit_code("run_reading.py", reading) == 0
    rows = load_rows(tmp_path / "reading")
    assert len(rows) == 2 * 2 * 2 and {row["scores"][0] for row in rows} == {"score"}
    assert all(row["question_tokens"] == 3 for row in rows)
    assert (
        (tmp_path / "reading" / "reading.csv").read_text().startswith("method,budget,placement,fill the blank,average")
    )
    talk = {"context": "The lake was deep.", "turns": [{"question": "How was the lake?", "answers": "deep"}] * 3}
    path.write_text(json.dumps(talk))
    turns = ["--conversations", str(path), *sweep, "--max_new_tokens", "3", "--save_dir", str(tmp_path / "turns")]
    assert exit_code("run_multiturn.py", [*turns, "--turns", "2"]) == 0
    first = load_rows(tmp_path / "turns")
    assert [row["example_id"] for row in first if row["method"] == "fullkv"] == ["1/1", "1/2"]
    assert exit_code("run_multiturn.py", turns) == 0, "turns may grow"
    rows = load_rows(tmp_path / "turns")
    assert rows[:4] == first and {row["example_id"] for row in rows[4:]} == {"1/3"}
    assert (tmp_path / "turns" / "turns.csv").read_text().startswith("method,budget,turn 1,turn 2,turn 3,average")
    capsys.readouterr()
    path.write_text(json.dumps(talk | {"context": "very " * 9000}))
    assert exit_code("run_multiturn.py", [*turns[:-1], str(tmp_path / "long")]) == 2
    assert "conversation 1, all its turns" in capsys.readouterr().err
