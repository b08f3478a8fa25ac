"""What a run remembers of its prompts: their text token by token, and which of the tokens each configuration kept.

Two files beside the rows, both for looking and neither needed to go on: `prompts.jsonl`, a line for each example, and
`kept.jsonl`, one for each row. Long prompts are there with their first and last tokens alone. A line may be there twice
after a kill; the last one counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import UserError
from .folder_format import budget_name, told
from .results import Row, RunFolder
from .stores import Store

PROMPTS = "prompts.jsonl"
KEPT = "kept.jsonl"
UNFINISHED = "\ufffd"
"""What a tokenizer shows of a character that has only some of its bytes."""


@dataclass(frozen=True, kw_only=True)
class PromptText:
    """A prompt as a reader sees it."""

    example_id: str = told("the example, as in rows")
    tokens: int = told("tokens of the prompt")
    begin: list[str] = told("texts of its first tokens; of all of them, where it is no longer than `--record_tokens`")
    end: list[str] = told("texts of its last tokens; none where all are in `begin`")
    question: str = told("what was read after the prompt was compressed; empty if nothing was")
    after: str | None = told("the example whose turn of the conversation came before, or null")
    shared_with: str | None = told("the example that has the same prompt and its texts; then there are none here")


@dataclass(frozen=True, kw_only=True)
class KeptTokens:
    """Which of a prompt's tokens one configuration kept."""

    example_id: str = told("the row's example")
    method: str = told("the row's method")
    budget: str = told("the row's budget as tables show it: `64`, `10%`, `full`")
    kept: str = told(
        "a digit for each token of `begin` and `end`: 0 where no head of any layer kept it, 9 where all did, "
        "1 to 8 between them, in eighths"
    )


def recorded(tokens: int, most: int) -> tuple[int, int]:
    """How many of a prompt's first and last tokens are recorded, if that may be `most`: the end gets three quarters."""
    return (tokens, 0) if tokens <= most else (most // 4, most - most // 4)


class Recorder:
    """Writes what a run remembers of its prompts into its folder; nothing, where no tokens are to be recorded."""

    def __init__(self, folder: RunFolder, tokenizer: PreTrainedTokenizerBase, most: int) -> None:
        """`most` is how many tokens of a prompt are recorded."""
        self.folder = folder
        self.tokenizer = tokenizer
        self.most = most
        self._first: dict[str, str] = {}
        """For each example that was recorded the one that its prompt's texts are recorded with."""

    def prompt(self, example_id: str, ids: Sequence[int], question: Sequence[int] = ()) -> None:
        """Record a prompt's token ids, and those of a question that is read once it is compressed."""
        first, last = recorded(len(ids), self.most)
        begin, end = ids[:first], ids[len(ids) - last :]
        self._note(example_id, example_id, question, tokens=len(ids), begin=begin, end=end)

    def question(self, example_id: str, ids: Sequence[int], *, behind: str, after: str | None = None) -> None:
        """Record another question about the prompt of the example `behind`, or a turn `after` another."""
        self._note(example_id, self._first.get(behind, behind), ids, after=after)

    def _note(
        self,
        example_id: str,
        first: str,
        question: Sequence[int],
        *,
        tokens: int = 0,
        begin: Sequence[int] = (),
        end: Sequence[int] = (),
        after: str | None = None,
    ) -> None:
        if not self.most or example_id in self._first:
            return
        self._first[example_id] = first
        text = PromptText(
            example_id=example_id,
            tokens=tokens,
            begin=token_texts(self.tokenizer, begin),
            end=token_texts(self.tokenizer, end),
            question="".join(token_texts(self.tokenizer, question)),
            after=after,
            shared_with=None if first == example_id else first,
        )
        self.folder.note(PROMPTS, asdict(text))

    def levels(self, stores: Sequence[Store], tokens: int) -> str:
        """What `kept` takes of stores that have read a prompt of so many tokens and nothing else."""
        return kept_levels(stores, tokens, self.most) if self.most else ""

    def kept(self, row: Row, levels: str) -> None:
        """Record which tokens a row's configuration kept."""
        if self.most:
            names = {"example_id": row["example_id"], "method": row["method"], "budget": str(budget_name(row))}
            self.folder.note(KEPT, asdict(KeptTokens(**names, kept=levels)))


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, special tokens included; joined they are the whole text.

    Where a character takes several tokens the last of them has it and the others are empty.
    """
    alone = {each: _text(tokenizer, [each]) for each in set(ids)}
    texts: list[str] = []
    waiting: list[int] = []
    for each in ids:
        waiting.append(each)
        text = alone[each] if len(waiting) == 1 else _text(tokenizer, waiting)
        if text.endswith(UNFINISHED) and len(waiting) < 4:  # UTF-8 has no longer ones
            texts.append("")
        else:
            texts.append(text)
            waiting = []
    if waiting:
        texts[-1] = _text(tokenizer, waiting)
    return texts


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    blank = str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("▁") and not text.startswith(" ")
    return f" {text}" if blank else text  # SentencePiece leaves out the blank before what it takes for a first word


def kept_by_layer(stores: Sequence[Store], tokens: int) -> Tensor:
    """The share of each layer's stored heads that hold each of a prompt's tokens, float32 [layers, tokens], 0 to 1."""
    return torch.stack([_share(store, tokens) for store in stores])


def _share(store: Store, tokens: int) -> Tensor:
    heads = store.positions()
    return torch.bincount(torch.cat(heads).cpu(), minlength=tokens)[:tokens].float() / len(heads)


def kept_levels(stores: Sequence[Store], tokens: int, most: int) -> str:
    """`KeptTokens.kept` of a prompt's stores, which hold nothing yet of what came after it."""
    share = kept_by_layer(stores, tokens).double().mean(0)
    first, last = recorded(tokens, most)
    share = torch.cat([share[:first], share[tokens - last :]])
    inner = 1 + (share * 8).long().clamp(0, 7)
    levels = torch.where(share <= 0, 0, torch.where(share >= 1 - 1e-6, 9, inner))
    return bytes((levels + ord("0")).tolist()).decode()


def load_prompts(folder: str | Path) -> dict[str, PromptText]:
    """The prompts of a run by example id, those that share one with its texts; none where a run has not recorded any."""
    found = {line["example_id"]: PromptText(**line) for line in _lines(Path(folder) / PROMPTS)}

    def whole(prompt: PromptText) -> PromptText:
        other = found.get(prompt.shared_with or "")
        return replace(prompt, tokens=other.tokens, begin=other.begin, end=other.end) if other else prompt

    return {name: whole(prompt) for name, prompt in found.items()}


def load_kept(folder: str | Path) -> dict[tuple[str, str, str], str]:
    """`KeptTokens.kept` by example id, method and budget."""
    lines = (KeptTokens(**line) for line in _lines(Path(folder) / KEPT))
    return {(each.example_id, each.method, each.budget): each.kept for each in lines}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):  # or it is being written
                try:
                    yield json.loads(line)
                except ValueError:
                    raise UserError(f"{path}:{number}: not JSON; remove the line") from None
