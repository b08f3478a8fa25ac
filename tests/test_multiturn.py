"""Conversations about one context: what each turn reads, whose answers it sees, and what a file may hold."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from kvfactory.benchmarks.multiturn import Conversation, MultiTurn, Turn, read_conversations
from kvfactory.errors import UserError
from kvfactory.models import EMBEDDED_PACKAGE, load_tokenizer

TALK = Conversation(
    "The boat is red. The barn is green.",
    [
        Turn("Which colour has the boat?", ["red", "dark red"], "The boat is"),
        Turn("And the barn?", ["Green"]),
        Turn("Is there a third thing?", ["no"], "There is"),
    ],
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    if not any(metadata.distributions(name=EMBEDDED_PACKAGE[0])):
        pytest.skip("the embedded model is not installed")
    return load_tokenizer()


def texts(tokenizer: Any, **settings: Any) -> list[str]:
    """What the model reads: the prompt, then what is read before each answer."""
    benchmark = MultiTurn(tokenizer, [TALK], **{"history": "golden"} | settings)
    first, *others = benchmark.examples()
    read = [benchmark.prompt_ids(first), benchmark.question_ids(first), *map(benchmark.question_ids, others)]
    return [tokenizer.decode(ids) for ids in read]


USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
INTRODUCED = "The boat is red. The barn is green.\n\nAnswer the questions about this text in a few words.\n\n"


def test_the_first_question_is_in_the_prompt_and_later_ones_stand_behind_the_right_answers(tokenizer: Any) -> None:
    prompt, *turns = texts(tokenizer)
    assert prompt.endswith(f"{USER}{INTRODUCED}Which colour has the boat?{ASSISTANT}The boat is")
    assert turns == [
        "",
        f" red<|im_end|>\n{USER}And the barn?{ASSISTANT}",
        f"Green<|im_end|>\n{USER}Is there a third thing?{ASSISTANT}There is",
    ]


def test_the_models_own_answers_stay_and_only_their_end_is_read_again(tokenizer: Any) -> None:
    prompt, *turns = texts(tokenizer, history="own")
    assert prompt.endswith("The boat is")
    assert turns == [
        "",
        f"<|im_end|>\n{USER}And the barn?{ASSISTANT}",
        f"<|im_end|>\n{USER}Is there a third thing?{ASSISTANT}There is",
    ]


def test_no_question_is_known_when_a_query_agnostic_context_is_compressed(tokenizer: Any) -> None:
    prompt, first, *_ = texts(tokenizer, query_agnostic=True)
    assert prompt.endswith(f"{USER}{INTRODUCED}")
    assert first == f"Which colour has the boat?{ASSISTANT}The boat is"


def test_without_a_template_turns_are_plain_text(tokenizer: Any) -> None:
    assert texts(tokenizer, template=False) == [
        f"{INTRODUCED}Which colour has the boat?\nAnswer: The boat is",
        "",
        " red\n\nAnd the barn?\nAnswer:",
        "Green\n\nIs there a third thing?\nAnswer: There is",
    ]


def test_turns_are_examples_that_follow_each_other(tokenizer: Any) -> None:
    benchmark = MultiTurn(tokenizer, [TALK, TALK], history="own", turns=2)
    chain = [(each.id, each.after, each.group) for each in benchmark.examples()]
    assert chain == [
        ("1/1", None, "turn 1"),
        ("1/2", "1/1", "turn 2"),
        ("2/1", None, "turn 1"),
        ("2/2", "2/1", "turn 2"),
    ]
    read = [*benchmark.prompt_ids(benchmark.examples()[0]), *benchmark.question_ids(benchmark.examples()[1])]
    assert benchmark.tokens() == [len(read) + 2 * 24] * 2


@pytest.mark.parametrize(
    ("said", "score"),
    [("red.", 1), ("It is RED, I think", 1), ("Dark red!", 1), ("redder", 0), ("green", 0), ("", 0), ("a", 0)],
)
def test_an_answer_counts_word_by_word(tokenizer: Any, said: str, score: float) -> None:
    benchmark = MultiTurn(tokenizer, [TALK], history="own")
    assert benchmark.score(benchmark.examples()[0], said)["score"] == score


def test_an_empty_answer_is_in_no_prediction(tokenizer: Any) -> None:
    talk = Conversation("", [Turn("", []), Turn("?", [""])])
    benchmark = MultiTurn(tokenizer, [talk], history="golden")
    assert [benchmark.score(each, "anything")["score"] for each in benchmark.examples()] == [0, 0]
    assert all(benchmark.prompt_ids(each) for each in benchmark.examples())


def test_files_of_both_forms_are_read(tmp_path: Path) -> None:
    ours = {"context": "猫は🦜", "turns": [{"question": "q", "answers": ["a", "b"], "prefix": "p"}]}
    theirs = {"context": "c", "multi_turns": [{"input": "q", "answer": "a"}, {"input": "r", "answer": ["x"]}], "id": 7}
    expected = [
        Conversation("猫は🦜", [Turn("q", ["a", "b"], "p")]),
        Conversation("c", [Turn("q", ["a"]), Turn("r", ["x"])]),
    ]
    lines, whole = tmp_path / "lines.jsonl", tmp_path / "list.json"
    lines.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(map(json.dumps, (ours, theirs))).encode())
    whole.write_text(json.dumps([ours, theirs], ensure_ascii=False), "utf-8")
    assert read_conversations(lines) == read_conversations(whole) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["no conversation"]),
        ("{oops", [":1", "not JSON"]),
        (
            '{"context": "c", "turns": [{"question": "q", "answers": "a"}]}\n[1]',
            [":2", "expected an object, found list"],
        ),
        ('{"context": "\\ud800", "turns": [{"question": "q", "answers": "a"}]}', [":1", "not JSON"]),
        ('{"context": 5}', [":1", "'context' is missing or not a text"]),
        ('{"context": "c"}', [":1", "'turns' is missing"]),
        ('{"context": "c", "turns": []}', [":1", "no turns"]),
        ('{"context": "c", "turns": [{"answer": "a"}]}', [":1, turn 1", "no question"]),
        ('{"context": "c", "turns": [{"input": "q", "answer": 4}]}', [":1, turn 1", "no answers"]),
        ('[{"context": "c", "turns": [{"input": "q"}]}]', ["conversation 1, turn 1", "no answers"]),
        ('{"context": "c", "turns": [{"input": "q", "answer": "a", "prefix": 1}]}', ["turn 1", "prefix"]),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_conversations(path)
    assert all(word in str(caught.value) for word in ["talks.jsonl", *words]), caught.value


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("none", "binary"):
        with pytest.raises(UserError, match=f"--conversations .*{name}"):
            read_conversations(tmp_path / name)
