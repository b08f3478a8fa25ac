"""Rows of a user's JSON file, each with the words that name its place in an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvfactory.errors import UserError, require


def read_json_rows(path: Path, flag: str, what: str) -> list[tuple[str, Any]]:
    """(place, row) of each item of a JSON list, or of each line of JSON lines; `what` a row is, `flag` the file's.

    Raises UserError for a file that is no text in UTF-8, no JSON, or empty.
    """
    where = f"{flag} {path}"
    try:
        text = path.read_text("utf-8-sig")  # a byte order mark is no part of the text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not a text file in UTF-8 ({error})") from error
    if text.lstrip().startswith("["):
        rows = [(f"{where}, {what} {n}", row) for n, row in enumerate(_parsed(text, where), start=1)]
    else:
        lines = [(f"{where}:{n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [(place, _parsed(line, place)) for place, line in lines]
    require(bool(rows), f"{where}: there is no {what} in it")
    return rows


def field_of(row: Any, name: str, kind: type, where: str, default: Any = None) -> Any:
    """The field of a row, a text or a list; UserError where it is something else, or missing without a `default`."""
    require(isinstance(row, dict), f"{where}: expected an object, found {type(row).__name__}")
    value = row.get(name, default)
    require(isinstance(value, kind), f"{where}: '{name}' is missing or not {'a list' if kind is list else 'a text'}")
    return value


def _parsed(text: str, where: str) -> Any:
    try:
        parsed = json.loads(text)
        json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
        return parsed
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from error
