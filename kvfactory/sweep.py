"""A sweep: many methods and budgets over the same examples, one prefill an example, decode steps shared by all.

Examples whose rows are in the run folder already are skipped, and of the others only the missing methods run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .benchmarks import Benchmark, Example
from .budget import Share
from .engine import DecodeRow, Engine
from .engine import Sequence as DecodedSequence
from .errors import UserError, require
from .method import Method
from .registry import LACKS, Registry
from .results import Row, RunFolder
from .settings import settings_of


@dataclass(frozen=True)
class Job:
    """One method at one budget, as a sweep runs it and tables name it."""

    label: str
    """The method's name and the settings given with it: `h2o:recent_size=32`."""
    budget: int | str | None
    """Entries, or a share of the prompt such as `10%`; None for a method that keeps everything."""
    method: Method


def make_jobs(
    registry: Registry,
    specs: Sequence[str],
    budgets: Sequence[int | Share],
    parts: Mapping[str, str | None] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Job]:
    """Every method at every budget. A spec is a name, and settings of its own behind colons: `snapkv:window_size=16`.

    A spec may name a budget of its own, and is there once then. `parts` (an allocator, a merge) and `settings` go to each
    method that has them. Raises `UserError` for what no method here has.
    """
    settings = settings or {}
    wanted = {kind: part for kind, part in (parts or {}).items() if part is not None}
    parsed = {spec: _parse(spec) for spec in dict.fromkeys(specs)}
    fitting = {
        name: {kind: part for kind, part in wanted.items() if kind in registry.kinds_of_parts(name)}
        for name, _ in parsed.values()
    }
    known: dict[str, set[str]] = {}
    for spec, (name, own) in parsed.items():
        used = fitting[name] | _parts(registry, own)
        known[spec] = {*registry.settings(name, used), *registry.aliases_of_parts(name, used)}
    for setting in settings:
        if not any(setting in each for each in known.values()):
            raise UserError(f"--{setting} is not a setting of {', '.join(parsed)}; {_owners(registry, setting)}")
    for kind, part in wanted.items():
        if not any(kind in each for each in fitting.values()):
            raise UserError(f"--{kind} {part}: each of {', '.join(parsed)} {LACKS[kind]}; leave it out")
    jobs: dict[tuple[str, str | None], Job] = {}
    for (spec, (name, own)), budget in product(parsed.items(), budgets):
        given = {each: value for each, value in settings.items() if each in known[spec]}
        at = {"budget": budget} if registry.has_budget(name) else {}
        require(bool(at) or "budget" not in own, f"--method '{spec}': {name} keeps everything and takes no budget")
        method = registry.load_method(name, **(at | given | fitting[name] | own))
        asked = getattr(method, "budget", None)
        named = str(asked) if isinstance(asked, Share) else asked
        jobs.setdefault((spec.lower(), None if named is None else str(named)), Job(spec.lower(), named, method))
    return list(jobs.values())


def _parts(registry: Registry, own: Mapping[str, str]) -> dict[str, str]:
    return {kind: own[kind] for kind in registry.parts if kind in own}


def _parse(spec: str) -> tuple[str, dict[str, str]]:
    name, *pairs = spec.split(":")
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--method '{spec}': '{pair}' is not setting=value; write name:setting=value:setting=value")
    return name, dict(pair.split("=", 1) for pair in pairs)


def _owners(registry: Registry, setting: str) -> str:
    owners = [name for name in registry.methods if setting in registry.own_settings(name)]
    owners += [
        f"--{kind} {name}"
        for kind, shelf in registry.parts.items()
        for name in shelf
        if setting in settings_of(shelf[name])
    ]
    return f"it is one of {', '.join(owners)}" if owners else "no method has it"


@dataclass(eq=False, kw_only=True)
class Running(DecodeRow):
    """A sequence in decoding, and what its row will say."""

    example: Example
    job: Job
    footprint: Row
    """Its size right after the prefill."""


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
        rows_at_once: int = 64,
        bytes_at_once: float = 4 * 2**30,
    ) -> None:
        """`stop` are the model's own stop tokens.

        At most `rows_at_once` sequences decode together, and no example joins while their caches hold `bytes_at_once`;
        an example whose rows alone are more decodes alone.
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self.benchmark = benchmark
        self.jobs = jobs
        self.folder = folder
        self.stop = frozenset(stop)
        self.rows_at_once = rows_at_once
        self.bytes_at_once = bytes_at_once

    def missing(self) -> list[tuple[Example, list[Job]]]:
        """What is left to do: examples, and the jobs that have no row of them yet."""
        todo = [
            (example, [job for job in self.jobs if (example.id, job.label, job.budget) not in self.folder.done])
            for example in self.benchmark.examples()
        ]
        return [(example, jobs) for example, jobs in todo if jobs]

    def rows(self) -> list[Row]:
        """All rows of the folder, in the order of examples and jobs rather than that in which they ended."""
        examples = {example.id: rank for rank, example in enumerate(self.benchmark.examples())}
        jobs = {(job.label, job.budget): rank for rank, job in enumerate(self.jobs)}

        def rank(row: Row) -> tuple[int, int]:
            job = jobs.get((row["method"], row["budget"]), len(jobs))
            return job, examples.get(row["example_id"], len(examples))

        return sorted(self.folder.rows, key=rank)

    def warm_up(self) -> None:
        """Run every method once on a short prompt, so that first calls are not in anybody's time."""
        prompt = [1] * 2 * max((job.budget for job in self.jobs if isinstance(job.budget, int)), default=128)
        self.engine.decode(self.engine.prefill(prompt[:256] or [1], [job.method for job in self.jobs]), 2)

    def run(self, on_row: Callable[[Row], None] = lambda row: None) -> None:
        """Everything that is missing; `on_row` is called with each row once it is written."""
        active: list[Running] = []
        for example, jobs in self.missing():
            while active and not self._has_room(active, len(jobs)):
                active = self._step(active, on_row)
            active += self._start(example, jobs)
        while active:
            active = self._step(active, on_row)

    def _has_room(self, active: list[Running], more: int) -> bool:
        held = sum(row.footprint["cache_bytes"] for row in active)
        return len(active) + more <= self.rows_at_once and held < self.bytes_at_once

    def _start(self, example: Example, jobs: Sequence[Job]) -> list[Running]:
        sequences = self.engine.prefill(self.benchmark.prompt_ids(example), [job.method for job in jobs])
        full = full_cache_bytes(self.engine.model, sequences[0].prompt_tokens)
        return [
            Running(
                sequence=sequence,
                max_new_tokens=example.max_new_tokens,
                stop=self.stop | example.stop_ids,
                min_new_tokens=example.min_new_tokens,
                example=example,
                job=job,
                footprint=footprint(sequence, full),
            )
            for job, sequence in zip(jobs, sequences, strict=True)
        ]

    def _step(self, active: list[Running], on_row: Callable[[Row], None]) -> list[Running]:
        going = self.engine.step(active)
        for ended in (row for row in active if row.sequence.stop_reason):
            row = self._row(ended)
            self.folder.append(row)
            on_row(row)
        return going

    def _row(self, ended: Running) -> Row:
        sequence, example, job = ended.sequence, ended.example, ended.job
        prediction = self.tokenizer.decode(sequence.tokens, skip_special_tokens=True)
        return {
            "benchmark": self.benchmark.name,
            "group": example.group,
            "example_id": example.id,
            "method": job.label,
            "budget": job.budget,
            "settings": job.method.settings(),
            "prediction": prediction,
            "answers": example.answers,
            **self.benchmark.score(example, prediction),
            **ended.footprint,
            "memory": job.method.memory,
            "prompt_tokens": sequence.prompt_tokens,
            "new_tokens": len(sequence.tokens),
            "read_tokens_mean": fmean(sequence.cache.read()),
            "stop_reason": sequence.stop_reason,
            "prefill_seconds": sequence.prefill_seconds,
            "compress_seconds": sequence.cache.compress_seconds,
            "decode_seconds": sequence.decode_seconds,
            **job.method.row_fields(sequence.cache.stores),
            **example.info,
        }


def footprint(sequence: DecodedSequence, full: int) -> Row:
    """What a sequence keeps of its prompt: entries per head over the layers, bytes, and the ratio to a full cache."""
    kept = sequence.cache.kept()
    held = sequence.cache.nbytes()
    return {
        "kept_tokens_min": min(kept),
        "kept_tokens_mean": sum(kept) / len(kept),
        "kept_tokens_max": max(kept),
        "cache_bytes": held,
        "full_cache_bytes": full,
        "ratio": held / full,
        "evicted": min(kept) < sequence.prompt_tokens,
    }


def full_cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens, in all layers, nothing compressed."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize * tokens
