"""RULER's question answering (qa_1, qa_2): the paragraphs that hold the answer, among others.

Paragraphs and questions are SQuAD's and HotpotQA's where a file with them is given. Without one they are passages of our
own, which no model was trained on: the paragraphs that hold an answer are the question's own, and the others of their
passage are the first to stand beside them. Gaps are asked for by the sentence with the gap, choices by the open question
alone, since a prediction is right as soon as it mentions the answer and options would be mentioned.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfactory.benchmarks.reading import PASSAGES, read_passages
from kvfactory.benchmarks.ruler_tasks import Sample, Task, filling
from kvfactory.errors import UserError, require


@dataclass(frozen=True)
class Question:
    """A question; documents are named by their index."""

    query: str
    answers: list[str]
    own: list[int]
    """The documents that are always there."""
    more: list[int]
    """The first to stand beside them."""


@dataclass(frozen=True)
class Reading:
    """Documents, and questions about them."""

    documents: list[str]
    questions: list[Question]
    name: str
    sha256: str
    """Of the file, as it is."""

    def record(self) -> dict[str, Any]:
        """What run_meta.json says about it."""
        return {"name": self.name, "questions": len(self.questions), "sha256": self.sha256}


class QuestionAnswering(Task):
    """The size is the number of documents; where all do not fill a context they are there several times."""

    template = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        "\n\nThe following are given documents.\n\n{context}\n\n"
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        "\n\nQuestion: {query}"
    )
    prefix = " Answer:"

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    def draw(self, place: str, number: int, length: int) -> Sample:
        """Samples take the questions in turn; one that is asked again has other documents beside its own."""
        question = self.reading.questions[number % len(self.reading.questions)]
        return Sample(
            answers=question.answers,
            prefix=self.prefix,
            text=lambda size: self._text(question, size, filling(place)),
            least=len(question.own),
            query=question.query,
        )

    def _text(self, question: Question, size: int, rng: random.Random) -> str:
        documents = self.reading.documents
        near = {*question.own, *question.more}
        others = [index for index in range(len(documents)) if index not in near]
        ranked = [*question.own, *rng.sample(question.more, len(question.more)), *rng.sample(others, len(others))]
        chosen = (ranked * -(-size // len(ranked)))[:size]
        rng.shuffle(chosen)
        context = "\n\n".join(f"Document {place}:\n{documents[index]}" for place, index in enumerate(chosen, start=1))
        return self.template.format(context=context, query=question.query)


# ---- where documents and questions come from ----

Asked = tuple[str, list[str], list[str], list[str]]
"""A query, its answers, its own documents, and the first to stand beside them."""


def passages(kind: str, titled: bool) -> Reading:
    """The passages of our own, with their questions of one kind; `titled` documents begin with the passage's title."""
    asked = []
    for passage in read_passages():
        parts = [f"{passage.title}\n{part}" if titled else part for part in passage.text.split("\n\n")]
        for rank, each in enumerate(each for each in passage.questions if each.kind == kind):
            answer = re.compile(rf"\b{re.escape(each.answer)}\b")
            own = [part for part in parts if answer.search(part)]
            more = [part for part in parts if part not in own]
            asked.append((rank, (each.question, [each.answer], own, more)))
    asked.sort(key=lambda pair: pair[0])  # one of each passage, then another: few samples ask about many passages
    return _reading([question for _, question in asked], "kvfactory's passages", PASSAGES.read_bytes())


def squad(path: Path) -> Reading:
    """The answerable questions of a file in the format of SQuAD's dev-v2.0.json; UserError for another one."""
    content, place = _content("--squad", path)
    asked: list[Asked] = []
    for where, article in _items(_parsed(content, place), place, "data"):
        paragraphs = list(_items(article, where, "paragraphs"))
        contexts = [_field(paragraph, there, "context", str) for there, paragraph in paragraphs]
        for (there, paragraph), context in zip(paragraphs, contexts, strict=True):
            for spot, each in _items(paragraph, there, "qas"):
                if not each.get("is_impossible"):
                    answers = [_field(answer, at, "text", str) for at, answer in _items(each, spot, "answers")]
                    require(all(answers) and bool(answers), f"{spot}: an answerable question has one answer or more")
                    more = [other for other in dict.fromkeys(contexts) if other != context]
                    asked.append((_field(each, spot, "question", str), answers, [context], more))
    require(bool(asked), f"{place}: no answerable question in it")
    return _reading(asked, str(path), content)


def hotpotqa(path: Path) -> Reading:
    """The questions of a file in the format of hotpot_dev_distractor_v1.json; UserError for another one."""
    content, place = _content("--hotpotqa", path)
    asked: list[Asked] = []
    for where, each in _items({"questions": _parsed(content, place)}, place, "questions"):
        own = []
        for at, document in enumerate(_field(each, where, "context", list)):
            match document:
                case [str(title), [*sentences]] if all(isinstance(sentence, str) for sentence in sentences):
                    own.append(f"{title}\n{''.join(sentences)}")
                case _:
                    raise UserError(f"{where}.context[{at}]: expected a title and a list of sentences")
        answer = _field(each, where, "answer", str)
        require(bool(own) and bool(answer), f"{where}: a question has an answer and one document or more")
        asked.append((_field(each, where, "question", str), [answer], own, []))
    require(bool(asked), f"{place}: no question in it")
    return _reading(asked, str(path), content)


def _reading(asked: list[Asked], name: str, content: bytes) -> Reading:
    """Documents become their place among all, sorted and each once."""
    documents = sorted({document for _, _, own, more in asked for document in (*own, *more)})
    index = {document: place for place, document in enumerate(documents)}
    questions = [
        Question(query, answers, [index[each] for each in dict.fromkeys(own)], [index[each] for each in more])
        for query, answers, own, more in asked
    ]
    return Reading(documents, questions, name, hashlib.sha256(content).hexdigest())


def _content(flag: str, path: Path) -> tuple[bytes, str]:
    """The file's bytes, and how errors name it."""
    try:
        return path.read_bytes(), f"{flag} {path}"
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; give a JSON file") from error


def _parsed(content: bytes, place: str) -> Any:
    try:
        parsed = json.loads(content)
        json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from error
    return parsed


_KINDS: dict[type, str] = {str: "a string", list: "a list"}


def _field(node: Any, place: str, name: str, kind: type) -> Any:
    require(isinstance(node, dict), f"{place}: expected an object with '{name}'")
    require(isinstance(node.get(name), kind), f"{place}: '{name}' is missing or not {_KINDS[kind]}")
    return node[name]


def _items(node: Any, place: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with its place."""
    for index, item in enumerate(_field(node, place, name, list)):
        require(isinstance(item, dict), f"{place}: {name}[{index}] is not an object")
        yield f"{place}: {name}[{index}]", item
