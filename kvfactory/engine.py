"""One prefill for many methods, one decode step for many caches.

A prompt's hidden states do not depend on how its cache is compressed afterwards, so one pass serves every method and
budget, but for methods that change the prompt's own attention (`kernels.PromptAttention`). A decode step is bound by
reading the weights, so sequences of different methods, budgets and prompts take it together: projections run on all rows
at once, attention row by row on each row's own stores.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .attention import Patch
from .cache import SequenceCache
from .chunks import by_chunks, finished
from .clock import now
from .kernels import PromptAttention
from .method import Method
from .registry import get_registry


@dataclass(eq=False)
class Sequence:
    """One prompt continued under one method: its tokens and its own cache."""

    cache: SequenceCache
    prompt_tokens: int
    logits: Tensor | None
    """[vocabulary], float32, for the next token; None while `unfed` tokens wait."""
    prefill_seconds: float = 0.0
    """The pass over the prompt, shared or its own, compression left out."""
    decode_seconds: float = 0.0
    """This row's share of the steps it took part in."""
    tokens: list[int] = field(default_factory=list)
    """What was generated, the stop token included."""
    stop_reason: str | None = None
    """`stop` or `length`, once decoding ended."""
    unfed: list[int] = field(default_factory=list)
    """Tokens that the cache has not seen yet."""
    losses: list[float] = field(default_factory=list)
    """Negative log-likelihood in nats of each token that was given in the place of the likeliest."""

    def fork(self) -> Sequence:
        """A second sequence that goes on from here by itself."""
        tokens, unfed, losses = list(self.tokens), list(self.unfed), list(self.losses)
        return replace(self, cache=self.cache.fork(), tokens=tokens, unfed=unfed, losses=losses)


@dataclass(eq=False)
class DecodeRow:
    """A sequence on its way through decoding, and when it ends."""

    sequence: Sequence
    max_new_tokens: int
    stop: Collection[int]
    min_new_tokens: int = 0
    targets: SequenceOf[int] = ()
    """Teacher forcing: the tokens to go on with instead of the likeliest ones; as many as `max_new_tokens`."""
    made: int = 0


LOGITS_AT_ONCE = 256
"""Tokens whose logits are there together: a vocabulary of 128k takes half a megabyte each."""

Row = TypeVar("Row", bound=DecodeRow)


class Engine:
    """Runs a model under compression: `prefill`, then `decode` or `score`, then more of either."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = model.get_input_embeddings().weight.device
        self._patch = Patch(model, get_registry().families)

    @torch.no_grad()
    def prefill(
        self, ids: SequenceOf[int] | Tensor, methods: SequenceOf[Method], losses: bool = False, chunk: int | None = None
    ) -> list[Sequence]:
        """One pass over the prompt's token ids; one sequence a method, in order.

        Methods that attend to the prompt in a way of their own take a pass each, equal ones together. With `losses` the
        sequences have those of all tokens but the first, as attention to the prompt makes them. A prompt of more tokens than
        a `chunk` is read chunk by chunk, of which the first is shared; see `chunks`.

        Raises `UserError` for a method that cannot take its prompt in chunks.
        """
        given = torch.as_tensor(ids)
        if given.dim() > 2 or (given.dim() == 2 and len(given) != 1) or not given.numel():
            raise ValueError(f"prefill takes one prompt of at least one token, not ids of shape {tuple(given.shape)}")
        prompt = given.flatten().tolist()
        if chunk is not None and chunk < len(prompt):
            return self._prefill_by_chunks(prompt, methods, chunk)
        caches = [SequenceCache(method) for method in methods]
        passes: dict[PromptAttention | None, list[SequenceCache]] = {}
        for cache in caches:
            passes.setdefault(cache.prompt_attention, []).append(cache)
        made: dict[SequenceCache, Sequence] = {}
        for together in passes.values():
            started = now(self.device)
            hidden = self._forward([together], [prompt])[0]
            logits = self._logits(hidden[-1:])[0]
            seconds = now(self.device) - started - sum(cache.own_seconds for cache in together)
            made |= {cache: Sequence(cache, len(prompt), logits, prefill_seconds=seconds) for cache in together}
            if losses:
                costs = self._losses(hidden[:-1], prompt[1:])
                for cache in together:
                    made[cache].losses += costs
        return [made[cache] for cache in caches]

    def _prefill_by_chunks(self, prompt: list[int], methods: SequenceOf[Method], chunk: int) -> list[Sequence]:
        sequences = self.prefill(prompt[:chunk], [by_chunks(method, len(prompt)) for method in methods])
        for sequence, method in zip(sequences, methods, strict=True):
            for start in range(chunk, len(prompt), chunk):
                self.extend(sequence, prompt[start : start + chunk])
            sequence.prompt_tokens, cache = len(prompt), sequence.cache
            cache.method, seconds = method, sequence.decode_seconds
            cache.stores, choosing = finished(cache.stores)
            cache.compress_seconds += choosing
            cache.own_seconds += choosing
            sequence.prefill_seconds += seconds - choosing
            sequence.decode_seconds = 0.0
        return sequences

    @torch.no_grad()
    def prefill_batch(
        self, prompts: SequenceOf[SequenceOf[int]], method: Method, chunk: int | None = None
    ) -> list[Sequence]:
        """Several prompts of equally many token ids in one pass; one sequence a prompt, in order.

        Each has the whole pass's `prefill_seconds`. Prompts longer than a `chunk` are read one after the other, as `prefill`
        does. Raises ValueError where lengths differ.
        """
        lengths = {len(prompt) for prompt in prompts}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"a batch takes prompts of one length, one token or more, not of {sorted(lengths)}")
        if chunk is not None and chunk < max(lengths):
            sequences = [self.prefill(prompt, [method], chunk=chunk)[0] for prompt in prompts]
            seconds = sum(each.prefill_seconds for each in sequences)
            return [replace(each, prefill_seconds=seconds) for each in sequences]
        caches = [SequenceCache(method) for _ in prompts]
        started = now(self.device)
        hidden = self._forward([[cache] for cache in caches], [list(prompt) for prompt in prompts])
        logits = self._logits(hidden[:, -1])
        seconds = now(self.device) - started - sum(cache.own_seconds for cache in caches)
        parts = zip(caches, prompts, logits, strict=True)
        return [Sequence(cache, len(prompt), row, prefill_seconds=seconds) for cache, prompt, row in parts]

    def _losses(self, hidden: Tensor, targets: list[int]) -> list[float]:
        """What each target costs behind its hidden state [tokens, hidden_size], in nats."""
        wanted = torch.tensor(targets, dtype=torch.long, device=hidden.device)
        parts = zip(hidden.split(LOGITS_AT_ONCE), wanted.split(LOGITS_AT_ONCE), strict=True)
        return [
            each for part, ids in parts for each in cross_entropy(self._logits(part), ids, reduction="none").tolist()
        ]

    def decode(
        self,
        sequences: SequenceOf[Sequence],
        max_new_tokens: int,
        stop: Collection[int] = (),
        min_new_tokens: int = 0,
    ) -> list[list[int]]:
        """Greedy continuations, all rows in one batch; returns each row's new token ids, its stop token included.

        Stop tokens cannot be chosen before `min_new_tokens`. Sequences hold the tokens, times and the stop reason too.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it is 1 or more")
        rows = [DecodeRow(each, max_new_tokens, frozenset(stop), min_new_tokens) for each in sequences]
        before = [len(each.tokens) for each in sequences]
        active: SequenceOf[DecodeRow] = rows
        while active:
            active = self.step(active)
        return [each.tokens[start:] for each, start in zip(sequences, before, strict=True)]

    @torch.no_grad()
    def step(self, rows: SequenceOf[Row]) -> list[Row]:
        """One token for every row; returns the rows that go on. Between steps rows may leave and others join."""
        self.feed([row.sequence for row in rows if row.sequence.logits is None])
        self._force([row for row in rows if row.targets])
        chosen = likeliest([self._candidates(row) for row in rows])
        for row, best in zip(rows, chosen, strict=True):
            token = row.targets[row.made] if row.targets else best
            row.made += 1
            if not row.targets:
                row.sequence.tokens.append(token)
            row.sequence.unfed.append(token)
            row.sequence.logits = None
            row.sequence.stop_reason = (
                "stop" if token in row.stop else "length" if row.made >= row.max_new_tokens else None
            )
        return [row for row in rows if row.sequence.stop_reason is None]

    @staticmethod
    def _force(rows: SequenceOf[DecodeRow]) -> None:
        """Note what the next target of each row costs."""
        if rows:
            targets = torch.tensor([row.targets[row.made] for row in rows])
            logits = torch.stack([row.sequence.logits for row in rows if row.sequence.logits is not None])
            losses = cross_entropy(logits, targets.to(logits.device), reduction="none").tolist()
            for row, loss in zip(rows, losses, strict=True):
                row.sequence.losses.append(loss)

    @staticmethod
    def _candidates(row: DecodeRow) -> Tensor:
        assert row.sequence.logits is not None
        if row.made >= row.min_new_tokens or not row.stop:
            return row.sequence.logits
        barred = torch.tensor(sorted(row.stop), device=row.sequence.logits.device)
        return row.sequence.logits.index_fill(0, barred, -torch.inf)

    @torch.no_grad()
    def feed(self, sequences: SequenceOf[Sequence]) -> None:
        """Pass the tokens that wait through the model: at once those rows where equally many wait."""
        batches: dict[int, list[Sequence]] = {}
        for each in sequences:
            batches.setdefault(len(each.unfed), []).append(each)
        for batch in batches.values():
            started = now(self.device)
            hidden = self._forward([[each.cache] for each in batch], [each.unfed for each in batch])
            logits = self._logits(hidden[:, -1])
            share = (now(self.device) - started) / len(batch)
            for each, row in zip(batch, logits, strict=True):
                each.logits = row
                each.unfed = []
                each.decode_seconds += share

    @torch.no_grad()
    def extend(self, sequence: Sequence, ids: Iterable[int]) -> Sequence:
        """Read more tokens into a prefilled sequence, a question after its context; returns the sequence itself."""
        if more := list(ids):
            sequence.unfed += more
            sequence.logits = None
            self.feed([sequence])
        return sequence

    def score(self, sequences: SequenceOf[Sequence], ids: SequenceOf[int] | Tensor) -> list[Tensor]:
        """Teacher-forced: negative log-likelihood in nats of each of the token ids, one float32 tensor [tokens] a sequence.

        Tokens are fed one by one, so that what evicts while decoding evicts; the sequences end behind them.
        """
        targets = torch.as_tensor(ids).flatten().tolist()
        active: SequenceOf[DecodeRow] = [DecodeRow(each, len(targets), (), targets=targets) for each in sequences]
        while targets and active:
            active = self.step(active)
        return [torch.tensor(each.losses[len(each.losses) - len(targets) :]) for each in sequences]

    def _forward(self, rows: list[list[SequenceCache]], tokens: list[list[int]]) -> Tensor:
        """Hidden states [rows, tokens, hidden_size] behind the last layer; every row brings equally many tokens."""
        ids = torch.tensor(tokens, device=self.device)
        first = torch.tensor([row[0].seen for row in rows], device=self.device)
        positions = first[:, None] + torch.arange(ids.shape[1], device=self.device)
        with self._patch as patch:
            cache = patch.new_cache(rows)
            return self.model.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)[0]

    def _logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden_size] -> [tokens, vocabulary], float32."""
        return self.model.lm_head(hidden).float()


def likeliest(logits: list[Tensor]) -> list[int]:
    """The token of the greatest of each logits [vocabulary], the first of equals."""
    if logits[0].device.type == "cpu":
        return [int(each.numpy().argmax()) for each in logits]  # torch's own takes ten times as long
    return torch.stack([each.argmax() for each in logits]).tolist()
