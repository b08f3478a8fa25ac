"""What keeps the rooms apart: who may know whom, who may name whom, and how large anything may grow."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfactory.registry import get_registry

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "kvfactory").rglob("*.py"))
RUNNERS = sorted((ROOT / "runners").rglob("*.py"))
ALL_CODE = [
    file for room in ("kvfactory", "plugins", "runners", "scripts") for file in sorted((ROOT / room).rglob("*.py"))
]
BUILT_IN = {name for name, entry in get_registry().methods.items() if entry.plugin.distribution == "kvfactory"}
METHODS = sorted(BUILT_IN - {"random"})  # which is a module of Python's too, and of torch's


def label(file: Path) -> str:
    return str(file.relative_to(ROOT))


def words(source: str) -> Iterator[tuple[int, str]]:
    """Names and strings of the code with their lines; comments and docstrings are not code."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value
        for name in ("id", "attr", "name", "asname", "arg", "module"):
            if isinstance(getattr(node, name, None), str):
                yield getattr(node, "lineno", 0), getattr(node, name)


def named_methods(source: str) -> list[str]:
    """The methods that the code names, as `line: name`, whether as a word of its own or as part of a name."""
    found = []
    for line, text in words(source):
        for method in METHODS:
            if re.search(rf"(?<![a-z0-9]){re.escape(method)}(?![a-z0-9])", text.lower()):
                found.append(f"{line}: {method}")
    return found


def imported(source: str) -> set[str]:
    """Top-level packages that a file imports, relative imports left out."""
    packages = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            packages.add(node.module.partition(".")[0])
    return packages


def test_the_search_finds_what_it_should() -> None:
    """The tests below would pass over anything if this one did not hold."""
    assert {"fullkv", "h2o", "snapkv"} <= set(METHODS)
    seen = (
        "def snapkv_scores(): ...",
        "x.SnapKV()",
        "f(h2o=1)",
        "if name == 'snapkv': ...",
        "from a.h2o import B",
        "f'run {x} h2o'",
    )
    unseen = (
        "# snapkv\nx = 1",
        '"""snapkv"""\nx = 1',
        "class A:\n    x = 1\n    'snapkv'",
        "snapkvx = 1",
        "print('ch2o2')",
    )
    assert all(named_methods(each) for each in seen)
    assert not any(named_methods(each) for each in unseen)
    assert imported("import a.b\nfrom c.d import e\nfrom .f import g\nfrom . import h") == {"a", "c"}
    assert len(LIBRARY) > 15


@pytest.mark.parametrize("file", LIBRARY + RUNNERS, ids=label)
def test_no_method_is_named_outside_plugins(file: Path) -> None:
    assert named_methods(file.read_text()) == []


@pytest.mark.parametrize("file", LIBRARY, ids=label)
def test_the_library_knows_neither_plugins_nor_runners(file: Path) -> None:
    source = file.read_text()
    above = {"kvfactory_plugins", "kvfactory_runners", "plugins", "runners"}
    assert imported(source).isdisjoint(above)
    assert not [text for _, text in words(source) if re.search(r"\bkvfactory_(plugins|runners)\b", text)]


@pytest.mark.parametrize("file", sorted((ROOT / "plugins").glob("*.py")), ids=label)
def test_a_plugin_knows_the_library_and_its_siblings_alone(file: Path) -> None:
    assert imported(file.read_text()).isdisjoint({"kvfactory_plugins", "kvfactory_runners", "plugins", "runners"})


def test_plugins_are_loaded_once_and_by_their_installed_name() -> None:
    get_registry()
    assert "kvfactory_plugins" in sys.modules
    assert "plugins" not in sys.modules, "a second copy of each plugin, by way of the repository's root on sys.path"


@pytest.mark.parametrize("file", ALL_CODE, ids=label)
def test_files_stay_small(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 330


@pytest.mark.parametrize("file", LIBRARY, ids=label)
def test_what_is_public_says_what_it_is(file: Path) -> None:
    tree = ast.parse(file.read_text())
    public = [
        node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]
    assert ast.get_docstring(tree) or not tree.body, "a newcomer starts with the docstring of the module"
    assert [node.name for node in public if not ast.get_docstring(node)] == []
