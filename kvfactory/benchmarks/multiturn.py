"""One context, many turns: follow-up questions that are asked in turn, all on the same compressed cache.

A method that scores tokens by the end of the prompt knows the first question and none of those that follow, so it may
answer the first and have thrown away what the others ask for: SCBench's finding (arXiv 2412.10319). Earlier answers stay in
the cache as the model gave them, or, golden, as they should have been, so that one mistake does not lead to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfactory.benchmarks import Benchmark, Example
from kvfactory.benchmarks.json_rows import field_of, read_json_rows
from kvfactory.benchmarks.reading import Passage
from kvfactory.chat import chat_ids, newline_id, next_turn_ids, split_chat_ids
from kvfactory.errors import require
from kvfactory.metrics import normalize_answer, qa_f1_score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HISTORIES = ("own", "golden")
"""Whose earlier answers a turn sees."""
INSTRUCTION = "\n\nAnswer the questions about this text in a few words.\n\n"


@dataclass(frozen=True)
class Turn:
    """A question, what would be right, and the words that the answer is made to begin with."""

    question: str
    answers: list[str]
    prefix: str = ""


@dataclass(frozen=True)
class Conversation:
    """A context and what is asked about it, in order."""

    context: str
    turns: list[Turn]


def conversations_of(passages: Sequence[Passage]) -> list[Conversation]:
    """The questions about each passage that a guess does not answer, each time from another one on.

    So every turn has questions of all kinds.
    """
    talks = []
    for number, each in enumerate(passages):
        asked = [question for question in each.questions if question.kind != "true or false"]
        first = number % max(len(asked), 1)
        turns = [Turn(one.text, [one.answer], one.prefix) for one in (*asked[first:], *asked[:first])]
        talks.append(Conversation(each.text, turns))
    return talks


def read_conversations(path: Path) -> list[Conversation]:
    """Conversations from JSON lines, or one JSON list: `context`, and `turns` or `multi_turns` of `question` and `answers`.

    A turn may say `input` and `answer` as SCBench's do, and have a `prefix`. Raises UserError that names line and turn.
    """
    return [_conversation(row, where) for where, row in read_json_rows(path, "--conversations", "conversation")]


def _conversation(row: Any, where: str) -> Conversation:
    context = field_of(row, "context", str, where)
    turns = row["multi_turns"] if "multi_turns" in row else field_of(row, "turns", list, where)
    require(isinstance(turns, list) and bool(turns), f"{where}: there are no turns in it")
    return Conversation(context, [_turn(turn, f"{where}, turn {n}") for n, turn in enumerate(turns, start=1)])


def _turn(turn: Any, where: str) -> Turn:
    prefix = field_of(turn, "prefix", str, where, "")
    question, answers = turn.get("question", turn.get("input")), turn.get("answers", turn.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    require(isinstance(question, str), f"{where}: no question; expected a text in 'question' or 'input'")
    texts = isinstance(answers, list) and all(isinstance(each, str) for each in answers)
    require(texts, f"{where}: no answers; expected a text or a list of texts in 'answers' or 'answer'")
    return Turn(str(question), list(answers or []), prefix)


def score(example: Example, prediction: str) -> dict[str, float]:
    """`score` is whether the answer contains one of the right ones, word by word; `f1` is LongBench's.

    Texts are compared in lower case without punctuation and articles.
    """
    said = f" {normalize_answer(prediction)} "
    wanted = [each for each in map(normalize_answer, example.answers) if each]
    found = any(f" {answer} " in said for answer in wanted)
    return {
        "score": float(found),
        "f1": max((qa_f1_score(prediction, each) for each in example.answers), default=0.0),
    }


class MultiTurn(Benchmark):
    """The turns of some conversations.

    `history` is one of HISTORIES.
    With `query_agnostic` the first question too is read after compression; else it is part of the prompt. `template`
    says whether texts are put inside the model's chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversations: Sequence[Conversation],
        *,
        history: str,
        query_agnostic: bool = False,
        turns: int | None = None,
        max_new_tokens: int = 24,
        template: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.conversations = conversations
        self.golden_turns = history == "golden"
        self.query_agnostic = query_agnostic
        self.turns = turns
        self.max_new_tokens = max_new_tokens
        self.template = template
        self.name = f"multiturn, {history} answers" + (", query-agnostic" if query_agnostic else "")
        self._stop = frozenset([newline_id(tokenizer)])

    def examples(self) -> list[Example]:
        return [
            Example(
                id=f"{number}/{turn}",
                group=f"turn {turn}",
                answers=asked.answers,
                max_new_tokens=self.max_new_tokens,
                stop_ids=self._stop,
                after=f"{number}/{turn - 1}" if turn > 1 else None,
                info={"conversation": number, "turn": turn, "question": asked.question, "prefix": asked.prefix},
            )
            for number, each in enumerate(self.conversations, start=1)
            for turn, asked in enumerate(each.turns[: self.turns], start=1)
        ]

    def _asked(self, example: Example, back: int = 0) -> Turn:
        return self.conversations[example.info["conversation"] - 1].turns[example.info["turn"] - 1 - back]

    def prompt_ids(self, example: Example) -> list[int]:
        text = self.conversations[example.info["conversation"] - 1].context + INSTRUCTION
        asked = self._asked(example)
        if self.query_agnostic:
            return split_chat_ids(self.tokenizer, text, asked.question, template=self.template)[0]
        return chat_ids(self.tokenizer, text + asked.question, self._begun(asked), template=self.template)

    def question_ids(self, example: Example) -> list[int]:
        asked = self._asked(example)
        if example.after is None:
            split = split_chat_ids(self.tokenizer, "", asked.question, self._begun(asked), template=self.template)
            return split[1] if self.query_agnostic else []
        following = next_turn_ids(self.tokenizer, asked.question, self._begun(asked), template=self.template)
        if not self.golden_turns:
            return following
        before = self._asked(example, back=1)
        said = f"{' ' if before.prefix else ''}{before.answers[0]}" if before.answers else ""
        return [*self.tokenizer.encode(said, add_special_tokens=False), *following]

    def _begun(self, turn: Turn) -> str:
        """How the answer is made to begin."""
        return turn.prefix if self.template else f"\nAnswer: {turn.prefix}".rstrip()

    def tokens(self) -> list[int]:
        """Token ids that each conversation may come to, all turns and answers at their longest."""
        totals = [0] * len(self.conversations)
        for each in self.examples():
            read = [] if each.after else self.prompt_ids(each)
            totals[each.info["conversation"] - 1] += len(read) + len(self.question_ids(each)) + each.max_new_tokens
        return totals

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        return score(example, prediction)
