"""The San Francisco sandwich of the first needle test, asked for as KVCache-Factory does or as that test itself did."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from kvfactory.benchmarks.haystack import TokenizedHaystack, insert_needle
from kvfactory.benchmarks.needle_styles import LEAST_CONTEXT, Cell, Chat, Style
from kvfactory.chat import joined


@cache
def _rouge_1() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # here, because it takes half a second

    return RougeScorer(["rouge1"], use_stemmer=True)


class SanFrancisco(Style):
    """The needle, where it goes and the scores. 200 tokens of the context length are left for the wording.

    Sample 0 begins where the haystack begins and is the first test's own; others begin at other sentences.
    """

    needle = "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n"
    expected = "eat a sandwich and sit in Dolores Park on a sunny day."
    buffer = 200

    def __init__(self, hay: TokenizedHaystack, chat: Chat | None, seed: int) -> None:
        super().__init__(hay, chat, seed)
        self._needle_ids = self.hay.encode(self.needle)
        self.shortest = self.buffer + len(self._needle_ids) + LEAST_CONTEXT

    def answers(self, cell: Cell) -> list[str]:
        return [self.expected]

    def facts(self, cell: Cell) -> dict[str, Any]:
        return {"expected": self.expected, "haystack_start": self.start(cell, first=0)}

    def context(self, cell: Cell) -> str:
        """The text with the needle in it."""
        around = self.hay.window(self.start(cell, first=0), cell.length)
        limit = cell.length - self.buffer
        return self.hay.decode(insert_needle(around, self._needle_ids, cell.depth, self.hay.stops, limit))

    @classmethod
    def score(cls, answers: Sequence[str], prediction: str) -> dict[str, float]:
        words = set(cls.expected.lower().split())
        recall = len(words & set(prediction.lower().split())) / len(words)
        return {"score": recall, "rouge1": _rouge_1().score(cls.needle, prediction)["rouge1"].fmeasure}


class Sandwich(SanFrancisco):
    """KVCache-Factory's question, which ends where the answer begins; in a chat the assistant has begun to answer."""

    name = label = "sandwich"
    max_new_tokens = 30
    plain_wording = (
        "<|im_start|> This is a very long story book: <book> {context} </book>.\n Based on the content of the book, "
        "Question: The best thing to do in San Francisco is: ",
        "\nAnswer:",
    )
    chat_wording = (
        "This is a very long story book: <book> {context} </book>.\n Based on the content of the book, "
        "Question: What is the best thing to do in San Francisco?",
        "The best thing to do in San Francisco is",
    )

    def __init__(self, hay: TokenizedHaystack, chat: Chat | None, seed: int) -> None:
        super().__init__(hay, chat, seed)
        self.stop_ids = frozenset(self.hay.encode("\n")[-1:])

    def prompt_ids(self, cell: Cell) -> list[int]:
        text, prefix = self.chat_wording if self.chat else self.plain_wording
        return self.render(text.format(context=self.context(cell)), prefix)


class Original(SanFrancisco):
    """The first test's turns: the system's, the context and the question, each by itself; 300 tokens to answer in.

    That test had another language model grade answers; here they have the scores of the sandwich.
    """

    name = label = "original"
    max_new_tokens = 300
    system = "You are a helpful AI bot that answers questions for a user. Keep your response short and direct"
    question = (
        "What is the best thing to do in San Francisco? "
        "Don't give information outside the document or repeat your findings"
    )

    def prompt_ids(self, cell: Cell) -> list[int]:
        earlier = [{"role": "system", "content": self.system}, {"role": "user", "content": self.context(cell)}]
        if self.chat:
            return self.chat(self.question, "", earlier)
        return self.render(joined([*earlier, {"role": "user", "content": self.question}]), "")
