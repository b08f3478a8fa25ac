"""What is known of each method before it runs: its paper, when it acts, what it looks at, what it goes with.

Everything comes from the registry: the first line of a plugin's docstring, `Name: what it does (arXiv number).`, the
class, and whether a part is refused.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvfactory.errors import UserError
from kvfactory.eviction import EvictionMethod
from kvfactory.registry import Registry
from kvfactory.settings import Setting

FIRST_LINE = re.compile(r"[\w-]+: (?P<does>.+?)(?: \(arXiv (?P<arxiv>[\d.]+)\))?\.(?: .*)?")


@dataclass(frozen=True)
class Facts:
    """One method, in words for a table."""

    name: str
    arxiv: str | None
    does: str
    acts_in: str
    reads: str
    prefill: str
    allocators: str
    merges: str
    storages: str

    @property
    def paper(self) -> str:
        """A link to the paper, in Markdown, or nothing."""
        return f"[{self.arxiv}](https://arxiv.org/abs/{self.arxiv})" if self.arxiv else ""


def facts(registry: Registry, names: Iterable[str]) -> list[Facts]:
    """What there is to say of the methods, in their order."""
    with TemporaryDirectory() as folder:
        table = Path(folder) / "layers.json"
        table.write_text("[1]")
        return [_facts(registry, name, str(table)) for name in names]


def first_line(registry: Registry, name: str) -> tuple[str, str | None]:
    """What a method does, in a clause, and the arXiv number of its paper; the whole first line if it has another form."""
    documented = inspect.getmodule(registry.method_entry(name).attention)
    line = (documented.__doc__ or "").strip().split("\n")[0] if documented else ""
    found = FIRST_LINE.fullmatch(line)
    return (found["does"], found["arxiv"]) if found else (line, None)


def _facts(registry: Registry, name: str, layer_table: str) -> Facts:
    does, arxiv = first_line(registry, name)
    cls = registry.method_entry(name).attention
    acts_in = "prompt and steps" if registry.has_budget(name) else "-"
    if issubclass(cls, EvictionMethod):
        default = registry.settings(name)["decode_budget"].default
        refused = refusal(registry, name, {}, layer_table, decode_budget="same")
        acts_in = "prompt and steps" if default else "prompt alone" if refused else "prompt; steps on request"
    return Facts(
        name,
        arxiv,
        does,
        acts_in,
        cls.reads,
        cls.prefill,
        _goes_with(registry, name, ["allocator"], layer_table),
        _goes_with(registry, name, ["merge"], layer_table),
        _goes_with(registry, name, ["quant_method", "key_pruning", "retrieval"], layer_table),
    )


def _goes_with(registry: Registry, name: str, kinds: list[str], layer_table: str) -> str:
    shelf = [(kind, part) for kind in kinds for part in registry.parts[kind]]
    fitting = [part for kind, part in shelf if refusal(registry, name, {kind: part}, layer_table) is None]
    left = [part for _, part in shelf if part not in fitting]
    if not left:
        return "any"
    return f"any but {', '.join(left)}" if len(left) < len(fitting) else ", ".join(fitting) or "none"


def refusal(registry: Registry, name: str, parts: dict[str, str], layer_table: str, **settings: Any) -> str | None:
    """Why a method does not go with these parts, or None if it does; `layer_table` is for an allocator that needs one."""
    try:
        known = registry.settings(name, parts)
        given = {"layer_table": layer_table} if "layer_table" in known else {}
        registry.load_method(name, 128, **parts, **given, **settings)
    except UserError as error:
        return str(error)
    return None


def markdown(heads: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def settings_text(settings: Iterable[Setting]) -> str:
    """Settings with their defaults: "`window_size` 8, `beta` 20"."""
    return ", ".join(f"`{each.name}` {_shown(each.default)}" for each in settings)


def _shown(default: Any) -> str:
    return json.dumps(list(default)) if isinstance(default, tuple) else "none" if default is None else str(default)
