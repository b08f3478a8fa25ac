"""Token ids at the ends of texts so long that tokenising all of them would take minutes and gigabytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE, FAR = 2**20, 1000
"""Characters at an end that are tokenised alone, and tokens after which where the text was cut no longer matters."""


def first_ids(tokenizer: PreTrainedTokenizerBase, text: str, most: int | None = None) -> list[int]:
    """The first token ids of a text, `most` of them or all, special tokens included."""
    if most is not None and len(text) > PIECE:
        ids = _ids(tokenizer, text[:PIECE])
        if len(ids) > most + FAR:
            return ids[:most]
    return _ids(tokenizer, text)[:most]


def both_ends(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> tuple[list[int], list[int]] | None:
    """More than the first and the last `most` token ids, or None for a text that may have no more than `most`."""
    if len(text) > 2 * PIECE:
        first, last = (_ids(tokenizer, part) for part in (text[:PIECE], text[-PIECE:]))
        if min(len(first), len(last)) > most + FAR:
            return first, last
    return None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])  # longer than the window is no reason for a warning here
