"""Latency and memory: what a batch costs from its prompts to its last token, under each configuration by itself.

Prompts are random token ids of an exact length and stop tokens stop nothing, so every configuration does the same work.
Nothing is shared: a batch has a prefill of its own, in one pass, and decodes with no other. Configurations take turns,
forwards and backwards, so that a machine which is busy for a while slows all of them alike. Rows have

    ttft_seconds        from the start of the prefill to the first token: prefill, compression, the likeliest token
    tpot_seconds        a step of the batch: from the first token to the last, by the steps between
    tokens_per_second   of decoding, in all rows of the batch; end_to_end_tokens_per_second counts the prefill too
    cache_bytes         what all caches of the batch hold behind the prompts; cache_bytes_end behind the last step
    peak_bytes          on a GPU, what is allocated at most beyond what was there before; peak_reserved_bytes likewise
    peak_rss_bytes      on a CPU, the most that this process ever held: a hint, and no matter of one configuration
    largest_batch       sequences of that length that fit into so much memory beside the weights, by exact bytes of
                        their caches at the end; activations are left out

Seconds are medians, and `ttft_runs`, `tpot_runs`, ... all of them. What ran out of memory has a row that says `oom`.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from kvfactory.benchmarks import Benchmark, Example
from kvfactory.clock import now
from kvfactory.engine import Engine
from kvfactory.engine import Sequence as DecodedSequence
from kvfactory.errors import require
from kvfactory.folder_format import Size, flat
from kvfactory.jobs import Job
from kvfactory.method import Method
from kvfactory.report.card import with_scores
from kvfactory.results import Row
from kvfactory.sweep import Sweep, full_cache_bytes, size_of

try:
    import resource
except ImportError:  # there is none on Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""How the allocators of torch word it."""


@dataclass(kw_only=True)
class Latency(Benchmark):
    """Batches of random prompts: an example is a prompt length and a batch size."""

    vocabulary: Sequence[int]
    """Token ids that prompts are drawn from."""
    lengths: Sequence[int]
    batch_sizes: Sequence[int] = (1,)
    new_tokens: int = 32
    warmup: int = 1
    """Runs of each configuration that are not counted."""
    repeats: int = 5
    memory_bytes: int | None = None
    """What `largest_batch` is reckoned for."""
    seed: int = 42
    window: int | None = None
    """The most tokens that the model takes, if it says so."""
    scores: Callable[[Sweep], list[Row]] | None = None
    """Rows of another benchmark under the same jobs, whose scores are to stand beside the times."""
    name: str = "latency"

    def __post_init__(self) -> None:
        require(self.new_tokens >= 2, f"--new_tokens {self.new_tokens}: time per token takes 2 or more")
        require(len(self.vocabulary) > 0, "the tokenizer has special tokens alone; there is nothing to make prompts of")
        for length in self.lengths:
            require(
                self.window is None or length + self.new_tokens <= self.window,
                f"--lengths {length}: with {self.new_tokens} new tokens beyond the model's window of {self.window}",
            )

    def examples(self) -> list[Example]:
        pairs = product(dict.fromkeys(self.lengths), dict.fromkeys(self.batch_sizes))
        return [self._example(length, batch_size) for length, batch_size in pairs]

    def _example(self, length: int, batch_size: int) -> Example:
        name = f"{length}/batch{batch_size}"
        info = {"length": length, "batch_size": batch_size}
        return Example(name, name, [], self.new_tokens, min_new_tokens=self.new_tokens, info=info)

    def prompt_ids(self, example: Example) -> list[int]:
        return self.prompts(example)[0]

    def prompts(self, example: Example) -> list[list[int]]:
        """Token ids of each prompt of the batch."""
        length, batch_size = example.info["length"], example.info["batch_size"]
        return [
            random.Random(f"{self.seed}/{length}/{row}").choices(self.vocabulary, k=length) for row in range(batch_size)
        ]


def plain_ids(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> list[int]:
    """Ids of all tokens that a text may have: none of those that were added to mark something."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [each for each in range(min(len(tokenizer), vocabulary_size)) if each not in special]


@dataclass(frozen=True)
class Run:
    """One batch from its prompts to its last token."""

    seconds: dict[str, float]
    """Of `prefill`, `compress`, `ttft`, `decode`, `tpot` and `total`."""
    size: Row
    """What its caches held, the same in every run."""
    memory: Row
    """What was allocated or resident at most, in bytes."""


def measure(
    engine: Engine, prompts: Sequence[Sequence[int]], method: Method, new_tokens: int, chunk: int | None = None
) -> Run:
    """Run prompts of one length as one batch to exactly `new_tokens` tokens each, 2 or more, read in chunks if so told.

    The clock stands still while caches are counted, between the first token and the second.
    """
    device = engine.device
    gpus = {each.device for each in engine.model.parameters() if each.device.type == "cuda"}
    before = _reset_peak(gpus)
    started = now(device)
    sequences = engine.prefill_batch(prompts, method, chunk)
    engine.decode(sequences, 1)
    first = now(device) - started
    size = batch_size_of(sequences, full_cache_bytes(engine.model, sequences[0].prompt_tokens))
    started = now(device)
    engine.decode(sequences, new_tokens - 1)
    rest = now(device) - started
    caches = [each.cache for each in sequences]
    return Run(
        {
            "prefill": sequences[0].prefill_seconds,
            "compress": sum(cache.own_seconds for cache in caches),
            "ttft": first,
            "decode": rest,
            "tpot": rest / (new_tokens - 1),
            "total": first + rest,
        },
        {
            **flat(size),
            "cache_bytes_end": sum(cache.nbytes() for cache in caches),
            "read_tokens_mean": fmean(entries for cache in caches for entries in cache.read()),
            "new_tokens": len(sequences[0].tokens),
            **method.row_fields(caches[0].stores),
        },
        _peak(gpus, before),
    )


def batch_size_of(sequences: Sequence[DecodedSequence], full: int) -> Size:
    """`size_of` a batch: entries per head over all its sequences, and bytes of all together; `full` is of one."""
    each = [size_of(sequence, full) for sequence in sequences]
    held, whole = sum(one.cache_bytes for one in each), full * len(each)
    return Size(
        kept_tokens_min=min(one.kept_tokens_min for one in each),
        kept_tokens_mean=fmean(one.kept_tokens_mean for one in each),
        kept_tokens_max=max(one.kept_tokens_max for one in each),
        cache_bytes=held,
        full_cache_bytes=whole,
        ratio=held / whole,
        evicted=any(one.evicted for one in each),
    )


def _reset_peak(gpus: set[torch.device]) -> int:
    """Bytes that the GPUs hold now; what they hold at most is counted anew."""
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    return sum(torch.cuda.memory_allocated(gpu) for gpu in gpus)


def _peak(gpus: set[torch.device], before: int) -> Row:
    if gpus:
        allocated = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
        reserved = sum(torch.cuda.max_memory_reserved(gpu) for gpu in gpus)
        peaks = {"peak_bytes": allocated - before, "peak_reserved_bytes": reserved - before}
        return {"allocated_before_bytes": before, **peaks}
    if resource is None:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def unless_out_of_memory(run: Callable[[], T]) -> T | None:
    """What it gives, or None where the memory does not suffice for it; what it had allocated is let go then."""
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in NO_MEMORY):
            raise
    gc.collect()
    torch.cuda.empty_cache()
    return None


def largest_batch(memory_bytes: int, weight_bytes: int, sequence_bytes: float) -> int:
    """Sequences of so many bytes each that fit into the memory beside the weights; activations are left out."""
    return max(0, int((memory_bytes - weight_bytes) // sequence_bytes))


class LatencySweep(Sweep):
    """Measures all jobs of an example in turn; rows of an example are written when its last run is done."""

    benchmark: Latency
    _scored: Sequence[Row] = ()

    def warm_up(self) -> None:
        """Nothing: every configuration has runs of its own that do not count."""

    def run(self, on_row: Callable[[Row], None] = lambda row: None) -> None:
        for example, jobs in self.missing():
            runs = self._take_turns(self.benchmark.prompts(example), jobs)
            for job in jobs:
                row = self._row_of(example, job, runs[job.key])
                self.folder.append(row)
                on_row(row)
        if self.benchmark.scores:
            self._scored = self.benchmark.scores(self)

    def rows(self) -> list[Row]:
        return with_scores(super().rows(), self._scored)

    def _take_turns(self, prompts: list[list[int]], jobs: Sequence[Job]) -> dict[Any, list[Run | None]]:
        """All runs of each job, or None behind which none follows."""
        runs: dict[Any, list[Run | None]] = {job.key: [] for job in jobs}
        for turn in range(self.benchmark.warmup + self.benchmark.repeats):
            for job in jobs[:: -1 if turn % 2 else 1]:
                if turn == 0:
                    torch.cuda.empty_cache()  # or what others reserved would be in the peak
                if None not in runs[job.key]:
                    runs[job.key].append(self._run_once(prompts, job))
        return runs

    def _run_once(self, prompts: list[list[int]], job: Job) -> Run | None:
        def run() -> Run:
            return measure(self.engine, prompts, job.method, self.benchmark.new_tokens, self.prefill_chunk)

        return unless_out_of_memory(run)

    def _row_of(self, example: Example, job: Job, runs: Sequence[Run | None]) -> Row:
        done = [run for run in runs if run is not None]
        return {
            **flat(self._subject(example, job, example.info["length"])),
            **example.info,
            "oom": len(done) < len(runs),
            **(self._numbers(example, done) if len(done) == len(runs) else {}),
        }

    def _numbers(self, example: Example, runs: Sequence[Run]) -> Row:
        counted = runs[self.benchmark.warmup :]
        every = {name: [run.seconds[name] for run in counted] for name in runs[0].seconds}
        seconds = {f"{name}_seconds": median(each) for name, each in every.items()}
        batch_size, size = example.info["batch_size"], runs[0].size
        weights = self.engine.model.get_memory_footprint()
        memory, at_end = self.benchmark.memory_bytes, size["cache_bytes_end"] / batch_size
        fits = {} if memory is None else {"largest_batch": largest_batch(memory, weights, at_end)}
        return {
            "prompt_tokens": example.info["length"],
            **seconds,
            "tokens_per_second": batch_size / seconds["tpot_seconds"],
            "end_to_end_tokens_per_second": batch_size * size["new_tokens"] / seconds["total_seconds"],
            **{f"{name}_runs": each for name, each in every.items()},
            **size,
            **runs[0].memory,
            "weight_bytes": weights,
            **fits,
        }
