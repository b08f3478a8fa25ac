"""What a sweep runs over its examples: methods at budgets, as a command line names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from .budget import Share
from .errors import UserError, require
from .method import Method
from .registry import LACKS, Registry
from .settings import settings_of


@dataclass(frozen=True)
class Job:
    """One method at one budget, as a sweep runs it and tables name it."""

    label: str
    """The method's name and the settings given with it: `h2o:recent_size=32`."""
    budget: int | str | None
    """Entries, or a share of the prompt such as `10%`; None for a method that keeps everything."""
    method: Method

    @property
    def key(self) -> tuple[str, int | str | None]:
        """What tells its rows from those of other jobs."""
        return self.label, self.budget


def make_jobs(
    registry: Registry,
    specs: Sequence[str],
    budgets: Sequence[int | Share],
    parts: Mapping[str, str | None] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Job]:
    """Every method at every budget. A spec is a name, and settings of its own behind colons: `snapkv:window_size=16`.

    A spec may name a budget of its own, and is there once then. `parts` (an allocator, a merge) and `settings` go to each
    method that has them. Raises `UserError` for what no method here has.
    """
    settings = settings or {}
    wanted = {kind: part for kind, part in (parts or {}).items() if part is not None}
    parsed = {spec: _parse(spec) for spec in dict.fromkeys(specs)}
    fitting = {
        name: {kind: part for kind, part in wanted.items() if kind in registry.kinds_of_parts(name)}
        for name, _ in parsed.values()
    }
    known: dict[str, set[str]] = {}
    for spec, (name, own) in parsed.items():
        used = fitting[name] | _parts(registry, own)
        known[spec] = {*registry.settings(name, used), *registry.aliases_of_parts(name, used)}
    for setting in settings:
        if not any(setting in each for each in known.values()):
            raise UserError(f"--{setting} is not a setting of {', '.join(parsed)}; {_owners(registry, setting)}")
    for kind, part in wanted.items():
        if not any(kind in each for each in fitting.values()):
            raise UserError(f"--{kind} {part}: each of {', '.join(parsed)} {LACKS[kind]}; leave it out")
    jobs: dict[tuple[str, str | None], Job] = {}
    for (spec, (name, own)), budget in product(parsed.items(), budgets):
        given = {each: value for each, value in settings.items() if each in known[spec]}
        at = {"budget": budget} if registry.has_budget(name) else {}
        require(bool(at) or "budget" not in own, f"--method '{spec}': {name} keeps everything and takes no budget")
        method = registry.load_method(name, **(at | given | fitting[name] | own))
        asked = getattr(method, "budget", None)
        named = str(asked) if isinstance(asked, Share) else asked
        jobs.setdefault((spec.lower(), None if named is None else str(named)), Job(spec.lower(), named, method))
    return list(jobs.values())


def _parts(registry: Registry, own: Mapping[str, str]) -> dict[str, str]:
    return {kind: own[kind] for kind in registry.parts if kind in own}


def _parse(spec: str) -> tuple[str, dict[str, str]]:
    name, *pairs = spec.split(":")
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--method '{spec}': '{pair}' is not setting=value; write name:setting=value:setting=value")
    return name, dict(pair.split("=", 1) for pair in pairs)


def _owners(registry: Registry, setting: str) -> str:
    owners = [name for name in registry.methods if setting in registry.own_settings(name)]
    owners += [
        f"--{kind} {name}"
        for kind, shelf in registry.parts.items()
        for name in shelf
        if setting in settings_of(shelf[name])
    ]
    return f"it is one of {', '.join(owners)}" if owners else "no method has it"
