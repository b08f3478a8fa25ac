"""RULER samples that are there already: the .jsonl files of the official generator, of any year."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfactory.benchmarks import Example
from kvfactory.benchmarks.needle_styles import Chat
from kvfactory.benchmarks.ruler import Ruler, check_window, known_tasks
from kvfactory.errors import UserError, require
from kvfactory.metrics import RULER_TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Line:
    """A sample of a file; texts may be long and stay there until they are needed."""

    file: Path
    number: int
    offset: int
    """Where the line begins, in bytes."""
    size: int
    """Characters of the prompt."""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"

    def read(self) -> dict[str, Any]:
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return _parsed(file.readline(), self.place)


class ReadyMade(Ruler):
    """The first `samples` rows of `<folder>/<length>/<task>.jsonl`, or of `<folder>/<task>.jsonl` for a single length.

    Without `lengths` all that the folder has, without `tasks` all files of them that are there. A row has the official
    fields `input` and `outputs`, and `answer_prefix` where the input does not end with it. Prompts are sent as they are.
    Samples are numbered as they come, since the official `index` of a needle sample is a place in its text.
    UserError for what is not there, for a line that is no row, and for prompts beyond the `window` of the model in tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        *,
        tasks: Sequence[str] | None = None,
        lengths: Sequence[int] | None = None,
        samples: int,
        chat: Chat | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__(tokenizer, chat)
        self._examples: list[Example] = []
        self._rows: dict[str, Line] = {}
        wanted = None if tasks is None else known_tasks(tasks)
        for (length, where), task in product(_folders(folder, lengths).items(), wanted or RULER_TASKS):
            file = where / f"{task}.jsonl"
            if wanted is None and not file.is_file():
                continue
            check_window(length, window)
            rows = list(islice(_rows(file), samples))
            require(bool(rows), f"{file} has no rows")
            for number, (row, answers) in enumerate(rows):
                example = self.example(task, length, number, answers)
                self._examples.append(example)
                self._rows[example.id] = row
            self._check_longest(max((row for row, _ in rows), key=lambda row: row.size), example, window)
        require(bool(self._examples), f"--ruler_dir {folder}: no file is named as a task, such as niah_single_1.jsonl")

    def examples(self) -> Sequence[Example]:
        return self._examples

    def prompt_ids(self, example: Example) -> list[int]:
        row = self._rows[example.id].read()
        return self.render(row["input"], row.get("answer_prefix") or "")

    def _check_longest(self, row: Line, example: Example, window: int | None) -> None:
        fields = row.read()
        tokens = len(self.render(fields["input"], fields.get("answer_prefix") or "")) + example.max_new_tokens
        if window is not None and tokens > window:
            raise UserError(
                f"{row.place}: {tokens} tokens with this tokenizer, the answer included, and the model's window is "
                f"{window}; leave out --lengths {example.info['context_length']} or generate samples without --ruler_dir"
            )


def _folders(folder: Path, lengths: Sequence[int] | None) -> dict[int, Path]:
    """The folder of each length."""
    require(folder.is_dir(), f"--ruler_dir {folder}: no such folder")
    found = {int(each.name): each for each in folder.iterdir() if each.is_dir() and each.name.isdecimal()}
    found = dict(sorted(found.items()))
    if not found:
        if lengths is None or len(lengths) != 1:
            raise UserError(
                f"--ruler_dir {folder}: it has no folder for each length; give the one it is with --lengths"
            )
        return {lengths[0]: folder}
    for length in lengths or ():
        require(length in found, f"--lengths {length}: --ruler_dir {folder} has {', '.join(map(str, found))}")
    return {length: found[length] for length in lengths or found}


def _rows(file: Path) -> Iterator[tuple[Line, list[str]]]:
    """Rows and their answers, in order; blank lines are none."""
    offset = 0
    try:
        with file.open("rb") as opened:
            for number, line in enumerate(opened, start=1):
                if line.strip():
                    fields = _parsed(line, f"{file}:{number}")
                    size = len(fields["input"]) + len(fields.get("answer_prefix") or "")
                    yield Line(file, number, offset, size), fields["outputs"]
                offset += len(line)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror} (--ruler_dir)") from error


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def _is_answers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_text(text) and text for text in value)


_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "input": (_is_text, "a text"),
    "outputs": (_is_answers, "a list of one text or more"),
    "answer_prefix": (lambda value: value is None or _is_text(value), "a text"),
}


def _parsed(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from error
    require(isinstance(row, dict), f"{place}: expected a JSON object, found {type(row).__name__}")
    for field, (is_valid, expected) in _FIELDS.items():
        require(field in row or field == "answer_prefix", f"{place}: field '{field}' is missing; a RULER row has it")
        require(is_valid(row.get(field)), f"{place}: field '{field}' is not {expected}")
    return row
