"""What lists and help say of what is installed, without importing it: the catalogue of a registry, kept in a file.

A registry imports every plugin, and torch with them; that takes seconds. What it says in a list or a help is text, which
is kept in the cache folder for as long as nothing that it was made of changes (`installed.state`). It is shown and
nothing else: what runs is made from the registry.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli import plugin_files
from .described import CommandHelp, help_of
from .folders import cache_folder
from .installed import state

if TYPE_CHECKING:
    from .registry import Registry

UNUSABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)
"""What comes of a file that is not there, damaged or not to be written, and of a home that is not known."""


@dataclass(frozen=True)
class ListedMethod:
    """A method as `kvfactory methods` lists it."""

    name: str
    origin: str
    """The distribution and its version, or the file."""
    parts: dict[str, str]
    """What it is composed with, by kind."""
    does: str
    """The first line of its documentation, without name and paper."""
    settings: dict[str, str]
    """Its settings and those of its parts, with the text of their defaults."""


@dataclass(frozen=True)
class Catalogue:
    """What is there, in the order of lists; a command without help here is to be asked itself."""

    methods: list[ListedMethod]
    failures: list[str]
    """Plugins that could not be imported, and why."""
    benchmarks: Mapping[str, CommandHelp | None]
    commands: Mapping[str, CommandHelp | None]
    """Commands that plugins bring."""


def catalogue_for(arguments: Sequence[str], registry: Callable[[], Registry]) -> Catalogue:
    """The catalogue of the registry that these arguments of a command ask for.

    A registry is asked itself where `--plugin` names a file, and where this process has imported registries already: it
    has nothing to gain then, and may have more in its own than is installed.
    """
    if plugin_files(arguments) or "kvfactory.registry" in sys.modules:
        return catalogue_of(registry())
    return kept_catalogue(registry)


def kept_catalogue(registry: Callable[[], Registry]) -> Catalogue:
    """The catalogue of what is installed, from its file; made and kept there if anything was changed since.

    One that cannot be read is made anew, one that cannot be written is not kept, and neither is an error.
    """
    now = state()  # before plugins are imported: an edit while they are counts as one after
    if kept := _kept(now):
        return kept
    loaded = registry()
    made = with_help(catalogue_of(loaded), loaded)
    if not any(plugin.error for plugin in loaded.plugins):  # what one lacks may come without a trace
        _keep(now, made)
    return made


def catalogue_of(registry: Registry) -> Catalogue:
    """What lists say of a registry; commands are asked for their help themselves."""
    methods = [_listed(registry, name) for name in sorted(registry.methods)]
    failures = [f"{each.name} of {each} fails to import: {each.error}" for each in registry.plugins if each.error]
    return Catalogue(methods, failures, _Asked(lambda: registry.benchmarks), _Asked(lambda: registry.commands))


def with_help(catalogue: Catalogue, registry: Registry) -> Catalogue:
    """The same with the help of every command."""
    from .runner import benchmark_command

    benchmarks = {name: _help(partial(benchmark_command, name, registry)) for name in registry.benchmarks}
    commands = {name: _help(partial(registry.commands.__getitem__, name)) for name in registry.commands}
    return replace(catalogue, benchmarks=benchmarks, commands=commands)


class _Asked(Mapping[str, None]):
    """Names without help, found when they are needed: a registry imports benchmarks no earlier."""

    def __init__(self, named: Callable[[], Collection[str]]) -> None:
        self.named = named

    def __getitem__(self, name: str) -> None:
        if name not in self.named():
            raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.named())

    def __len__(self) -> int:
        return len(self.named())


def _listed(registry: Registry, name: str) -> ListedMethod:
    from .report.methods import first_line

    settings = {each.name: str(each.default) for each in registry.settings(name).values()}
    origin, does = str(registry.method_entry(name).plugin), first_line(registry, name)[0]
    return ListedMethod(name, origin, registry.parts_of(name), does, settings)


def _help(make: Callable[[], click.Command]) -> CommandHelp | None:
    try:
        return help_of(make())
    except Exception:  # it is told when the command itself is asked for
        return None


def _file() -> Path:
    """One of sixteen by the environment of Python: those of one user seldom share theirs, and files do not pile up."""
    return cache_folder() / f"catalogue-{hashlib.sha256(sys.prefix.encode()).hexdigest()[0]}.json"


def _kept(now: str) -> Catalogue | None:
    with suppress(*UNUSABLE):
        kept = json.loads(_file().read_text("utf-8"))
        if kept["state"] == now:
            return _read(kept["catalogue"])
    return None


def _keep(now: str, made: Catalogue) -> None:
    """Write the file in one step."""
    with suppress(*UNUSABLE):
        file = _file()
        draft = file.with_name(f".{file.stem}-{os.getpid()}")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(json.dumps({"state": now, "catalogue": asdict(made)}), "utf-8")
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)


def _read(kept: dict[str, Any]) -> Catalogue:
    methods = [ListedMethod(**each) for each in kept["methods"]]
    benchmarks, commands = (
        {name: known and _read_help(known) for name, known in kept[kind].items()} for kind in ("benchmarks", "commands")
    )
    return Catalogue(methods, list(kept["failures"]), benchmarks, commands)


def _read_help(kept: dict[str, Any]) -> CommandHelp:
    found = kept["sections"]
    sections = found and [(heading, [(flag, text) for flag, text in lines]) for heading, lines in found]
    return CommandHelp(**kept | {"sections": sections})
