"""Lists and help: what they import, what they remember, and when that is made anew."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest
from entry_points import exit_code
from kvfactory_runners.commands import command as kvfactory_command

import kvfactory
from kvfactory import gguf
from kvfactory.catalogue import Catalogue, catalogue_for, catalogue_of, kept_catalogue, with_help
from kvfactory.described import ONLY_HELP, described, help_of
from kvfactory.installed import state
from kvfactory.lazy import lazily
from kvfactory.models import resolve
from kvfactory.registry import Plugin, Registry, get_registry

HEAVY = {"torch", "transformers", "pandas", "matplotlib", "datasets", "numpy", "kvfactory.registry"}
RUNNERS = sorted(each.name for each in entry_points(group="console_scripts") if each.name.startswith("run_"))
LISTS = [
    ("kvfactory", "methods"),
    ("kvfactory", "--help"),
    ("kvfactory", "run", "--help"),
    *(("kvfactory", "run", name, "--help") for name in ("needle", "perplexity")),
    *(("kvfactory", name, "--help") for name in ("methods", "report", "score", "compare", "train-learned")),
    *((script, "--help") for script in RUNNERS),
]
SHOW = """
import sys
from importlib.metadata import entry_points
sys.argv = ["/bin/" + sys.argv[1], *sys.argv[2:]]
script = entry_points(group="console_scripts")[sys.argv[0].removeprefix("/bin/")]
try:
    script.load()()
except SystemExit as stop:
    print(stop.code, *sorted(HEAVY & {*sys.modules}), sep="\\n", file=sys.stderr)
""".replace("HEAVY", repr(HEAVY))


def show(cache: Path, *line: str) -> tuple[str, list[str]]:
    """What a command prints in a process of its own, and which heavy modules it has imported at its end."""
    variables = os.environ | {"KVFACTORY_CACHE": str(cache), "COLUMNS": "90"}
    ran = subprocess.run(
        [sys.executable, "-c", SHOW, *line], env=variables, capture_output=True, text=True, timeout=300
    )
    code, *heavy = ran.stderr.splitlines()
    assert code in ("0", "None"), ran.stderr
    return ran.stdout, heavy


# ---- what is imported


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """A cache folder in which the first command has run, and what that said and imported."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, *show(cache, "kvfactory", "methods")


def test_the_first_list_asks_the_registry_and_the_next_its_catalogue(first: tuple[Path, str, list[str]]) -> None:
    cache, said, heavy = first
    assert {"torch", "kvfactory.registry"} <= set(heavy)
    assert show(cache, "kvfactory", "methods") == (said, [])


@pytest.mark.parametrize("line", LISTS, ids=" ".join)
def test_lists_and_help_import_nothing_heavy_and_say_what_the_registry_says(
    line: tuple[str, ...], first: tuple[Path, str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    said, heavy = show(first[0], *line)
    assert heavy == []
    monkeypatch.setenv("COLUMNS", "90")
    assert exit_code(line[0], line[1:]) == 0  # in this process the registry is asked
    asked = capsys.readouterr().out
    if "--help" in line:  # which begins with what pytest was started as
        said, asked = (text.partition("\n")[2] for text in (said, asked))
    assert asked == said


def test_whatever_runs_is_parsed_by_the_registry(first: tuple[Path, str, list[str]]) -> None:
    """Help beside other arguments too: an unknown one is told first."""
    variables = os.environ | {"KVFACTORY_CACHE": str(first[0])}
    line = [sys.executable, "-c", SHOW, "kvfactory", "run", "needle", "--help", "--metod", "fullkv"]
    ran = subprocess.run(line, env=variables, capture_output=True, text=True, timeout=300)
    assert ran.stderr.startswith("error: No such option '--metod'.") and "'--method'" in ran.stderr.splitlines()[0]
    assert "kvfactory.registry" in ran.stderr.splitlines()


def test_kvfactory_itself_imports_nothing_heavy() -> None:
    code = f"import sys, kvfactory; from kvfactory import UserError, hookimpl; print({HEAVY} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_every_name_is_there_and_no_other() -> None:
    everything: dict[str, Any] = {}
    exec("from kvfactory import *", everything)
    assert {name for name in everything if not name.startswith("__")} == {*kvfactory.__all__}
    assert {*kvfactory.__all__} <= {*dir(kvfactory)}
    assert everything["Engine"].__module__ == "kvfactory.engine"
    assert everything["metrics"] is sys.modules["kvfactory.metrics"]
    assert {name for names in kvfactory._NAMES.values() for name in names} == {*kvfactory.__all__}
    with pytest.raises(AttributeError, match=r"module 'kvfactory' has no attribute 'Motor'"):
        kvfactory.Motor  # noqa: B018


def test_a_name_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("a_module")
    monkeypatch.setitem(sys.modules, "a_module", module)
    module.__getattr__ = lazily("a_module", {"sqrt": "math"})  # type: ignore[method-assign]
    import math

    assert module.sqrt is math.sqrt and vars(module)["sqrt"] is math.sqrt


# ---- what is kept, and for how long


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVFACTORY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packages in which a plugin is installed."""
    folder = tmp_path / "packages"
    (folder / "kvf_mine" / "deep").mkdir(parents=True)
    for name in ("__init__.py", "plugin.py", "deep/scores.py"):
        (folder / "kvf_mine" / name).write_text("x = 1\n")
    info = folder / "kvf_mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvf-mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvfactory]\nmine = kvf_mine.plugin\n")
    monkeypatch.syspath_prepend(folder)
    return folder


class Counted:
    """A registry that is asked for, and how often it was."""

    def __init__(self, registry: Registry) -> None:
        self.registry, self.times = registry, 0

    def __call__(self) -> Registry:
        self.times += 1
        return self.registry


def touch(path: Path) -> None:
    """The same content, a second later."""
    time = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(time, time))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a plugin is edited": lambda folder: touch(folder / "kvf_mine" / "plugin.py"),
    "a module beside it is": lambda folder: (folder / "kvf_mine" / "deep" / "scores.py").write_text("x = 1234\n"),
    "a file is new": lambda folder: (folder / "kvf_mine" / "deep" / "more.py").write_text(""),
    "a file is gone": lambda folder: (folder / "kvf_mine" / "deep" / "scores.py").unlink(),
    "a file has another name": lambda folder: (folder / "kvf_mine" / "plugin.py").rename(folder / "kvf_mine" / "p.py"),
    "another version is installed": lambda folder: (folder / "kvf_mine-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kvf-mine\nVersion: 1.1\n"
    ),
    "it has one more entry point": lambda folder: (folder / "kvf_mine-1.0.dist-info" / "entry_points.txt").write_text(
        "[kvfactory]\nmine = kvf_mine.plugin\n[kvfactory.benchmarks]\nmine = kvf_mine.plugin\n"
    ),
    "another package is installed beside it": lambda folder: (folder / "boards-1.0.dist-info").mkdir(),
    "the plugin is removed": lambda folder: (folder / "kvf_mine-1.0.dist-info").rename(folder.parent / "trash"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_catalogue_is_made_anew_after(change: str, package: Path, cache: Path) -> None:
    registry = Counted(get_registry())
    made = kept_catalogue(registry)
    assert kept_catalogue(registry) == made and registry.times == 1
    CHANGES[change](package)
    assert kept_catalogue(registry) == made and registry.times == 2
    assert kept_catalogue(registry) == made and registry.times == 2


def test_kvfactory_and_what_comes_with_it_are_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source file of the three packages is looked at."""
    seen: list[Path] = []
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **how: seen.append(path) or stat(path, **how))
    state()
    monkeypatch.undo()
    for name in ("kvfactory.cli", "kvfactory.report.methods", "kvfactory_plugins.learned", "kvfactory_runners.score"):
        __import__(name)
        assert Path(str(sys.modules[name].__file__)) in seen, name


def test_what_is_kept_is_what_was_made(cache: Path) -> None:
    registry = get_registry()
    made = kept_catalogue(lambda: registry)
    assert kept_catalogue(pytest.fail) == made
    assert {*made.benchmarks} == {*registry.benchmarks} and {*made.commands} == {*registry.commands}
    assert all(known and known.sections for known in (*made.benchmarks.values(), *made.commands.values()))
    assert [each.name for each in made.methods] == sorted(registry.methods)
    assert [each.name for each in cache.iterdir()] == [next(cache.glob("catalogue-?.json")).name], "drafts are left"


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda content: b"",
        lambda content: b"\xff" + content,
        lambda content: b"[1]",
        lambda content: b"[" * 100_000,
        lambda content: content.replace(b'"methods": [', b'"methods": [5, '),
        lambda content: content.replace(b'"sections"', b'"parts"'),
        lambda content: content.replace(b'"failures"', b'"failed"'),
    ],
)
def test_a_damaged_file_is_made_anew(damage: Callable[[bytes], bytes], cache: Path) -> None:
    registry = Counted(get_registry())
    made = kept_catalogue(registry)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert kept_catalogue(registry) == made and registry.times == 2
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    registry = Counted(get_registry())
    for folder in (tmp_path / "file" / "cache", tmp_path / "file"):
        monkeypatch.setenv("KVFACTORY_CACHE", str(folder))
        assert kept_catalogue(registry) == with_help(catalogue_of(registry.registry), registry.registry)
    assert registry.times == 2 and (tmp_path / "file").read_text() == ""


def test_a_home_that_is_not_known_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("KVFACTORY_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", unknown)
    assert kept_catalogue(get_registry).methods


def test_a_write_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert kept_catalogue(get_registry).methods
    assert [*cache.iterdir()] == []


def test_a_plugin_that_fails_is_listed_and_tried_again_each_time(cache: Path) -> None:
    broken = Registry.load()
    broken.plugins.append(Plugin("bad", "kvf-bad", "1.2", error="ImportError: No module named 'triton'"))
    registry = Counted(broken)
    for times in (1, 2):
        assert kept_catalogue(registry).failures == [
            "bad of kvf-bad 1.2 fails to import: ImportError: No module named 'triton'"
        ]
        assert registry.times == times, "what it lacks may come, and nothing that is watched would change"


def test_a_process_that_has_a_registry_asks_that_one(cache: Path) -> None:
    assert kept_catalogue(get_registry).methods
    assert catalogue_for([], Registry) == Catalogue([], [], {}, {})


def test_a_benchmark_that_cannot_be_shown_spoils_no_list() -> None:
    registry = Registry()
    registry._benchmarks["chess"] = object()
    catalogue = with_help(catalogue_of(registry), registry)
    assert catalogue == Catalogue([], [], {"chess": None}, {})


# ---- help as data


def leaf(**more: Any) -> click.Command:
    options = [
        click.Option(
            ["-f", "--far"], type=click.Choice(["a", "b"]), default="a", show_default=True, help="How far. " * 9
        ),
        click.Option(["--secret"], hidden=True, help="Nobody's business."),
    ]
    arguments = {"params": [click.Argument(["path"]), *options], "help": "Weigh it.\n\nTwice, " + "if need be, " * 20}
    return click.Command("weigh", **arguments | more)


def texts(command: click.Command) -> list[str]:
    return [
        command.get_help(click.Context(command, info_name="x", terminal_width=width)) for width in (40, 72, 100, 300)
    ]


@pytest.mark.parametrize(
    "command",
    [
        leaf(),
        leaf(epilog="And that is all.", short_help="Short."),
        leaf(help=None, params=[]),
        leaf(context_settings={"max_content_width": 60}),
        leaf(hidden=True),
        leaf(deprecated=True),
    ],
)
def test_a_described_command_has_the_help_of_its_own(command: click.Command) -> None:
    known = help_of(command)
    shown = described("weigh", known, lambda: command)
    assert texts(shown) == texts(command)
    assert shown.get_short_help_str() == command.get_short_help_str()
    assert (shown.hidden, shown.context_settings) == (command.hidden, command.context_settings)


class Shouting(click.Command):
    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_text("WEIGH IT")


@pytest.mark.parametrize(
    "command",
    [
        Shouting("weigh", help="Weigh it."),
        leaf(add_help_option=False),
        leaf(params=[click.Option(["--help"], help="Of another kind.")]),
        leaf(context_settings={"help_option_names": ["-h"]}),
        click.Group("weigh", commands={"gold": click.Command("gold", help="In ounces, " * 20)}),
    ],
)
def test_a_command_with_more_to_its_help_than_text_is_asked_itself(command: click.Command) -> None:
    """But not for the line that lists have of it."""
    known = help_of(command)
    assert known.sections is None
    listed = described("weigh", known, pytest.fail)
    assert [listed.get_short_help_str(limit) for limit in (20, 90)] == [
        command.get_short_help_str(limit) for limit in (20, 90)
    ]
    made = described("weigh", known, lambda: command)
    assert texts(made) == texts(command)
    assert made.make_context("weigh", [*ONLY_HELP], resilient_parsing=True).command is command


def test_anything_but_help_alone_is_for_the_command_itself(capsys: pytest.CaptureFixture[str]) -> None:
    made: list[click.Command] = []
    ran: list[tuple[str, str]] = []

    def make() -> click.Command:
        made.append(leaf(callback=lambda path, far, secret: ran.append((path, far))))
        return made[-1]

    command = described("weigh", help_of(leaf()), make)
    command.main([*ONLY_HELP], "weigh", standalone_mode=False)
    assert made == [] and "--far" in capsys.readouterr().out
    command.main(["here", "--far", "b"], "weigh", standalone_mode=False)
    assert ran == [("here", "b")]
    with pytest.raises(click.NoSuchOption):
        command.main(["here", "--near"], "weigh", standalone_mode=False)
    click.Group("kvfactory", commands={"weigh": command}).main(["weigh", "there"], "kvfactory", standalone_mode=False)
    assert ran == [("here", "b"), ("there", "a")] and len(made) == 3


def test_a_command_of_a_plugin_runs_from_the_catalogue(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported registries: its help is known, and the plugin is asked when it runs."""
    ran: list[str] = []
    registry = Registry()
    registry.commands["weigh"] = leaf(callback=lambda path, **_: ran.append(path))
    monkeypatch.setattr("kvfactory_runners.commands.catalogue_for", lambda arguments, make: kept_catalogue(make))
    asked = Counted(registry)
    monkeypatch.setattr("kvfactory_runners.commands.registry_for", lambda arguments: asked())
    for times in (1, 1):
        assert "weigh" in texts(kvfactory_command([]))[0] and asked.times == times
    kvfactory_command([]).main(["weigh", "here"], "kvfactory", standalone_mode=False)
    assert ran == ["here"] and asked.times == 2


# ---- the embedded model


def test_the_embedded_model_is_converted_once(embedded: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_write", "_sha256"):
        monkeypatch.setattr(gguf, name, pytest.fail)
    assert (Path(resolve(None)) / "model.safetensors").is_file()
