"""Perplexity of a text under compression, by protocols whose figures are not to be compared with each other.

A protocol cuts the token ids of a text into windows. Each is read by itself, and nothing is put in front of it; what
distinguishes protocols is when a method may act.

`disjoint` reads chunks in one pass and drops the rest of the text, as papers on quantisation do. `strided` lets windows
overlap and scores what the one before did not. A prompt's own pass comes before anything is evicted, so methods with a
budget have no place there; a token attends to what others make of all tokens up to it, few bits say (`AttendToKept`).
`token_by_token` feeds one token after the other and a method evicts on the way, as papers on eviction do.
`prefill_then_continue` compresses a prefix once and feeds the tokens behind it, which is what budgets of prompts are for.

`leaky_single_pass` reproduces figures of code that evicts before a prompt attends and masks what is kept by its index.
Queries see later tokens, so low figures mean nothing, and they compare with nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import fmean
from typing import Any, ClassVar

import numpy as np

from kvfactory.benchmarks import Benchmark, Example
from kvfactory.benchmarks.one_pass import MaskBy
from kvfactory.errors import at_least, require, unknown
from kvfactory.results import Row
from kvfactory.sweep import Running, Sweep, full_cache_bytes, size_of


@dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end` of a text, which are read by themselves."""

    begin: int
    end: int
    scored: int
    """The last tokens, whose losses count."""


@dataclass(frozen=True, kw_only=True)
class Protocol(ABC):
    """How a text is cut into windows and how those are read. Its fields are flags."""

    name: ClassVar[str]
    sizes: ClassVar[tuple[str, ...]] = ("seqlen",)
    """The fields whose sum is the length of a window."""
    mask_by: ClassVar[MaskBy | None] = None
    """In one pass: what says whether a query may see an entry that is kept. None: scored tokens are fed one by one."""
    evicts_on_the_way: ClassVar[bool] = False
    """Whether there is no prompt to compress, so that a method must hold to its budget while decoding."""
    notice: ClassVar[str | None] = None
    """What a user should be told before figures are read, in one line, if there is anything."""

    def __post_init__(self) -> None:
        at_least(self, **{each.name: 1 for each in fields(self)})
        require(self.size > 1, f"{self.flags()}: a window takes 2 tokens or more, since nothing foretells its first")

    @property
    def size(self) -> int:
        """Tokens of a window."""
        return sum(getattr(self, name) for name in self.sizes)

    def flags(self) -> str:
        """What gives a window its length, as a command line has it."""
        return " ".join(f"--{name} {getattr(self, name)}" for name in self.sizes)

    def reads(self) -> int | None:
        """Tokens of a text that its windows reach at most; None for all."""
        return None

    def record(self) -> dict[str, Any]:
        """What rows and run_meta.json say of it; how many windows there may be changes none of them."""
        return {name: value for name, value in asdict(self).items() if name != "windows" and value is not None}

    @abstractmethod
    def cut(self, tokens: int) -> list[Window]:
        """The windows of a text of so many tokens, in order; none if it is too short."""


@dataclass(frozen=True, kw_only=True)
class Disjoint(Protocol):
    """Chunks side by side, each in one pass; all tokens of a chunk but its first count."""

    name = "disjoint"
    mask_by: ClassVar[MaskBy | None] = "position"
    seqlen: int = 2048

    def cut(self, tokens: int) -> list[Window]:
        ends = range(self.seqlen, tokens + 1, self.seqlen)
        return [Window(end - self.seqlen, end, self.seqlen - 1) for end in ends]


@dataclass(frozen=True, kw_only=True)
class LeakySinglePass(Disjoint):
    """Chunks whose prompts attend to what is kept, before anything later is hidden from them."""

    name = "leaky_single_pass"
    mask_by: ClassVar[MaskBy | None] = "index"
    notice = (
        "leaky_single_pass shows queries later tokens; its figures compare with none but those of code that does so too"
    )


@dataclass(frozen=True, kw_only=True)
class Strided(Protocol):
    """Windows that begin every `stride` tokens, each in one pass; what no window before has scored counts."""

    name = "strided"
    mask_by: ClassVar[MaskBy | None] = "position"
    seqlen: int = 2048
    stride: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.stride <= self.seqlen,
            f"--stride {self.stride} is more than --seqlen {self.seqlen}: tokens between windows would never be read",
        )

    def cut(self, tokens: int) -> list[Window]:
        windows, before = [], 0
        for begin in range(0, tokens, self.stride):
            end = min(begin + self.seqlen, tokens)
            windows.append(Window(begin, end, min(end - before, end - begin - 1)))
            before = end
            if end == tokens:
                break
        return [window for window in windows if window.scored]


@dataclass(frozen=True, kw_only=True)
class TokenByToken(Protocol):
    """The beginning of a text, one token after the other; all but the first count."""

    name = "token_by_token"
    sizes = ("tokens",)
    evicts_on_the_way = True
    tokens: int = 2048

    def reads(self) -> int:
        return self.tokens

    def cut(self, tokens: int) -> list[Window]:
        end = min(tokens, self.tokens)
        return [Window(0, end, end - 1)] if end > 1 else []


@dataclass(frozen=True, kw_only=True)
class PrefillThenContinue(Protocol):
    """A prefix that is compressed once, and a continuation, one token after the other, which counts."""

    name = "prefill_then_continue"
    sizes = ("prefix", "continuation")
    prefix: int = 1024
    continuation: int = 256
    stride: int | None = None
    """Tokens from one window's beginning to the next; a window's length if not given."""
    windows: int = 8
    """Of each text, at most."""

    def reads(self) -> int:
        return (self.windows - 1) * (self.stride or self.size) + self.size

    def cut(self, tokens: int) -> list[Window]:
        begins = range(0, tokens - self.size + 1, self.stride or self.size)[: self.windows]
        return [Window(begin, begin + self.size, self.continuation) for begin in begins]


PROTOCOLS: dict[str, type[Protocol]] = {
    each.name: each for each in (PrefillThenContinue, TokenByToken, Disjoint, Strided, LeakySinglePass)
}


def choose_protocol(name: str, given: Mapping[str, int | None]) -> Protocol:
    """A protocol with the settings that are given; None is not.

    Raises `UserError` for a name that is none, and for a setting of other protocols.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    own = [each.name for each in fields(PROTOCOLS[name])]
    values = {flag: value for flag, value in given.items() if value is not None}
    for flag, value in values.items():
        takes = ", ".join(f"--{each}" for each in own)
        require(flag in own, f"--{flag} {value}: --protocol {name} takes {takes}; leave it out or change --protocol")
    return PROTOCOLS[name](**values)


class Perplexity(Benchmark):
    """The windows of one or more texts; a group is a text."""

    def __init__(self, protocol: Protocol, texts: Mapping[str, Sequence[int]], facts: Mapping[str, Any]) -> None:
        """`texts` are token ids by name, special tokens included; `facts` are said in every row.

        Raises `UserError` for a text that is shorter than a window.
        """
        self.name = f"perplexity, {protocol.name}"
        self.one_pass = protocol.mask_by is not None
        self.protocol = protocol
        self._texts = texts
        self._facts = {"protocol": protocol.name, **protocol.record(), **facts}
        self._windows: dict[str, tuple[str, Window]] = {}
        for text, ids in texts.items():
            windows = protocol.cut(len(ids))
            require(
                bool(windows),
                f"the text {text} has {len(ids)} tokens and a window of --protocol {protocol.name} more "
                f"({protocol.flags()}); give a longer text, or less",
            )
            self._windows |= {f"{text}/{window.begin}-{window.end}": (text, window) for window in windows}

    def examples(self) -> list[Example]:
        return [
            Example(
                id=name,
                group=text,
                answers=[],
                max_new_tokens=window.scored,
                info={**self._facts, "begin": window.begin, "end": window.end},
            )
            for name, (text, window) in self._windows.items()
        ]

    def prompt_ids(self, example: Example) -> list[int]:
        ids, window = self._window(example)
        return ids if self.one_pass else ids[: -window.scored]

    def target_ids(self, example: Example) -> list[int]:
        ids, window = self._window(example)
        return [] if self.one_pass else ids[-window.scored :]

    def measure(self, example: Example, losses: Sequence[float]) -> dict[str, float]:
        """`nll` is the mean over `scored_tokens`, in nats, and `perplexity` its exponential."""
        scored = losses[-self._windows[example.id][1].scored :]
        nll = fmean(scored)
        return {"nll": nll, "scored_tokens": len(scored), "perplexity": float(np.exp(nll))}

    def _window(self, example: Example) -> tuple[list[int], Window]:
        text, window = self._windows[example.id]
        return list(self._texts[text][window.begin : window.end]), window


class PerplexitySweep(Sweep):
    """Where there is no prompt, a row's size is that of the cache at its end."""

    def _row(self, ended: Running) -> Row:
        assert isinstance(self.benchmark, Perplexity)
        if self.benchmark.protocol.evicts_on_the_way:
            fed = ended.sequence.cache.seen
            whole = replace(ended.sequence, prompt_tokens=fed)
            size = size_of(whole, full_cache_bytes(self.engine.model, fed))
            ended.footprint = replace(ended.footprint, size=size)
        return super()._row(ended)
