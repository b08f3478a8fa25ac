"""What is installed: the state of its code, which tells whether it has changed, and the registry that is loaded from it.

Nothing here imports a plugin, or torch, until a registry is asked for.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .registry import Registry

GROUP = "kvfactory"
BENCHMARKS = "kvfactory.benchmarks"
"""Entry points that are loaded when benchmarks are asked for: tables and plots come with them, which take a second."""


@cache
def get_registry() -> Registry:
    """The registry of this process."""
    from .registry import Registry

    return Registry.load()


def state() -> str:
    """A digest that is another one after any edit, install, upgrade or removal of what a registry loads.

    It is of this Python; of the entry points of plugins and the versions of their distributions; of the path, size and
    time of each source file of their packages and of kvfactory; and of the time of the folders that distributions are in,
    where what a plugin imports beside its own package comes and goes.
    """
    points = sorted(
        (point for group in (GROUP, BENCHMARKS) for point in entry_points(group=group)),
        key=lambda point: (point.group, point.name, point.value),
    )
    known = [(point.group, point.name, point.value, *_origin(point)) for point in points]
    packages = {__name__.partition(".")[0], *(point.module.partition(".")[0] for point in points)}
    sources = sorted(path for package in packages for path in _sources(package))
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    folders |= {str(point.dist.locate_file("")) for point in points if point.dist}
    described = [sys.version, sys.prefix, known, _stamps(sources), _stamps(sorted(folders))]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _origin(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("", "")


def _sources(package: str) -> Iterator[str]:
    """The Python files of a package, which is not imported; of a module, its one file."""
    spec = None
    with suppress(ImportError, ValueError):
        spec = find_spec(package)
    if spec is None:
        return
    if spec.submodule_search_locations is None and spec.origin:
        yield spec.origin
    for folder in spec.submodule_search_locations or ():
        yield from map(str, Path(folder).rglob("*.py"))


def _stamps(paths: Iterable[str]) -> list[tuple[str, int, int]]:
    """Of each path that is there: when it was written and its size; folders' sizes say nothing."""
    found = []
    for path in paths:
        with suppress(OSError):
            status = Path(path).stat()
            found.append((path, status.st_mtime_ns, status.st_size))
    return found
