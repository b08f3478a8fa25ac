"""Reading comprehension: questions of four kinds about a passage, which stand before it or after it.

A question that stands after the passage is what the prompt ends with, so a method that goes by the prompt's last queries
knows it when it chooses. One that stands before it has shaped how the passage was read, and nothing else. The passages
that come along are inventions, which no model can know by heart; each answer is stated in one place.
"""

from __future__ import annotations

import json
import re
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

KINDS = ("true or false", "fill the blank", "multiple choice", "matching")
"""Kinds of questions; of the last two's options one is right."""
FIELDS = ("kind", "question", "answer", "options", "prefix", "evidence")
"""What a file says of a question."""
PLACEMENTS = {
    "before": "Question: {question}\n\nThe answer is in this text:\n\n{text}",
    "after": "{text}\n\nQuestion: {question}",
}
"""Where the question stands."""
PASSAGES = resources.files("kvfactory.benchmarks").joinpath("reading.json")
"""Those that come along."""
BLANK = re.compile(r"_{2,}")
TRUTH = {
    "true": re.compile(r"^yes\b|\b(true|correct)\b"),
    "false": re.compile(r"^no\b|\b(false|untrue|incorrect|not (true|correct))\b"),
}
_LETTER = r"[^\W\u3040-\u30ff\u3400-\u9fff]"
"""One that belongs to the word beside it: Chinese and Japanese put no blanks between theirs."""


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
    def ability(self) -> float:
        """The mean score that lies clearly above guessing."""
        if self.kind == "fill the blank":
            return 0.3
        return 1 / (len(self.options) or len(TRUTH)) + 0.15

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
        place = _find(question.evidence or question.answer, self.text)
        return None if place is None else round(100 * place / len(self.text), 1)


def _find(words: str, text: str) -> int | None:
    """Where the words stand in the text, as whole words."""
    found = re.search(rf"(?<!{_LETTER}){re.escape(words)}(?!{_LETTER})", text)
    return found.start() if found else None


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
    title, text, questions = (
        field_of(row, name, kind, where) for name, kind in (("title", str), ("text", str), ("questions", list))
    )
    require(bool(text.strip()), f"{where}: its text is empty")
    require(bool(questions), f"{where}: it has no questions")
    asked = [_question(each, f"{where}, question {number}") for number, each in enumerate(questions, start=1)]
    for number, each in enumerate(asked, start=1):
        said = not each.evidence or _find(each.evidence, text) is not None
        require(said, f"{where}, question {number}: the passage does not say '{each.evidence}'; expected words of it")
    return Passage(title, text, tuple(asked))


def _question(row: Any, where: str) -> Question:
    kind, asked, answer = (field_of(row, name, str, where) for name in ("kind", "question", "answer"))
    for name in row:
        if name not in FIELDS:
            raise UserError(f"{where}: {unknown('field', name, FIELDS)}")
    kind = kind_of(kind, where)
    require(bool(asked.strip()), f"{where}: the question is empty")
    require(bool(normalize_answer(answer)), f"{where}: the answer '{answer}' has no word in it")
    options = field_of(row, "options", list, where, [])
    require(all(isinstance(each, str) for each in options), f"{where}: 'options' is not a list of texts")
    if kind in ("multiple choice", "matching"):
        require(
            answer in options, f"{where}: the answer '{answer}' is not among the options; expected a list that has it"
        )
        different = {normalize_answer(each) for each in options} - {""}
        require(1 < len(options) == len(different), f"{where}: expected two or more options that differ in their words")
    else:
        require(not options, f"{where}: 'options' are for multiple choice and matching; leave them out")
    if kind == "true or false":
        require(answer in TRUTH, f"{where}: the answer is '{answer}'; expected true or false")
    if kind == "fill the blank":
        require(len(BLANK.findall(asked)) == 1, f"{where}: expected one ____ in the question, where the answer belongs")
    texts = {name: field_of(row, name, str, where, "") for name in ("prefix", "evidence")}
    return Question(kind, asked, answer, tuple(options), **texts)


def kind_of(name: str, where: str) -> str:
    """The kind of that name, whether blanks, hyphens or underscores stand between its words; else UserError."""
    kind = " ".join(re.split(r"[-_\s]+", name.strip().lower()))
    if kind not in KINDS:
        raise UserError(f"{where}: {unknown('kind of question', kind, KINDS)}")
    return kind


def score(example: Example, prediction: str) -> dict[str, float]:
    """`score` is whether the answer is right, by the kind of question.

    true or false       the first of true, correct, false, untrue, incorrect, not true and not correct in the answer
                        decides, or a yes or no that it begins with
    fill the blank      the answer contains the missing words in a row; `f1` is LongBench's
    multiple choice     the option that is named first decides, and so it does for
    matching

    Texts are compared in lower case, word by word, without punctuation and articles.
    """
    said, [answer] = normalize_answer(prediction), example.answers
    match example.info["kind"]:
        case "true or false":
            places = {each: found.start() for each, words in TRUTH.items() if (found := words.search(said))}
        case "fill the blank":
            right = _find(normalize_answer(answer), said) is not None
            return {"score": float(right), "f1": qa_f1_score(prediction, answer)}
        case _:
            at = {each: _find(normalize_answer(each), said) for each in example.info["options"]}
            places = {each: place for each, place in at.items() if place is not None}
    first = min(places, key=lambda each: (places[each], -len(each)), default=None)
    return {"score": float(first == answer)}


class Reading(Benchmark):
    """Every question of some passages at every placement; a group is a kind at a placement.

    The words that an answer is made to begin with are read after compression, so that no method knows the question by
    them. `template` says whether texts are put inside the model's chat template.
    """

    name = "reading"
    max_new_tokens = 16

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        passages: Sequence[Passage],
        *,
        placements: Sequence[str] = tuple(PLACEMENTS),
        kinds: Sequence[str] = KINDS,
        template: bool = True,
    ) -> None:
        for name in placements:
            if name not in PLACEMENTS:
                raise unknown("placement", name, PLACEMENTS)
        kinds = [kind_of(name, "--kinds") for name in kinds]
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
                ability=question.ability,
                info={
                    "kind": question.kind,
                    "placement": placement,
                    "passage": passage.title,
                    "question": question.question,
                    "options": list(question.options),
                    "prefix": question.prefix,
                    "depth_percent": passage.depth(question),
                },
            )
            for name, (passage, question, placement) in self._asked.items()
        ]

    def prompt_ids(self, example: Example) -> list[int]:
        passage, question, placement = self._asked[example.id]
        text = PLACEMENTS[placement].format(question=question.text, text=passage.text)
        return chat_ids(self.tokenizer, text if self.template else f"{text}\n\nAnswer:", template=self.template)

    def question_ids(self, example: Example) -> list[int]:
        prefix = self._asked[example.id][1].prefix
        begun = prefix if self.template or not prefix else f" {prefix}"
        return list(self.tokenizer.encode(begun, add_special_tokens=False))

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        return score(example, prediction)
