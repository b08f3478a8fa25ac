"""Bad input, and how it is told: one line that names what is wrong and what would be right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user can put right; commands print its message as one line and exit with code 2."""


class Interrupted(Exception):
    """Ctrl-C in the middle of work; commands print its message, which says how to go on, and exit with code 130."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a `name` that is not among the `known` ones, with the closest match or all of them."""
    names = sorted(known)
    lowered = {each.lower(): each for each in names}
    close = get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    hint = f"did you mean '{lowered[close[0]]}'?" if close else f"known: {', '.join(names) or 'none'}"
    return UserError(f"unknown {kind} '{name}'; {hint}")


def require(condition: bool, message: str) -> None:
    """Raise a `UserError` with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def at_least(settings: object, **least: float) -> None:
    """Raise a `UserError` for a setting that is below its least value: `at_least(self, sink_size=0, window_size=1)`.

    None is below nothing.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        require(value is None or value >= bound, f"--{name} is {value}; it is {bound} or more")
