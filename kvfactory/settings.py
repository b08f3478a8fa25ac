"""Settings: the fields of a dataclass, and their values from text.

One place knows what a setting takes. Flags, settings behind a method's name and Python calls all come through here.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .budget import Share
from .errors import UserError, unknown


@dataclass(frozen=True)
class Setting:
    """One setting of a method or a part, as a flag would show it."""

    name: str
    type: Any
    default: Any


def settings_of(settings_class: type) -> dict[str, Setting]:
    """The fields of the dataclass of a method or a part."""
    hints = get_type_hints(settings_class)
    return {each.name: Setting(each.name, hints[each.name], each.default) for each in fields(settings_class)}


def row_value(value: Any, kind: Any) -> Any:
    """A setting as rows have it: with one JSON type, whatever its value is, or tables of rows could not be read.

    A number that may be a word or a share instead is text; whole numbers are floats where fractions may be.
    """
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None or isinstance(value, bool):
        return value
    if any(option in (str, Share) or isinstance((get_args(option) or [None])[0], str) for option in options):
        return str(value)
    return float(value) if float in options else value


def convert(name: str, value: Any, kind: Any) -> Any:
    """A setting's value as the type its field has; strings are read, other values are checked.

    Raises `UserError` naming the flag and what would be right.
    """
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if type(None) in options and (value is None or value == "none"):
        return None
    if get_origin(kind) is Literal and str(value) not in map(str, get_args(kind)):
        raise unknown(f"--{name}", str(value), map(str, get_args(kind)))
    options = tuple(option for option in options if option is not type(None))
    for option in options:
        reader = _reader(option)
        if reader is None:
            return value
        with suppress(TypeError, ValueError, KeyError):
            return reader(value)
    wanted = " or ".join(map(_wanted, options))
    raise UserError(f"--{name} is '{value}'; it takes {wanted}")


def _reader(option: Any) -> Callable[[Any], Any] | None:
    if get_origin(option) is Literal:
        choices = {str(choice): choice for choice in get_args(option)}
        return lambda value: choices[str(value)]
    if get_origin(option) is tuple:
        item = _READERS[get_args(option)[0]][0]
        return lambda value: tuple(item(each) for each in _items(value))
    return _READERS[option][0] if option in _READERS else None


def _wanted(option: Any) -> str:
    if get_origin(option) is Literal:
        return " or ".join(map(str, get_args(option)))
    if get_origin(option) is tuple:
        return f"a list, each {_READERS[get_args(option)[0]][1]}, such as 0+1, or an empty one"
    return _READERS[option][1]


def _items(value: Any) -> Iterable[Any]:
    return (
        re.split(r"[+,\s]+", value.strip("[]() ")) if isinstance(value, str) and value.strip("[]() ") else value or ()
    )


def _read_int(value: Any) -> int:
    if (isinstance(value, float) and not value.is_integer()) or isinstance(value, bool):
        raise ValueError
    return int(value)


def _read_bool(value: Any) -> bool:
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]


_READERS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    int: (_read_int, "a whole number"),
    float: (float, "a number"),
    bool: (_read_bool, "true or false"),
    str: (str, "text"),
    Share: (Share.read, "a percentage such as 10%"),
}
