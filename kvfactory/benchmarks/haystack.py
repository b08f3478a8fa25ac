"""The text a needle is hidden in.

`load_haystack()` takes the prose of the standard library's own documentation, which every Python has;
`load_haystack(path)` takes a text file or a folder of them. `TokenizedHaystack` is that text under one tokenizer: a
stretch of any length from any point, and where its sentences end. A needle goes where `split_point` says, or where the
first needle test would have put it (`insert_needle`).
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from pydoc_data import topics
from typing import TYPE_CHECKING, Any

from kvfactory.errors import UserError, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Haystack:
    """A text and where it is from."""

    text: str
    name: str
    version: str
    """Of what the text was taken from; with the hash it tells whether two runs read the same."""

    @cached_property
    def sha256(self) -> str:
        """Of the text in UTF-8, as it is used."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """What run_meta.json says about it."""
        return {
            "name": self.name,
            "version": self.version,
            "characters": len(self.text),
            "sha256": self.sha256,
        }


def load_haystack(path: str | Path | None = None, flag: str = "--haystack") -> Haystack:
    """The text of a file, of a folder's .txt files joined in order of name, or else the default.

    The rows of a .jsonl file, their `text`, are joined with empty lines between, as papers do with WikiText-2's.
    UserError, which names the `flag`, for a path that holds no text.
    """
    return _documentation() if path is None else _files(Path(path), flag)


def _documentation() -> Haystack:
    """Paragraphs of prose, one blank between them.

    Titles, code, grammar and tables do not both begin with a capital and end with a full stop. Some topics contain
    others, so each paragraph is taken once.
    """
    blocks = (block for topic in sorted(topics.topics) for block in re.split(r"\n\s*\n", topics.topics[topic]))
    unwrapped = (" ".join(block.split()).removeprefix("* ") for block in blocks)
    prose = dict.fromkeys(block for block in unwrapped if block[:1].isupper() and block.endswith("."))
    text = " ".join(prose) + " "  # the last blank is for what follows when a long context begins the text again
    return Haystack(text, "pydoc_data.topics", f"Python {platform.python_version()}")


def _files(path: Path, flag: str) -> Haystack:
    files = sorted(each for each in path.glob("*.txt") if each.is_file()) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{flag} {path}: the folder holds no .txt file")
    text = "".join(_read(file, flag) for file in files)
    if not text.strip():
        raise UserError(f"{flag} {path}: there is no text in it")
    return Haystack(text, str(path), f"{len(files)} files" if path.is_dir() else "1 file")


def _read(file: Path, flag: str) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {file}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{flag} {file}: {error.strerror}; give a text file or a folder of .txt files") from error
    return "\n\n".join(_row_texts(text, f"{flag} {file}")) if file.suffix == ".jsonl" else text


def _row_texts(lines: str, where: str) -> Iterator[str]:
    for number, line in enumerate(lines.split("\n"), start=1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, KeyError):
                text = None
            require(isinstance(text, str), f'{where}:{number}: not a row; expected {{"text": "..."}}')
            yield text


class TokenizedHaystack:
    """A haystack's token ids, encoded once and without special tokens."""

    def __init__(self, haystack: Haystack, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids = self.encode(haystack.text)
        if not self.ids:
            raise UserError("--haystack: the tokenizer makes no tokens of the text")
        # A full stop by itself and one after a word are different ids in vocabularies that mark where a word begins.
        self.stops = frozenset(ids[-1] for ids in map(self.encode, (".", "a.")) if ids)
        """Ids of a full stop that is a token of its own."""
        closing = {each: text for each in set(self.ids) if (text := self.decode([each]).rstrip()).endswith(".")}
        pairs = {pair for pair in pairwise(self.ids) if pair[0] in closing}
        # A blank must follow: other full stops stand in `sys.path` and 3.14.
        self.ends = frozenset(pair for pair in pairs if self.decode([*pair])[len(closing[pair[0]]) :][:1].isspace())
        """Pairs of ids between which a sentence ends, whatever else the first of them spells."""
        self.sentence_starts = [0, *sentence_ends(self.ids, self.ends)]

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, and nothing a model wants around it."""
        # verbose=False: a haystack longer than the model's window is no reason for a warning.
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, blanks untouched."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def window(self, start: int, count: int) -> list[int]:
        """`count` ids from index `start` on; the text begins again where it ends."""
        repeats = -(-(start + count) // len(self.ids))
        return (self.ids * repeats)[start : start + count]


def insert_needle(
    context: Sequence[int], needle: Sequence[int], depth: float, stops: AbstractSet[int], limit: int
) -> list[int]:
    """The first needle test's rule: `context` cut so that both fit `limit`, `needle` at `depth` percent of the rest.

    The point steps back until it follows one of `stops`, to the start if there is none; depth 100 is the very end.
    """
    kept = list(context[: max(limit - len(needle), 0)])
    point = int(len(kept) * (depth / 100))
    while depth != 100 and point > 0 and kept[point - 1] not in stops:
        point -= 1
    return [*kept[:point], *needle, *kept[point:]]


def sentence_ends(ids: Sequence[int], ends: AbstractSet[tuple[int, int]]) -> list[int]:
    """The indices inside `ids` at which a sentence has ended: those between two ids that are a pair of `ends`."""
    return [i for i, pair in enumerate(pairwise(ids), start=1) if pair in ends]


def split_point(context: Sequence[int], depth: float, ends: AbstractSet[tuple[int, int]]) -> int:
    """The index that splits `context` at the last sentence end up to `depth` percent, or at the first one after it.

    Only depths 0 and 100 are the start and the end; a text without a sentence end inside is split at the depth itself.
    """
    point = int(len(context) * (depth / 100))
    inside = sentence_ends(context, ends)
    if depth in (0, 100) or not inside:
        return point
    return inside[max(bisect_right(inside, point) - 1, 0)]
