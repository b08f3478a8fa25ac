"""Texts to read: a user's own, or three kinds that come with this package and with every Python.

`narrative` is the passages of reading.json, `qa` each of them again with questions about it and their answers, `code`
the source of a few modules of the running Python's standard library. A text says what it was taken from and has a hash,
so that two runs can tell whether they read the same.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterable
from importlib import import_module

from kvfactory.benchmarks.haystack import Haystack
from kvfactory.benchmarks.reading import PASSAGES, Passage, read_passages
from kvfactory.errors import require, unknown

MODULES = ("argparse", "inspect", "tarfile", "logging")
"""Of the standard library: long files, each by other authors."""


def load_texts(names: Iterable[str]) -> dict[str, Haystack]:
    """Texts that come with the package, by name and each once; `UserError` for a name that is none."""
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        if name not in TEXTS:
            raise unknown("text", name, TEXTS)
    return {name: TEXTS[name]() for name in chosen}


def _narrative() -> Haystack:
    return _of_passages("narrative", lambda passage: [passage.text])


def _qa() -> Haystack:
    def parts(passage: Passage) -> list[str]:
        pairs = [f"Question: {each.question}\nAnswer: {each.answer}" for each in passage.questions]
        return [passage.title, passage.text, *pairs]

    return _of_passages("qa", parts)


def _of_passages(name: str, parts: Callable[[Passage], list[str]]) -> Haystack:
    passages = read_passages()
    text = "\n\n".join(part for passage in passages for part in parts(passage))
    return Haystack(text, f"{PASSAGES.name}, {name}", f"{len(passages)} passages")


def _code() -> Haystack:
    try:
        sources = [inspect.getsource(import_module(name)) for name in MODULES]
    except OSError:
        sources = []
    require(
        bool(sources), "--texts code: this Python comes without its sources; give --texts narrative,qa or --text FILE"
    )
    return Haystack("\n\n".join(sources), ", ".join(MODULES), f"Python {platform.python_version()}")


TEXTS: dict[str, Callable[[], Haystack]] = {"narrative": _narrative, "code": _code, "qa": _qa}
"""Makes each text, by name."""
