"""Parts: what a method is composed with. Each is one object of its own, and any of them may go with any method.

A part is a frozen dataclass. Its fields are settings, as a method's are, and a registry knows it by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something a method is composed with: a budget allocator, a merge."""

    name: ClassVar[str] = ""
    """What it is registered as."""
    aliases: ClassVar[dict[str, str]] = {}
    """Names that others know a setting by, and this one's, for methods that have no setting of that name themselves."""

    @property
    def weighs_scores(self) -> bool:
        """Whether this takes scores for weights, which scores below 0 are not."""
        return False

    @property
    def notice(self) -> str | None:
        """What a user should be told before results are read, in one line, if there is anything."""
        return None
