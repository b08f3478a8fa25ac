"""What RULER's questions are asked of: SQuAD's and HotpotQA's files, and the passages of our own."""

from __future__ import annotations

import json

import pytest
from ruler_samples import BYTES, documents_of, text_of

from kvfactory.benchmarks.ruler import GeneratedRuler, Sources
from kvfactory.benchmarks.ruler_qa import QuestionAnswering, hotpotqa, passages, squad
from kvfactory.errors import UserError


def test_every_question_of_ours_can_be_answered():
    for kind, titled in (("fill the blank", False), ("multiple choice", True)):
        reading = passages(kind, titled)
        assert len(reading.questions) >= 24 and len(reading.documents) >= 70
        for question in reading.questions:
            (answer,) = question.answers
            assert question.own and all(answer in reading.documents[index] for index in question.own)
            assert question.more and not {*question.own} & {*question.more}
        half = len(reading.questions) // 2
        first = [question.own[0] for question in reading.questions[:half]]
        near = [{*question.own, *question.more} for question in reading.questions[:half]]
        assert all(sum(index in each for each in near) == 1 for index in first), "one question of each passage"


def test_documents_are_own_then_more_then_others(shared):
    reading = squad(shared / "data/squad/squad_dev_v2_cs224n.json")
    question = reading.questions[0]
    own, more = question.own[0], len(question.more)
    for size in (1, 2, more + 1, more + 5):
        sample = QuestionAnswering(reading).draw("3", 0, 4096)
        found = [reading.documents.index(each) for each in documents_of(sample.text(size) + sample.prefix)]
        assert own in found and len(set(found)) == len(found) == size
        assert len({*found} & {*question.more}) == min(size - 1, more)


def test_documents_come_again_where_there_are_too_few():
    reading = passages("fill the blank", titled=False)
    sample = QuestionAnswering(reading).draw("3", 0, 4096)
    twice = documents_of(sample.text(2 * len(reading.documents)) + sample.prefix)
    assert sorted(twice) == sorted(2 * reading.documents)
    assert QuestionAnswering(reading).draw("3", len(reading.questions), 4096).answers == sample.answers


def test_official_files_have_their_answerable_questions(shared):
    path = shared / "data/squad/squad_dev_v2_cs224n.json"
    asked = [each for a in json.loads(path.read_bytes())["data"] for p in a["paragraphs"] for each in p["qas"]]
    assert len(squad(path).questions) == sum(not each["is_impossible"] for each in asked) == 2910
    reading = hotpotqa(shared / "data/hotpotqa/hotpot_dev_distractor_100.json")
    assert len(reading.questions) == 100 and all(len(question.own) <= 10 for question in reading.questions)
    assert sum(len(question.own) == 10 for question in reading.questions) > 90
    assert sorted({*reading.documents}) == reading.documents


def qas(**changes):
    return {"question": "Who?", "answers": [{"text": "Ann"}], "is_impossible": False, **changes}


def squad_file(*asked, context="Ann did."):
    return {"data": [{"paragraphs": [{"context": context, "qas": [*asked]}]}]}


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (squad, "{", "not JSON"),
        (squad, '"\\ud83d"', "not JSON"),
        (squad, [], "expected an object with 'data'"),
        (squad, {"data": 3}, "'data' is missing or not a list"),
        (squad, {"data": [3]}, "data[0] is not an object"),
        (
            squad,
            {"data": [{"paragraphs": [{"qas": []}]}]},
            "data[0]: paragraphs[0]: 'context' is missing or not a string",
        ),
        (squad, squad_file(qas(), qas(question=1)), "data[0]: paragraphs[0]: qas[1]: 'question' is missing"),
        (squad, squad_file(qas(answers=[])), "qas[0]: an answerable question has one answer or more"),
        (squad, squad_file(qas(answers=[{"text": ""}])), "qas[0]: an answerable question has one answer or more"),
        (squad, squad_file(qas(answers=["Ann"])), "qas[0]: answers[0] is not an object"),
        (squad, squad_file(qas(is_impossible=True)), "no answerable question in it"),
        (hotpotqa, {"data": []}, "'questions' is missing or not a list"),
        (hotpotqa, [], "no question in it"),
        (hotpotqa, [{"question": "Who?", "answer": "Ann"}], "questions[0]: 'context' is missing or not a list"),
        (hotpotqa, [{"question": "Who?", "answer": "Ann", "context": [["A", "b"]]}], "context[0]: expected a title"),
        (hotpotqa, [{"question": "Who?", "answer": "Ann", "context": []}], "has an answer and one document or more"),
    ],
)
def test_bad_files_are_refused_by_place(tmp_path, read, content, message):
    path = tmp_path / "file.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"--{read.__name__} {path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"--{read.__name__} {tmp_path}: "):
        read(tmp_path)


def test_small_files_are_read_with_their_marks(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(squad_file(qas(), context="Änn 🙂\r\n{x} did.")).encode())
    sources = Sources(squad=path)
    benchmark = GeneratedRuler(BYTES, tasks=["qa_1"], lengths=[4096], samples=2, sources=sources)
    for example in benchmark.examples():
        assert "Document 2:\nÄnn 🙂\r\n{x} did." in text_of(BYTES, benchmark.prompt_ids(example))
