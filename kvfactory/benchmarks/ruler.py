"""RULER: 13 synthetic tasks at any length, made with the model's own tokenizer, with the official wording and scores.

    ruler = GeneratedRuler(tokenizer, tasks=["niah_single_1", "vt"], lengths=[4096], samples=10, sources=Sources())

A length counts everything: the prompt as it is sent, chat template and special tokens included, and the longest answer
that the task may have. Official samples are often some hundred tokens short, since they shrink in large steps; here each
gets the largest size that fits. `ruler_files.ReadyMade` reads samples that the official generator made.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kvfactory.benchmarks import Benchmark, Example
from kvfactory.benchmarks.haystack import Haystack, load_haystack
from kvfactory.benchmarks.needle_styles import Chat
from kvfactory.benchmarks.ruler_haystacks import Essay, NeedleInAHaystack, Needles, Noise, VariableTracking
from kvfactory.benchmarks.ruler_qa import QuestionAnswering, Reading, hotpotqa, passages, squad
from kvfactory.benchmarks.ruler_tasks import TOKENS_TO_GENERATE, Sample, Task
from kvfactory.benchmarks.ruler_words import CommonWords, FrequentWords
from kvfactory.errors import UserError, require, unknown
from kvfactory.metrics import RULER_TASKS, ruler_score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ABILITY = 0.5
"""The mean score that a whole cache must reach in a task: below it the model fails by itself, whatever is kept."""


class Sources:
    """Where essays, questions and documents come from; read when they are first needed."""

    def __init__(
        self, essays: str | Path | None = None, squad: Path | None = None, hotpotqa: Path | None = None
    ) -> None:
        """A text file or a folder of them, and files in the official formats; None is what the package has itself."""
        self._essays, self._squad, self._hotpotqa = essays, squad, hotpotqa

    @cached_property
    def text(self) -> Haystack:
        return load_haystack(self._essays, "--essays")

    @cached_property
    def essay(self) -> Essay:
        return Essay(self.text.text)

    @cached_property
    def squad(self) -> Reading:
        return squad(self._squad) if self._squad else passages("fill the blank", titled=False)

    @cached_property
    def hotpotqa(self) -> Reading:
        return hotpotqa(self._hotpotqa) if self._hotpotqa else passages("multiple choice", titled=True)

    def record(self) -> dict[str, Any]:
        """What run_meta.json says about them; the same whichever tasks are run."""
        return {
            "essays": self.text.record(),
            "qa_1": self.squad.record(),
            "qa_2": self.hotpotqa.record(),
            "wonderwords": metadata.version("wonderwords"),
        }


TASKS: dict[str, Callable[[Sources], Task]] = {
    "niah_single_1": lambda sources: NeedleInAHaystack(Noise()),
    "niah_single_2": lambda sources: NeedleInAHaystack(sources.essay),
    "niah_single_3": lambda sources: NeedleInAHaystack(sources.essay, values="uuids"),
    "niah_multikey_1": lambda sources: NeedleInAHaystack(sources.essay, num_keys=4),
    "niah_multikey_2": lambda sources: NeedleInAHaystack(Needles("words", "numbers")),
    "niah_multikey_3": lambda sources: NeedleInAHaystack(Needles("uuids", "uuids"), keys="uuids", values="uuids"),
    "niah_multivalue": lambda sources: NeedleInAHaystack(sources.essay, num_values=4),
    "niah_multiquery": lambda sources: NeedleInAHaystack(sources.essay, num_keys=4, num_queries=4),
    "vt": lambda sources: VariableTracking(),
    "cwe": lambda sources: CommonWords(),
    "fwe": lambda sources: FrequentWords(),
    "qa_1": lambda sources: QuestionAnswering(sources.squad),
    "qa_2": lambda sources: QuestionAnswering(sources.hotpotqa),
}


def score(example: Example, prediction: str) -> dict[str, float]:
    """The share of the answers that the prediction mentions; in the qa tasks whether it mentions any."""
    # One by one, since the official score of several is rounded.
    task = example.info["task"]
    found = [ruler_score(task, [prediction], [[answer]]) / 100 for answer in example.answers]
    return {"score": max(found) if task.startswith("qa") else fmean(found)}


class Ruler(Benchmark):
    """Samples of tasks at lengths; a group is a task at a length. Where they come from is a subclass's.

    `chat` wraps a user's turn for an instruct model and puts the beginning of the answer behind it; without it the prompt
    is plain text.
    """

    name = "ruler"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat | None) -> None:
        self._tokenizer, self._chat = tokenizer, chat

    def render(self, text: str, prefix: str) -> list[int]:
        """Token ids of a task's text and of how the answer begins, with what the model wants around them."""
        if self._chat:
            return self._chat(text, prefix)
        return list(self._tokenizer.encode(text + prefix, verbose=False))

    def score(self, example: Example, prediction: str) -> dict[str, float]:
        return score(example, prediction)

    @staticmethod
    def example(task: str, length: int, number: int, answers: list[str], **info: str) -> Example:
        """The example of a sample; `info` is what the row says of it."""
        return Example(
            id=f"{task}/{length}/{number}",
            group=f"{task} {length}",
            answers=answers,
            max_new_tokens=TOKENS_TO_GENERATE[task],
            ability=ABILITY,
            info={"task": task, "context_length": length, "sample": number, **info},
        )

    @abstractmethod
    def examples(self) -> Sequence[Example]:
        """By length, task and sample."""


class GeneratedRuler(Ruler):
    """Samples made here, `samples` of each task at each length.

    Lengths are in tokens. UserError for a task that is not there, a length beyond the `window` of the model, and one
    that is too short, with the task that needs most.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tasks: Sequence[str],
        lengths: Sequence[int],
        samples: int,
        sources: Sources,
        seed: int = 42,
        chat: Chat | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__(tokenizer, chat)
        made = {task: TASKS[task](sources) for task in known_tasks(tasks)}
        require(samples >= 1, f"--samples {samples}: a task needs 1 or more")
        self._examples: list[Example] = []
        self._samples: dict[str, Sample] = {}
        for length in dict.fromkeys(lengths):
            check_window(length, window)
            drawn = {
                name: [task.draw(f"{seed}/{name}/{number}", number, length) for number in range(samples)]
                for name, task in made.items()
            }
            shortest = {name: self._shortest(name, each) for name, each in drawn.items()}
            longest = max(shortest, key=lambda name: shortest[name])
            if length < shortest[longest]:
                raise UserError(
                    f"--lengths {length}: too short for {longest}; leave it out of --tasks, or give the shortest possible, "
                    f"{shortest[longest]}"
                )
            for name, each in drawn.items():
                for number, sample in enumerate(each):
                    example = self.example(name, length, number, sample.answers, query=sample.query)
                    self._examples.append(example)
                    self._samples[example.id] = sample

    def examples(self) -> Sequence[Example]:
        return self._examples

    def prompt_ids(self, example: Example) -> list[int]:
        """The sample at the largest size with which prompt and longest answer fit its length."""
        sample = self._samples[example.id]
        room = example.info["context_length"] - example.max_new_tokens
        written: dict[int, list[int]] = {}

        def tokens(size: int) -> int:
            written[size] = self._written(sample, size)
            return len(written[size])

        # Four units a token are more than there is of anything; a tokenizer may make no tokens of a text at all.
        most = sample.least + 4 * room if sample.most is None else sample.most
        return written[largest_fit(tokens, sample.least, most, room)]

    def _shortest(self, task: str, samples: Sequence[Sample]) -> int:
        """The tokens of the longest of these samples at its smallest size, the answer included."""
        return TOKENS_TO_GENERATE[task] + max(len(self._written(each, each.least)) for each in samples)

    def _written(self, sample: Sample, size: int) -> list[int]:
        return self.render(sample.text(size), sample.prefix)


def known_tasks(names: Sequence[str]) -> list[str]:
    """The tasks with those names, each once; UserError for an unknown one."""
    for name in names:
        if name not in RULER_TASKS:
            raise unknown("RULER task", name, RULER_TASKS)
    return list(dict.fromkeys(names))


def check_window(length: int, window: int | None) -> None:
    """UserError for a length that the model's window, in tokens, has no room for."""
    if window is not None and length > window:
        raise UserError(f"--lengths {length}: longer than the model's window of {window} tokens")


def largest_fit(tokens: Callable[[int], int], least: int, most: int, room: int) -> int:
    """The largest size from `least` to `most` whose `tokens` fit the `room`, where `least` is known to fit.

    Tokens are nearly proportional to the size, so that a line through the last two sizes finds it in a few attempts; every
    eighth one halves the range instead, and each narrows it, so that the search ends for any function.
    """
    fits, used, too_large = least, tokens(least), most + 1
    size = 2 * least
    attempts = 0
    while too_large - fits > 1:
        size = min(max(size, fits + 1), too_large - 1)
        needed = tokens(size)
        rate = (needed - used) / (size - fits)
        if needed <= room:
            fits, used = size, needed
        else:
            too_large = size
        attempts += 1
        by_line = rate > 0 and attempts % 8 > 0
        size = fits + int((room - used) / rate) if by_line else (fits + too_large) // 2
    return fits
