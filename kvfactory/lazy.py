"""Names that are imported when they are asked for, so that a module which has them is quick to import itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(module: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module (PEP 562) for names that live elsewhere.

    `__getattr__ = lazily(__name__, {"Engine": "kvfactory.engine", "metrics": "kvfactory.metrics"})`: a name of a module, or
    a module. It is looked up once, and is this module's own from then on.
    """

    def look_up(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place = import_module(places[name])
        value = place if place.__name__.endswith(f".{name}") else getattr(place, name)
        setattr(sys.modules[module], name, value)
        return value

    return look_up
