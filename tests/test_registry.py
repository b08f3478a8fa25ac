"""How plugins are found and looked up, what a user is told, and that no setting is accepted and ignored."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import click
import pytest
import torch
from calibrations import tiny_calibration, tiny_weights
from entry_points import exit_code
from torch import Tensor

from kvfactory import DenseStore, EvictionMethod, LayerContext, Method, Store, UserError, hookimpl, load_method
from kvfactory.budget import Pyramid, Share, Uniform
from kvfactory.context import Prompt
from kvfactory.kernels import PromptAttention
from kvfactory.registry import Plugin, Registry, Setting, convert, get_registry
from kvfactory.runner import benchmark_command
from kvfactory.testing import compress_layer

ROOT = Path(__file__).parents[1]
METHODS = sorted(get_registry().methods)
WITHOUT_A_TABLE = {"layer-table"}
"""Parts that cannot be used with their defaults alone."""
PARTS = [(kind, part) for kind, shelf in get_registry().parts.items() for part in sorted({*shelf} - WITHOUT_A_TABLE)]


class Whole(Method):
    """Keeps everything."""

    def compress(self, layer: LayerContext) -> Store:
        return DenseStore(layer.keys, layer.values)


def methods_plugin(*names: str) -> ModuleType:
    """A plugin module that registers methods under these names."""

    @hookimpl
    def kvfactory_register_methods(register: Callable[..., None]) -> None:
        for name in names:
            register(name, attention=Whole)

    module = ModuleType("a_plugin")
    module.kvfactory_register_methods = kvfactory_register_methods  # type: ignore[attr-defined]
    return module


@contextmanager
def says(*parts: str) -> Iterator[None]:
    """Expects a `UserError` of one line that has all parts in it."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


# ---- what is found ----


def test_every_plugin_file_has_its_entry_point_and_every_entry_point_its_file() -> None:
    plugins = {file.stem for file in (ROOT / "plugins").glob("*.py") if not file.stem.startswith("_")}
    runners = {file.stem for file in (ROOT / "runners").glob("run_*.py")}
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups["kvfactory"] == {name: f"kvfactory_plugins.{name}" for name in plugins}
    assert sorted(groups["kvfactory.benchmarks"].values()) == sorted(f"kvfactory_runners.{name}" for name in runners)
    for group, declared in groups.items():
        found = metadata.entry_points(group=group)
        installed = {each.name: each.value for each in found if each.dist is not None and each.dist.name == "kvfactory"}
        assert installed == declared, "did you reinstall? entry points are seen after: pip install -e ."


def test_benchmarks_are_registered_under_the_names_of_their_entry_points() -> None:
    names = {each.name for each in metadata.entry_points(group="kvfactory.benchmarks")}
    assert set(Registry.load().benchmarks) == names


def test_who_loads_a_method_does_not_wait_for_benchmarks() -> None:
    code = "import sys, kvfactory; kvfactory.load_method('fullkv'); print({'pandas', 'matplotlib'} & {*sys.modules})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


def test_a_benchmark_that_fails_to_import_is_told_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = installed(monkeypatch, chess=ImportError("No module named 'board'"))
    with says("benchmark 'chess'", "kvf-chess 1.2", "No module named 'board'"):
        benchmark_command("chess", registry)
    with says("unknown benchmark 'chest'"):
        benchmark_command("chest", registry)


def test_every_built_in_plugin_says_where_it_comes_from() -> None:
    registry = Registry.load()
    version = metadata.version("kvfactory")
    ours = [plugin for plugin in registry.plugins if plugin.distribution == "kvfactory"]
    assert {str(plugin) for plugin in ours} == {f"kvfactory {version}"}
    assert all(plugin.error is None for plugin in ours)
    assert registry.method_entry("fullkv").plugin in ours


def installed(monkeypatch: pytest.MonkeyPatch, **plugins: Any) -> Registry:
    """A registry that finds these modules, or exceptions their import raises, as entry points of packages named alike."""

    def entry_point(name: str, outcome: Any) -> SimpleNamespace:
        def load() -> Any:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return SimpleNamespace(name=name, dist=SimpleNamespace(name=f"kvf-{name}", version="1.2"), load=load)

    found = [entry_point(name, outcome) for name, outcome in plugins.items()]
    monkeypatch.setattr(metadata, "entry_points", lambda group: found if group == "kvfactory" else [])
    return Registry.load()


def test_one_broken_package_is_told_and_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ImportError("No module named 'triton'\n(install it)")
    registry = installed(monkeypatch, bad=broken, good=methods_plugin("mine"))
    bad = next(plugin for plugin in registry.plugins if plugin.name == "bad")
    assert bad.error == "ImportError: No module named 'triton' (install it)"
    assert registry.load_method("mine") == Whole()
    with says("bad", "kvf-bad 1.2", "ImportError", "No module named 'triton'"):
        registry.load_method("Bad")
    with says("unknown method 'other'"):
        registry.load_method("other")


def test_a_package_may_bring_allocators_and_families_too(monkeypatch: pytest.MonkeyPatch) -> None:
    family = get_registry().families["llama"]

    class Plugged:
        @hookimpl
        def kvfactory_register_allocators(self, register: Callable[..., None]) -> None:
            register("flat", Flat)

        @hookimpl
        def kvfactory_register_families(self, register: Callable[..., None]) -> None:
            register("llama9", family)

        @hookimpl
        def kvfactory_register_methods(self, register: Callable[..., None]) -> None:
            register("mine", attention=ScoreByNorm, allocator="flat")

    registry = installed(monkeypatch, mine=Plugged())
    assert registry.families["llama9"] is family
    assert registry.load_method("mine", budget=9) == ScoreByNorm(budget=9, allocator=Flat())


def a_command_plugin(name: str) -> ModuleType:
    def kvfactory_register_commands(register: Callable[..., None]) -> None:
        register(name, click.Command(name, callback=lambda: click.echo("it ran"), help="Of somebody else's."))

    return a_plugin_with(kvfactory_register_commands)


def test_a_package_may_bring_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    registry = installed(monkeypatch, mine=a_command_plugin("measure-mine"))
    monkeypatch.undo()
    monkeypatch.setattr("kvfactory_runners.commands.registry_for", lambda arguments: registry)
    assert exit_code("kvfactory", ["measure-mine"]) == 0 and "it ran" in capsys.readouterr().out
    assert exit_code("kvfactory", ["--help"]) == 0
    said = capsys.readouterr().out
    assert all(each in said for each in ("methods", "measure-mine", "Of somebody else's."))


def test_a_command_of_a_name_that_is_taken_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with says("command 'measure-mine'", "kvf-one 1.2", "kvf-two 1.2"):
        installed(monkeypatch, one=a_command_plugin("measure-mine"), two=a_command_plugin("measure-mine"))
    registry = installed(monkeypatch, mine=a_command_plugin("methods"))
    monkeypatch.undo()
    monkeypatch.setattr("kvfactory_runners.commands.registry_for", lambda arguments: registry)
    assert exit_code("kvfactory", ["methods"]) == 2
    assert "'methods'" in capsys.readouterr().err


def test_a_benchmark_of_a_name_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def a_benchmark() -> ModuleType:
        def kvfactory_register_benchmarks(register: Callable[..., None]) -> None:
            register("chess", object())

        return a_plugin_with(kvfactory_register_benchmarks)

    with says("benchmark 'chess'", "kvf-one 1.2", "kvf-two 1.2"):
        installed(monkeypatch, one=a_benchmark(), two=a_benchmark())


def test_a_command_comes_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    hook = "def kvfactory_register_commands(register):\n    register('in-a-file', click.Command('in-a-file'))\n"
    file.write_text(f"import click\nfrom kvfactory import hookimpl\n\n@hookimpl\n{hook}")
    registry = Registry()
    registry.add_file(file)
    assert list(registry.commands) == ["in-a-file"]


class Flat(Uniform):
    """An allocator of somebody else's."""


def test_an_allocator_taken_up_by_another_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Uniform, "name", Uniform.name)  # to be put back, should it not be kept

    class Plugged:
        @hookimpl
        def kvfactory_register_allocators(self, register: Callable[..., None]) -> None:
            register("even", Uniform)

    registry = Registry.load()
    try:
        registry.add(Plugged(), Plugin("even", "kvf-even", "1.0"))
    except UserError as error:
        assert "even" in str(error) and "uniform" in str(error)
    else:
        assert registry.load_method("snapkv", budget=32).settings()["allocator"] == "uniform"
        assert registry.load_method("snapkv", budget=32, allocator="even").settings()["allocator"] in (
            "even",
            "uniform",
        )


class ScoreByNorm(EvictionMethod):
    def score(self, layer: LayerContext) -> Tensor:
        return -layer.keys.norm(dim=-1)


# ---- what is refused ----


def test_a_name_taken_twice_names_both_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with says("'mine'", "kvf-one 1.2", "kvf-two 1.2"):
        installed(monkeypatch, one=methods_plugin("mine"), two=methods_plugin("other", "mine"))


def test_two_plugins_of_one_name_are_two_plugins() -> None:
    registry = Registry()
    registry.add(methods_plugin("a"), Plugin("same", "kvf-one", "1.0"))
    registry.add(methods_plugin("b"), Plugin("same", "kvf-two", "2.0"))
    assert {str(registry.method_entry(name).plugin) for name in ("a", "b")} == {"kvf-one 1.0", "kvf-two 2.0"}


def test_names_are_in_lower_case() -> None:
    with says("'Mine'", "kvf-one 1.0", "lower case"):
        Registry().add(methods_plugin("Mine"), Plugin("one", "kvf-one", "1.0"))


def a_plugin_with(hook: Callable[..., None]) -> ModuleType:
    module = ModuleType("a_plugin")
    setattr(module, hook.__name__, hookimpl(hook))
    return module


def kvfactory_register_method(register: Any) -> None:
    """Misspelt: the hook has an s at its end."""


def kvfactory_register_methods(registry: Any) -> None:
    """Its argument is `register`."""


@pytest.mark.parametrize("hook", [kvfactory_register_method, kvfactory_register_methods])
def test_a_misspelt_hook_is_refused(hook: Callable[..., None]) -> None:
    registry = Registry()
    with says("one", "kvf-one 1.0", hook.__name__):
        registry.add(a_plugin_with(hook), Plugin("one", "kvf-one", "1.0"))


def test_a_refused_plugin_is_not_blamed_on_the_next() -> None:
    registry = Registry()
    with pytest.raises(UserError):
        registry.add(a_plugin_with(kvfactory_register_method), Plugin("bad", "kvf-bad", "1.0"))
    registry.add(methods_plugin("mine"), Plugin("good", "kvf-good", "1.0"))
    assert "mine" in registry.methods


# ---- files ----

GOOD_PLUGIN = """
from __future__ import annotations
from dataclasses import dataclass
from kvfactory import DenseStore, Method, hookimpl

@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    size: int = 3
    def compress(self, layer):
        return DenseStore(layer.keys, layer.values)

@hookimpl
def kvfactory_register_methods(register):
    register("NAME", attention=Mine)
"""


def test_a_plugin_file_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(GOOD_PLUGIN.replace("NAME", "mine"))
    registry = Registry()
    registry.add_file(file)
    assert registry.load_method("mine", size="5").settings() == {"size": 5}
    assert registry.methods["mine"].plugin.distribution == str(file)


def test_two_plugin_files_of_one_name_in_two_folders(tmp_path: Path) -> None:
    registry = Registry()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "mine.py"
        file.write_text(GOOD_PLUGIN.replace("NAME", f"mine-{folder}").replace("int", f"Size_{folder}"))
        file.write_text(file.read_text().replace("@dataclass", f"Size_{folder} = int\n\n@dataclass"))
    registry.add_file(tmp_path / "a" / "mine.py")
    try:
        registry.add_file(tmp_path / "b" / "mine.py")
    except UserError as error:
        assert all(str(tmp_path / folder / "mine.py") in str(error) for folder in "ab")
    else:
        assert sorted(registry.methods) == ["mine-a", "mine-b"]
        a, b = (type(registry.load_method(f"mine-{folder}", size="4")) for folder in "ab")
        assert a is not b


def test_a_plugin_file_that_fails_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name")
    with says("--plugin", str(broken), "nothing_of_this_name"):
        Registry().add_file(broken)
    with says("--plugin", "nowhere.py", "no such file"):
        Registry().add_file(tmp_path / "nowhere.py")
    text = tmp_path / "plugin.txt"
    text.write_text(GOOD_PLUGIN)
    with says("--plugin", str(text), ".py"):
        Registry().add_file(text)


# ---- names, settings and values ----


@pytest.mark.parametrize("name", METHODS)
def test_names_are_looked_up_in_any_case(name: str) -> None:
    assert load_method(name.upper(), budget=32) == load_method(name, budget=32)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("snapvk", {"budget": 9}), ("unknown method 'snapvk'", "did you mean 'snapkv'?")),
        (("zzzzzz", {"budget": 9}), ("unknown method 'zzzzzz'", *METHODS)),
        (("snapkv", {"budget": 32, "windowsize": 9}), ("'windowsize'", "snapkv", "did you mean 'window_size'?")),
        (("snapkv", {"budget": 32, "beta": 9}), ("'beta'", "snapkv")),
        (("fullkv", {"window_size": 9}), ("'window_size'", "fullkv", "none")),
        (("snapkv", {"budget": 32, "allocator": "piramid"}), ("'piramid'", "did you mean 'pyramid'?")),
        (("fullkv", {"allocator": "pyramid"}), ("fullkv", "--allocator")),
        (("snapkv", {"budget": 32, "pooling": "maxpol"}), ("--pooling", "'maxpol'", "did you mean 'maxpool'?")),
        (("snapkv", {"budget": 32, "window_size": "many"}), ("--window_size", "'many'", "a whole number")),
        (("snapkv", {"budget": 32, "window_size": 4.5}), ("--window_size", "'4.5'", "a whole number")),
        (("snapkv", {"budget": 32, "window_size": True}), ("--window_size", "'True'", "a whole number")),
        (("snapkv", {"budget": 32, "window_size": 0}), ("--window_size", "0")),
        (("snapkv", {"budget": 32, "kernel_size": 4}), ("--kernel_size", "4", "odd")),
        (("adakv", {"budget": 32, "floor": "low"}), ("--floor", "'low'", "a number")),
        (("adakv", {"budget": 32, "floor": 2}), ("--floor", "2")),
        (("adakv", {"budget": 32, "normalize": "perhaps"}), ("--normalize", "'perhaps'", "true or false")),
        (("pyramidkv", {"budget": 32, "beta": "nan"}), ("--beta", "nan")),
        (("h2o", {"budget": 32, "heavy_ratio": -1}), ("--heavy_ratio", "-1")),
        (("h2o", {"budget": 32, "recent_size": -1}), ("--recent_size", "-1")),
        (("streamingllm", {"budget": 32, "sink_size": -1}), ("--sink_size", "-1")),
        (("streamingllm", {"budget": 32, "recent_size": 12}), ("--recent_size 12", "--sink_size 4", "32")),
        (("snapkv", {}), ("snapkv", "needs a budget", "--max_capacity_prompts")),
        (("snapkv", {"budget": "all"}), ("--max_capacity_prompts", "'all'", "a whole number")),
        (("snapkv", {"budget": 8}), ("8", "--max_capacity_prompts", "more than 8")),
        (("streamingllm", {"budget": 4}), ("4", "--max_capacity_prompts", "more than 4")),
        (("streamingllm", {"budget": 0, "sink_size": 0}), ("0", "--max_capacity_prompts", "more than 0")),
        (("h2o", {"budget": 8, "recent_size": 8}), ("8", "--max_capacity_prompts", "more than 8")),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: tuple[str, dict[str, Any]], parts: tuple[str, ...]) -> None:
    name, settings = arguments
    with says(*parts):
        load_method(name, **settings)


def test_a_method_that_keeps_everything_leaves_a_budget_unused() -> None:
    assert load_method("fullkv", budget=128) == load_method("fullkv")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "12", 12),
        (int, 12.0, 12),
        (float, "0.25", 0.25),
        (float, 1, 1.0),
        (bool, "True", True),
        (bool, "no", False),
        (bool, "0", False),
        (int | None, "none", None),
        (int | None, None, None),
        (int | None, "7", 7),
        (Literal["mean", "max"], "max", "max"),
        (Literal[2, 4], "4", 4),
        (Literal[2, 4], 2, 2),
    ],
)
def test_values_are_read_as_flags_are(kind: Any, text: Any, value: Any) -> None:
    read = convert("some_flag", text, kind)
    assert read == value and type(read) is type(value)


def test_a_number_that_is_no_choice_is_told() -> None:
    with says("--nbits", "5", "2", "4"):
        convert("nbits", "5", Literal[2, 4])


def test_an_allocator_brings_its_settings() -> None:
    method = load_method("snapkv", budget="32", allocator="pyramid", beta="4", window_size="5")
    assert isinstance(method, EvictionMethod)
    assert method.allocator == Pyramid(beta=4.0)
    assert method.settings()["beta"] == 4.0 and method.settings()["window_size"] == 5


@pytest.mark.parametrize(("kind", "part"), [("allocator", None), *PARTS])
@pytest.mark.parametrize("name", METHODS)
def test_settings_load_the_same_method_again(name: str, kind: str, part: str | None) -> None:
    registry = get_registry()
    given = {kind: part} if part and kind in registry.kinds_of_parts(name) else {}
    try:
        method = load_method(name, budget=32, **given)
    except UserError as refusal:
        assert given and part != registry.methods[name].parts.get(kind), refusal
        return
    assert registry.load_method(name, **method.settings()) == method
    flags = {each: "none" if value is None else str(value) for each, value in method.settings().items()}
    assert registry.load_method(name, **flags) == method


@pytest.mark.parametrize("nothing", [None, "none"])
def test_a_method_may_lose_the_merge_that_it_brings(nothing: str | None) -> None:
    method = load_method("cam", budget=32, merge=nothing)
    assert method.settings()["merge"] is None
    assert load_method("cam", **method.settings()) == method != load_method("cam", budget=32)
    with says("unknown allocator 'none'"):
        load_method("cam", budget=32, allocator="none")


@pytest.mark.parametrize("name", METHODS)
def test_aliases_lead_to_settings(name: str) -> None:
    registry = get_registry()
    known = registry.settings(name)
    for alias, setting in registry.methods[name].attention.aliases.items():
        assert alias not in known and setting in known


def test_an_alias_is_its_setting() -> None:
    assert load_method("h2o", budget=32, window_size="6") == load_method("h2o", budget=32, recent_size=6)


def test_an_alias_gives_way_to_a_part_that_has_the_name() -> None:
    alone = load_method("rkv", budget=32, similarity_threshold=0.25)
    merging = load_method("rkv", budget=32, merge="kvmerger", similarity_threshold=0.25)
    assert alone.settings()["redundancy_threshold"] == 0.25
    assert (merging.settings()["redundancy_threshold"], merging.settings()["similarity_threshold"]) == (0.5, 0.25)


def test_an_alias_is_not_given_beside_its_setting() -> None:
    with says("window_size", "recent_size"):
        load_method("h2o", budget=32, window_size=6, recent_size=8)


# ---- every setting does what it says or is refused ----


def flat(thing: Any) -> Any:
    """Tensors, lists of them, and None, as something that can be compared."""
    if isinstance(thing, Tensor):
        return thing.tolist()
    return [flat(each) for each in thing] if isinstance(thing, (list, tuple)) else thing


def behaviour(method: Method) -> list[Any]:
    """All that can be seen of a method: what it keeps of two layers, what becomes of it over three steps, what rows say."""
    generator = torch.Generator().manual_seed(11)
    layers = [[torch.randn(heads, 70, 8, generator=generator) for heads in (8, 4, 4)] for _ in range(2)]
    hidden, frequencies = torch.randn(70, 64, generator=generator), 0.1 ** torch.arange(4.0)
    for _, k, _ in layers:
        k[0] *= 2  # heads that differ in how sharp their attention is

    def feed(stores: list[Store], ids: list[int]) -> None:
        for store, (q, k, v) in zip(stores, layers, strict=True):
            store.append(k[:, ids], v[:, ids], 70)
            store.read(q[:, ids])

    stores = [compress_layer(method, *layers[index], 3 * index, 4, hidden, frequencies) for index in range(2)]
    seen: list[Any] = []
    if isinstance(method, PromptAttention):
        long = [torch.randn(heads, 200, 8, generator=torch.Generator().manual_seed(heads)) for heads in (8, 4, 4)]
        seen.append(flat(method.prefill_attention(LayerContext(0, 1, *long))))
    stores = method.finish(stores, Prompt(list(range(70)), feed, torch.device("cpu")))
    for store in stores:
        seen += [store.nbytes(), flat(store.positions()), flat(store.keys()), flat(store.values())]
        for step in range(3):
            query = torch.randn(8, 1, 8, generator=generator)
            store.append(query[:4], query[4:], 70 + step)
            reading = store.read(query)
            seen += [flat(reading.keys), flat(reading.values), store.nbytes()]
            weights = [
                torch.rand(len(part), 1, len(keys[0]), generator=generator) for part, keys, _ in reading.pieces(query)
            ]
            whole = isinstance(reading.keys, Tensor)
            store.observe((weights[0] if whole else weights) if store.observes else None)
    return [*seen, method.row_fields(stores)]


def other_values(setting: Setting) -> list[Any]:
    """Values a user could give in place of the default."""
    kind, default = setting.type, setting.default
    if get_origin(kind) is Literal:
        return [value for value in get_args(kind) if value != default]
    if kind is bool:
        return [not default]
    if default is None:
        return [2, 5, 12]
    if default == "same":
        return [None]
    if isinstance(default, Share):
        return [1, 3, Share(default.percent / 2)]
    if isinstance(default, tuple):
        return [(), (*default, 3), tuple(2 * each for each in default)]
    values = (default / 4, default / 2, default + 2, default * 2, 12, 0.5)
    return [value for value in values if value != default and (kind is float or value % 1 == 0)]


SETTINGS = [
    (name, kind, part, setting)
    for name in METHODS
    for kind, part in [("allocator", None), *PARTS]
    if part is None or name == "snapkv"
    for setting in get_registry().settings(name, {kind: part})
    if part is None or setting not in get_registry().settings(name)
]


AT_A_SMALL_SIZE: dict[str, dict[str, Any]] = {
    "hierarchical": {
        "window_size": 2,
        "access_size": 4,
        "recent_size": 2,
        "sink_size": 1,
        "thresholds": (4, 2, 1),
    },
    "semantic": {"num_clusters": 4},
    "quest": {"token_budget": 8, "page_size": 2, "dense_layers": 0},
    "think": {"whole_size": 4},
    "kvquant": {"calibration": tiny_calibration(4, 4, 8), "nbits": 3},
    "minference": {"block_size": 2, "block_count": 3},
    "learned": {"weights": tiny_weights(4, 4, 8)},
}
"""Settings under which the others of a method or part show in seventy tokens."""
OTHER_FILES = {"calibration": [tiny_calibration(4, 4, 8, 2.0)], "weights": [tiny_weights(4, 4, 8, seed=1)]}


@pytest.mark.parametrize(("name", "kind", "part", "setting"), SETTINGS)
def test_no_setting_is_accepted_and_ignored(
    name: str, kind: str, part: str | None, setting: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"budget": 24} | ({kind: part} if part else {})
    if "quant_residual_length" in get_registry().settings(name, {kind: part}) and setting != "quant_residual_length":
        given["quant_residual_length"] = 4  # few enough that something is quantised
    small = AT_A_SMALL_SIZE.get(name, {}) | AT_A_SMALL_SIZE.get(part or "", {})
    given |= {each: value for each, value in small.items() if each != setting or each in OTHER_FILES}
    if name == "minference" and setting != "patterns":
        heads = ["vertical_and_slash", 40, 50], ["stream_llm", 3, 9], ["block_sparse", 0, 0]
        table = {str(head): [*heads[head % 3], 1.0] for head in range(8)}
        given["patterns"] = str(tmp_path / "patterns.json")
        Path(given["patterns"]).write_text(json.dumps([table] * 4))
    usual = behaviour(load_method(name, **given))
    ignored = []
    others = OTHER_FILES.get(setting) or other_values(get_registry().settings(name, {kind: part})[setting])
    for value in others:
        try:
            if behaviour(load_method(name, **given | {setting: value})) != usual:
                return
        except UserError:
            continue
        ignored.append(value)
    assert not ignored, f"--{setting} {ignored} changes nothing"
