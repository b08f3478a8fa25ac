"""A sweep: many methods and budgets over the same examples, one prefill an example, decode steps shared by all.

Examples whose rows are in the run folder already are skipped, and of the others only the missing methods run. Questions
about one context go on from copies of one compressed cache; the turns of a conversation go on from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .benchmarks import Benchmark, Example
from .engine import DecodeRow, Engine
from .engine import Sequence as DecodedSequence
from .folder_format import Course, Size, Subject, flat
from .jobs import Job
from .recording import Recorder
from .results import Row, RunFolder, key_of


@dataclass(frozen=True)
class Footprint:
    """What a sequence keeps of its prompt, right after the prefill."""

    size: Size
    kept: str
    """Which tokens those are, for the recorder."""


@dataclass(eq=False, kw_only=True)
class Running(DecodeRow):
    """A sequence in decoding, and what its row will say."""

    example: Example
    job: Job
    footprint: Footprint
    question_tokens: int = 0
    """Tokens read after the prompt was compressed, or after the answer before."""
    fork: DecodedSequence | None = None
    """Where the next turn begins, if not behind this one's answer."""


class Sweep:
    """Runs jobs over a benchmark's examples and writes a row for each."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        benchmark: Benchmark,
        jobs: Sequence[Job],
        folder: RunFolder,
        stop: Collection[int],
        *,
        rows_at_once: int = 64,
        bytes_at_once: float = 4 * 2**30,
        record_tokens: int = 0,
        prefill_chunk: int | None = None,
    ) -> None:
        """`stop` are the model's own stop tokens.

        At most `rows_at_once` sequences decode together, and no example joins while their caches hold `bytes_at_once`;
        an example whose rows alone are more decodes alone. Of each prompt `record_tokens` are recorded (`recording`).
        Prompts of more than `prefill_chunk` tokens are read in chunks (`chunks`).
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self.benchmark = benchmark
        self.jobs = jobs
        self.folder = folder
        self.stop = frozenset(stop)
        self.rows_at_once = rows_at_once
        self.bytes_at_once = bytes_at_once
        self.prefill_chunk = prefill_chunk
        self.recorder = Recorder(folder, tokenizer, record_tokens)
        self._following = {each.after: each for each in benchmark.examples() if each.after is not None}
        self._compressed: dict[Any, tuple[DecodedSequence, Footprint]] = {}
        """The prompt of the example before under each job that has read it, while more questions about it follow."""
        self._asked = ""
        """The example before."""

    def missing(self) -> list[tuple[Example, list[Job]]]:
        """What is left to do: examples with a prompt of their own, and the jobs that lack its row or one of a later turn."""
        todo = [
            (example, [job for job in self.jobs if any(self._lacks(turn, job) for turn in self._turns(example))])
            for example in self.benchmark.examples()
            if example.after is None
        ]
        return [(example, jobs) for example, jobs in todo if jobs]

    def count_missing(self) -> int:
        """Rows that are left to write."""
        return sum(self._lacks(example, job) for example in self.benchmark.examples() for job in self.jobs)

    def _turns(self, example: Example) -> Iterator[Example]:
        """The example and the turns behind it."""
        turn: Example | None = example
        while turn is not None:
            yield turn
            turn = self._following.get(turn.id)

    def _lacks(self, example: Example, job: Job) -> bool:
        return (example.id, *job.key) not in self.folder.done

    def rows(self) -> list[Row]:
        """All rows of the folder, in the order of examples and jobs rather than that in which they ended."""
        examples = {example.id: rank for rank, example in enumerate(self.benchmark.examples())}
        jobs = {job.key: rank for rank, job in enumerate(self.jobs)}

        def rank(row: Row) -> tuple[int, int]:
            job = jobs.get(key_of(row)[1:], len(jobs))
            return job, examples.get(row["example_id"], len(examples))

        return sorted(self.folder.rows, key=rank)

    def warm_up(self) -> None:
        """Run every method once on a short prompt, so that first calls are not in anybody's time."""
        prompt = [1] * 2 * max((job.budget for job in self.jobs if isinstance(job.budget, int)), default=128)
        self.engine.decode(self.engine.prefill(prompt[:256] or [1], [job.method for job in self.jobs]), 2)

    def run(self, on_row: Callable[[Row], None] = lambda row: None) -> None:
        """Everything that is missing; `on_row` is called with each row once it is written."""
        active: list[Running] = []
        todo = self.missing()
        contexts = pairwise([*(example.context for example, _ in todo), None])
        for (example, jobs), (context, following) in zip(todo, contexts, strict=True):
            if self.benchmark.one_pass:
                for row in self._read(example, jobs):
                    self._write(row, on_row)
                continue
            while active and not self._has_room(active, len(jobs)):
                active = self._step(active, on_row)
            active += self._start(example, jobs, more=context is not None and context == following)
        while active:
            active = self._step(active, on_row)

    def _has_room(self, active: list[Running], more: int) -> bool:
        held = sum(row.footprint.size.cache_bytes for row in active)
        return len(active) + more <= self.rows_at_once and held < self.bytes_at_once

    def _read(self, example: Example, jobs: Sequence[Job]) -> list[Running]:
        """Prompt and targets in one pass; the rows have ended then."""
        text = [*self.benchmark.prompt_ids(example), *self.benchmark.target_ids(example)]
        self.recorder.prompt(example.id, text)
        sequences = self.engine.prefill(text, [job.method for job in jobs], losses=True)
        return [
            Running(sequence=each, max_new_tokens=0, stop=(), example=example, job=job, footprint=self._footprint(each))
            for job, each in zip(jobs, sequences, strict=True)
        ]

    def _start(self, example: Example, jobs: Sequence[Job], more: bool) -> list[Running]:
        prompts = self._prompts(example, jobs, more)
        rows = [self._turn(example, job, *prompts[job.key]) for job in jobs]
        return self._ready(rows)

    def _prompts(
        self, example: Example, jobs: Sequence[Job], more: bool
    ) -> dict[Any, tuple[DecodedSequence, Footprint]]:
        """The example's prompt under each job, and its size; held for the next example if it has `more` to ask."""
        held, self._compressed = self._compressed, {}
        unread = [job for job in jobs if job.key not in held]
        question = self.benchmark.question_ids(example)
        if not unread:
            self.recorder.question(example.id, question, behind=self._asked)
        else:
            ids = self.benchmark.prompt_ids(example)
            self.recorder.prompt(example.id, ids, question)
            sequences = self.engine.prefill(ids, [job.method for job in unread], chunk=self.prefill_chunk)
            held |= {job.key: (each, self._footprint(each)) for job, each in zip(unread, sequences, strict=True)}
        self._asked = example.id
        if not more:
            return held
        self._compressed = held
        return {job.key: (held[job.key][0].fork(), held[job.key][1]) for job in jobs}

    def _turn(self, example: Example, job: Job, sequence: DecodedSequence, size: Footprint) -> Running:
        """The example's question, put to a sequence that has the prompt or earlier turns behind it."""
        question = self.benchmark.question_ids(example)
        if question:
            sequence.unfed += question
            sequence.logits = None
        targets = self.benchmark.target_ids(example)
        return Running(
            sequence=sequence,
            max_new_tokens=len(targets) or example.max_new_tokens,
            stop=() if targets else self.stop | example.stop_ids,
            min_new_tokens=example.min_new_tokens,
            targets=targets,
            example=example,
            job=job,
            footprint=size,
            question_tokens=len(question),
        )

    def _ready(self, rows: list[Running]) -> list[Running]:
        """Questions read, and a copy made where the next turn is not to see this one's answer."""
        self.engine.feed([row.sequence for row in rows if row.sequence.logits is None])
        if self.benchmark.golden_turns:
            for row in rows:
                row.fork = row.sequence.fork() if row.example.id in self._following else None
        return rows

    def _step(self, active: list[Running], on_row: Callable[[Row], None]) -> list[Running]:
        going = self.engine.step(active)
        for ended in (row for row in active if row.sequence.stop_reason):
            if self._lacks(ended.example, ended.job):
                self._write(ended, on_row)
            going += self._next_turn(ended)
        return going

    def _next_turn(self, ended: Running) -> list[Running]:
        turn = self._following.get(ended.example.id)
        if turn is None or not any(self._lacks(each, ended.job) for each in self._turns(turn)):
            return []
        sequence = ended.fork or ended.sequence
        if not ended.fork and sequence.stop_reason == "stop":
            sequence.unfed.pop()  # the stop token belongs to what the next turn begins with
        self.recorder.question(
            turn.id, self.benchmark.question_ids(turn), behind=ended.example.id, after=ended.example.id
        )
        fresh = replace(sequence, tokens=[], losses=[], decode_seconds=0.0, stop_reason=None)
        return self._ready([self._turn(turn, ended.job, fresh, ended.footprint)])

    def _write(self, ended: Running, on_row: Callable[[Row], None]) -> None:
        row = self._row(ended)
        self.recorder.kept(row, ended.footprint.kept)
        self.folder.append(row)
        on_row(row)

    def _row(self, ended: Running) -> Row:
        sequence, example, job = ended.sequence, ended.example, ended.job
        course = Course(
            prompt_tokens=sequence.prompt_tokens,
            question_tokens=ended.question_tokens,
            new_tokens=len(sequence.tokens),
            read_tokens_mean=fmean(sequence.cache.read()),
            stop_reason=sequence.stop_reason,
            prefill_seconds=sequence.prefill_seconds,
            compress_seconds=sequence.cache.compress_seconds,
            decode_seconds=sequence.decode_seconds,
        )
        return {
            **flat(self._subject(example, job, sequence.prompt_tokens)),
            **self._result(ended),
            **({} if example.ability is None else {"ability": example.ability}),
            **flat(ended.footprint.size),
            **flat(course),
            **job.method.row_fields(sequence.cache.stores),
            **example.info,
        }

    def _subject(self, example: Example, job: Job, prompt_tokens: int) -> Subject:
        method = job.method.for_prompt(prompt_tokens)
        settings, asked = method.row_settings(), method.settings().get("budget")
        budget = asked if isinstance(asked, int) else None
        return Subject(
            benchmark=self.benchmark.name,
            group=example.group,
            example_id=example.id,
            method=job.label,
            budget=budget,
            budget_share=job.budget if isinstance(job.budget, str) else None,
            settings=settings | ({"budget": budget} if "budget" in settings else {}),
            memory=job.method.memory,
        )

    def _result(self, ended: Running) -> Row:
        """What was generated and how it scores, or what the targets cost."""
        if ended.targets or self.benchmark.one_pass:
            return dict(self.benchmark.measure(ended.example, ended.sequence.losses))
        prediction = self.tokenizer.decode(ended.sequence.tokens, skip_special_tokens=True)
        scores = self.benchmark.score(ended.example, prediction)
        return {"prediction": prediction, "answers": ended.example.answers, **scores, "scores": list(scores)}

    def _footprint(self, sequence: DecodedSequence) -> Footprint:
        full = full_cache_bytes(self.engine.model, sequence.prompt_tokens)
        return Footprint(size_of(sequence, full), self.recorder.levels(sequence.cache.stores, sequence.prompt_tokens))


def size_of(sequence: DecodedSequence, full: int) -> Size:
    """What a sequence that has read its prompt keeps of it; a cache of the prompt that keeps everything has `full` bytes."""
    kept = sequence.cache.kept()
    held = sequence.cache.nbytes()
    return Size(
        kept_tokens_min=min(kept),
        kept_tokens_mean=sum(kept) / len(kept),
        kept_tokens_max=max(kept),
        cache_bytes=held,
        full_cache_bytes=full,
        ratio=held / full,
        evicted=min(kept) < sequence.prompt_tokens,
    )


def full_cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens, in all layers, nothing compressed."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize * tokens
