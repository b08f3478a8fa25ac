"""Reading comprehension: questions of four kinds about a passage, which stand before it or after it.

A question that stands after the passage is what the prompt ends with, so a method that goes by the prompt's last queries
knows it when it chooses. One that stands before it has shaped how the passage was read, and nothing else. The passages
that come along are inventions, which no model can know by heart; each answer is stated in one place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfactory.benchmarks import Benchmark, Example
from kvfactory.benchmarks.json_rows import field_of, read_json_rows
from kvfactory.chat import chat_ids, newline_id
from kvfactory.errors import UserError, require, unknown
from kvfactory.metrics import normalize_answer, qa_f1_score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = {"true or false": 0.65, "fill the blank": 0.3, "multiple choice": 0.4, "matching": 0.4}
"""Kinds of questions, and the mean score that lies clearly above guessing."""
PLACEMENTS = {
    "before": "{question}\n\nThe answer is in this text:\n\n{text}",
    "after": "{text}\n\n{question}",
}
"""Where the question stands."""
PASSAGES = resources.files("kvfactory.benchmarks").joinpath("reading.json")
"""Those that come along."""
TRUTH = {"true": "true", "yes": "true", "false": "false", "no": "false"}


@dataclass(frozen=True)
class Question:
    """A question about a passage."""

    kind: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    """What the answer is chosen from, the answer among them."""
    prefix: str = ""
    """The words that the answer is made to begin with."""
    evidence: str = ""
    """Where the passage says so, if the answer does not stand there itself."""

    @property
    def text(self) -> str:
        """The question as it is asked, with its options."""
        return f"{self.question}\nChoose from: {'; '.join(self.options)}." if self.options else self.question


@dataclass(frozen=True)
class Passage:
    """A text and what is asked about it."""

    title: str
    text: str
    questions: tuple[Question, ...]

    def depth(self, question: Question) -> float | None:
        """Percent of the passage before the place that answers the question; None if it is in other words."""
        place = self.text.find(question.evidence or question.answer)
        return None if place < 0 else round(100 * place / len(self.text), 1)


def read_passages(path: Path | None = None) -> list[Passage]:
    """The passages of a JSON list or of JSON lines, or else those that come along.

    A passage has `title`, `text` and `questions`; a question `kind`, `question` and `answer`, may have `prefix` and
    `evidence`, and has `options` where something is chosen. Raises UserError that names the passage, the question and what
    is wrong.
    """
    if path is None:
        return [_passage(row, PASSAGES.name) for row in json.loads(PASSAGES.read_text("utf-8"))]
    return [_passage(row, where) for where, row in read_json_rows(path, "--passages", "passage")]


def _passage(row: Any, where: str) -> Passage:
    questions = field_of(row, "questions", list, where)
    require(bool(questions), f"{where}: it has no questions")
    asked = [_question(each, f"{where}, question {number}") for number, each in enumerate(questions, start=1)]
    return Passage(field_of(row, "title", str, where), field_of(row, "text", str, where), tuple(asked))


def _question(row: Any, where: str) -> Question:
    kind, answer = field_of(row, "kind", str, where), field_of(row, "answer", str, where)
    if kind not in KINDS:
        raise UserError(f"{where}: {unknown('kind', kind, KINDS)}")
    options = field_of(row, "options", list, where, [])
    require(all(isinstance(each, str) for each in options), f"{where}: 'options' is not a list of texts")
    if kind in ("multiple choice", "matching"):
        require(
            answer in options, f"{where}: the answer '{answer}' is not among the options; expected a list that has it"
        )
    if kind == "true or false":
        require(answer in ("true", "false"), f"{where}: the answer is '{answer}'; expected true or false")
    require(bool(normalize_answer(answer)), f"{where}: the answer '{answer}' has no word in it")
    texts = {name: field_of(row, name, str, where, "") for name in ("prefix", "evidence")}
    return Question(kind, field_of(row, "question", str, where), answer, tuple(options), **texts)


class Reading(Benchmark):
    """Every question of some passages at every placement; a group is a kind at a placement.

    `score` is whether the answer is right, by the kind of question:

    true or false       the first of true, false, yes and no in the answer decides
    fill the blank      the answer contains the missing words in a row; `f1` is LongBench's
    multiple choice     the option that is named first decides, and so it does for
    matching

    Texts are compared in lower case without punctuation and articles. The words that an answer is made to begin with are
    read after compression, so that no method knows the question by them. `template` says whether texts are put inside
    the model's chat template.
    """

    name = "reading"
    max_new_tokens = 16

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        passages: Sequence[Passage],
        *,
        placements: Sequence[str] = tuple(PLACEMENTS),
        kinds: Sequence[str] = tuple(KINDS),
        template: bool = True,
    ) -> None:
        for what, given, known in (("placement", placements, PLACEMENTS), ("kind of question", kinds, KINDS)):
            for name in given:
                if name not in known:
                    raise unknown(what, name, known)
        self.tokenizer = tokenizer
        self.template = template
        self._stop = frozenset([newline_id(tokenizer)])
        self._asked = {
            f"{number}/{which}/{placement}": (passage, question, placement)
            for number, passage in enumerate(passages, start=1)
            for which, question in enumerate(passage.questions, start=1)
            for placement in dict.fromkeys(placements)
            if question.kind in kinds
        }
        require(bool(self._asked), f"none of the passages has a question of the kind {', '.join(kinds)}")

    def examples(self) -> list[Example]:
        return [
            Example(
                id=name,
                group=f"{question.kind}, question {placement}",
                answers=[question.answer],
                max_new_tokens=self.max_new_tokens,
                stop_ids=self._stop,
                ability=KINDS[question.kind],
                info={
                    "kind": question.kind,
                    "placement": placement,
                    "passage": passage.title,
                    "question": question.question,
                    "prefix": question.prefix,
                    "depth_percent": passage.depth(question),
                },
            )
            for name, (passage, question, placement) in self._asked.items()
        ]

    def prompt_ids(self, example: Example) -> list[int]:
        passage, question, placement = self._asked[example.id]
        text = PLACEMENTS[placement].format(question=question.text, text=passage.text)
        if self.template:
            return chat_ids(self.tokenizer, text)
        return list(self.tokenizer.encode(f"{text}\n\nAnswer:", verbose=False))

    def question_ids(self, example: Example) -> list[int]:
        prefix = self._asked[example.id][1].prefix
        begun = prefix if self.template or not prefix else f" {prefix}"
        return list(self.tokenizer.encode(begun, add_special_tokens=False))

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        question = self._asked[example.id][1]
        said = f" {normalize_answer(prediction)} "
        match question.kind:
            case "true or false":
                words = [TRUTH[word] for word in said.split() if word in TRUTH]
                return {"score": float(words[:1] == [question.answer])}
            case "fill the blank":
                found = f" {normalize_answer(question.answer)} " in said
                return {"score": float(found), "f1": qa_f1_score(prediction, question.answer)}
        places = {each: said.find(f" {normalize_answer(each)} ") for each in question.options}
        named = {each: (place, -len(each)) for each, place in places.items() if place >= 0}
        return {"score": float(bool(named) and min(named, key=lambda each: named[each]) == question.answer)}
