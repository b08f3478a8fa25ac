"""Finds plugins, looks names up in what they registered, and explains what is wrong.

Built-in methods come through the same door as anybody's: entry points of the group `kvfactory`, or a file named by hand.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import pluggy

from . import hookspecs
from .attention import BUILT_IN_FAMILIES, Family
from .budget import HeadAdaptive, Pyramid, Share, Uniform
from .budget_tables import HeadTable, LayerTable
from .errors import UserError, unknown
from .installed import BENCHMARKS, GROUP
from .installed import get_registry as get_registry
from .method import Method
from .parts import Part
from .settings import Setting, convert, settings_of

LACKS = {
    "allocator": "has no budget that could be split",
    "merge": "merges nothing",
    "quant_method": "holds entries in a way of its own",
    "key_pruning": "holds entries in a way of its own",
    "retrieval": "reads entries in a way of its own",
}
"""Kinds of parts, and what is the matter with a method that cannot have one."""


@dataclass(frozen=True)
class Plugin:
    """Where things came from: an entry point of a distribution, or a file."""

    name: str
    distribution: str
    version: str
    error: str | None = None
    """Why it could not be imported, if it could not."""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip()


@dataclass(frozen=True)
class MethodEntry:
    """A registered method: what it does in attention, and what it is composed with unless the user says otherwise."""

    attention: type[Method]
    parts: dict[str, str]
    """The parts it is composed with, by the field that holds them: `{"allocator": "uniform"}`."""
    plugin: Plugin


class Registry:
    """Everything that plugins registered."""

    def __init__(self) -> None:
        self.methods: dict[str, MethodEntry] = {}
        self.parts: dict[str, dict[str, type[Any]]] = {kind: {} for kind in LACKS}
        """Parts by name, on a shelf for each field of a method that may hold them."""
        self.families: dict[str, Family] = {}
        self._benchmarks: dict[str, Any] = {}
        self._unread: list[str] = []
        self.commands: dict[str, click.Command] = {}
        self.plugins: list[Plugin] = []
        self._owners: dict[tuple[str, str], Plugin] = {}
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)

    @classmethod
    def load(cls) -> Registry:
        """What comes with kvfactory, and what every installed distribution offers."""
        registry = cls()
        registry.add(BuiltIn(), Plugin("kvfactory", "kvfactory", _version("kvfactory")))
        registry._add_group(GROUP)
        registry._unread = [BENCHMARKS]
        return registry

    @property
    def benchmarks(self) -> dict[str, Any]:
        """Each a `kvfactory.runner.Runner`, which is above this module."""
        while self._unread:
            self._add_group(self._unread.pop())
        return self._benchmarks

    def _add_group(self, group: str) -> None:
        for entry_point in metadata.entry_points(group=group):
            distribution = entry_point.dist
            origin = (distribution.name, distribution.version) if distribution else ("unknown", "")
            try:
                module = entry_point.load()
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                self.plugins.append(Plugin(entry_point.name, *origin, error=" ".join(why.split())))
            else:
                self.add(module, Plugin(entry_point.name, *origin))

    def add(self, module: object, plugin: Plugin) -> None:
        """Let one plugin register what it brings.

        Raises `UserError` for a hook that does not exist and for a name that is taken.
        """
        name = f"{len(self.plugins)}: {plugin.name}"  # pluggy wants names of its own; two plugins may share ours
        try:
            self._manager.register(module, name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            if self._manager.is_registered(module):
                self._manager.unregister(module)
            why = " ".join(str(error).split())
            raise UserError(f"plugin {plugin.name} of {plugin}: a hook is not as kvfactory knows it: {why}") from error
        self.plugins.append(plugin)
        doors: dict[str, Callable[..., None]] = {
            "kvfactory_register_methods": self._register_method,
            "kvfactory_register_allocators": partial(self._register_part, "allocator"),
            "kvfactory_register_merges": partial(self._register_part, "merge"),
            "kvfactory_register_quantisations": partial(self._register_part, "quant_method"),
            "kvfactory_register_key_prunings": partial(self._register_part, "key_pruning"),
            "kvfactory_register_retrievals": partial(self._register_part, "retrieval"),
            "kvfactory_register_families": partial(self._register, "model family", self.families),
            "kvfactory_register_benchmarks": partial(self._register, "benchmark", self._benchmarks),
            "kvfactory_register_commands": partial(self._register, "command", self.commands),
        }
        for hook, register in doors.items():
            for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                if implementation.plugin is module:
                    implementation.function(register=partial(register, plugin))

    def add_file(self, path: str | Path) -> None:
        """Load a plugin from a Python file, without packaging.

        Raises `UserError` if there is no such file or it fails to import.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"--plugin {path}: no such file; give the path of a Python file with a hook in it")
        unique = f"kvfactory_plugin_{len(self.plugins)}_{path.stem}"
        spec = importlib.util.spec_from_file_location(unique, path)
        if spec is None or spec.loader is None:
            raise UserError(f"--plugin {path}: not a Python file; give the path of a file that ends in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up by name
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"--plugin {path} fails to import: {type(error).__name__}: {error}") from error
        self.add(module, Plugin(path.stem, str(path), ""))

    def _register_method(
        self,
        plugin: Plugin,
        name: str,
        *,
        attention: type[Method],
        allocator: str = "uniform",
        merge: str | None = None,
        quant_method: str | None = None,
        key_pruning: str | None = None,
        retrieval: str | None = None,
    ) -> None:
        named = allocator, merge, quant_method, key_pruning, retrieval
        parts = {kind: part for kind, part in zip(LACKS, named, strict=True) if part}
        self._register("method", self.methods, plugin, name, MethodEntry(attention, parts, plugin))

    def _register_part(self, kind: str, plugin: Plugin, name: str, part: type[Part]) -> None:
        other = vars(part).get("name", name)
        if other != name:
            raise UserError(f"{kind} '{name}' of {plugin} is the class of '{other}'; derive a class of its own")
        self._register(kind, self.parts[kind], plugin, name, part)
        part.name = name

    def _register(self, kind: str, shelf: dict[str, Any], plugin: Plugin, name: str, thing: Any) -> None:
        if name != name.lower():
            raise UserError(f"{kind} '{name}' of {plugin} is not in lower case; names are looked up in lower case")
        if (kind, name) in self._owners:
            raise UserError(
                f"{kind} '{name}' is registered by both {self._owners[kind, name]} and {plugin}; remove one"
            )
        self._owners[kind, name] = plugin
        shelf[name] = thing

    def method_entry(self, name: str) -> MethodEntry:
        """The entry of a method; upper and lower case are the same.

        Raises `UserError` with the closest match, or with the reason if a plugin of that name failed to import.
        """
        if name.lower() in self.methods:
            return self.methods[name.lower()]
        for plugin in self.plugins:
            if plugin.error and plugin.name == name.lower():
                raise UserError(f"method '{name}': plugin {plugin.name} of {plugin} fails to import: {plugin.error}")
        raise unknown("method", name, self.methods)

    def part(self, kind: str, name: str) -> type[Part]:
        if name not in self.parts[kind]:
            raise unknown(kind, name, self.parts[kind])
        return self.parts[kind][name]

    def has_budget(self, name: str) -> bool:
        """Whether a method evicts down to a budget, or keeps everything."""
        return "budget" in settings_of(self.method_entry(name).attention)

    def kinds_of_parts(self, name: str) -> set[str]:
        """The kinds of parts that a method may be composed with."""
        return settings_of(self.method_entry(name).attention).keys() & self.parts.keys()

    def own_settings(self, name: str) -> dict[str, Setting]:
        """The settings of a method itself; its budget and those of its parts are not among them."""
        own = settings_of(self.method_entry(name).attention)
        return {each: setting for each, setting in own.items() if each != "budget" and each not in self.parts}

    def parts_of(self, name: str, chosen: Mapping[str, str | None] | None = None) -> dict[str, str]:
        """What a method is composed with, by field, where a user chose some of it and left the rest to the method.

        `none`, or None, takes a part away that a method can do without.

        Raises `UserError` for a part that the method cannot have.
        """
        entry = self.method_entry(name)
        own = settings_of(entry.attention)
        fields_of_parts = self.kinds_of_parts(name)
        may_be_none = {kind for kind in fields_of_parts if own[kind].default is None}
        given = {kind: part or "none" for kind, part in (chosen or {}).items() if part or kind in may_be_none}
        for kind, part in given.items():
            if kind not in fields_of_parts:
                raise UserError(f"method '{name}' takes no --{kind} {part}: it {LACKS[kind]}; leave --{kind} out")
        both = {kind: part for kind, part in entry.parts.items() if kind in fields_of_parts} | given
        return {kind: part for kind, part in both.items() if part != "none" or kind not in may_be_none}

    def settings(self, name: str, parts: Mapping[str, str | None] | None = None) -> dict[str, Setting]:
        """The settings of a method and of the parts it is used with.

        Raises `UserError` if two of them have a name in common, which would leave it open whose setting is meant.
        """
        known = self.own_settings(name)
        for kind, part in self.parts_of(name, parts).items():
            more = settings_of(self.part(kind, part))
            if common := known.keys() & more.keys():
                names = ", ".join(sorted(common))
                raise UserError(
                    f"method '{name}' and {kind} '{part}' both have a setting {names}; choose another {kind}"
                )
            known |= more
        return known

    def aliases_of_parts(self, name: str, parts: Mapping[str, str | None] | None = None) -> dict[str, str]:
        """Other names of settings of the parts a method is used with, as far as they are free."""
        known = self.settings(name, parts)
        used = [self.part(*each) for each in self.parts_of(name, parts).items()]
        return {alias: meant for part in used for alias, meant in part.aliases.items() if alias not in known}

    def load_method(self, name: str, budget: int | str | Share | None = None, **settings: Any) -> Method:
        """A method by name, with its settings; values may be strings, as flags are. Parts are chosen by name.

        Raises `UserError` for unknown names and settings, values of the wrong kind, parts that do not go with the method,
        and a budget that is missing where a method needs one. Methods that keep everything leave one unused.
        """
        entry = self.method_entry(name)
        own = settings_of(entry.attention)
        chosen = {kind: settings.pop(kind) for kind in self.parts if kind in settings}
        known = self.settings(name, chosen)
        aliases = {alias: meant for alias, meant in entry.attention.aliases.items() if alias not in known}
        aliases |= self.aliases_of_parts(name, chosen)
        for alias, meant in aliases.items():
            if alias in settings and meant in settings:
                raise UserError(f"{alias} and {meant} are one setting of {name}; give one of them")
        settings = {aliases.get(each, each): value for each, value in settings.items()}
        for each in settings:
            if each not in known:
                raise unknown(f"setting of {name}:", each, known)
        values = {each: convert(each, value, known[each].type) for each, value in settings.items()}
        if "budget" in own:
            if budget is None and own["budget"].default is not None:
                raise UserError(f"method '{name}' needs a budget; give --max_capacity_prompts")
            values["budget"] = convert("max_capacity_prompts", budget, own["budget"].type)
        for kind, part in self.parts_of(name, chosen).items():
            cls = self.part(kind, part)
            values[kind] = cls(**{each: values.pop(each) for each in settings_of(cls) if each in values})
        return entry.attention(**values)


class BuiltIn:
    """The allocators and families that come with kvfactory."""

    @hookspecs.hookimpl
    def kvfactory_register_allocators(self, register: hookspecs.RegisterAllocator) -> None:
        register("uniform", Uniform)
        register("pyramid", Pyramid)
        register("head-adaptive", HeadAdaptive)
        register("head-table", HeadTable)
        register("layer-table", LayerTable)

    @hookspecs.hookimpl
    def kvfactory_register_families(self, register: hookspecs.RegisterFamily) -> None:
        for model_type, family in BUILT_IN_FAMILIES.items():
            register(model_type, family)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def load_method(name: str, budget: int | str | Share | None = None, **settings: Any) -> Method:
    """A registered method, ready to use: `load_method("name", budget=128, window_size=16, allocator="uniform")`.

    Raises `UserError`; see `Registry.load_method`.
    """
    return get_registry().load_method(name, budget, **settings)
